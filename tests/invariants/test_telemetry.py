"""What is used here reports nothing to anybody: no connection, no device id, whatever package is underneath."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from manyeyes.telemetry import OFF
from tests.export_toys import Toy

ROOT = Path(__file__).parents[2]

# Python's own sockets; what native code does shows in the files that it keeps.
WATCH = """
import json, sys
contacted = []

def watch(event, given):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        contacted.append(str(given[0]))
    elif event in ("socket.connect", "socket.sendto") and isinstance(given[1], tuple):
        contacted.append(str(given[1][0]))

sys.addaudithook(watch)
import atexit
here = ("127.0.0.1", "::1", "localhost")
atexit.register(lambda: print(json.dumps([host for host in contacted if host not in here])))
"""

ASK = """
from manyeyes.cli.main import cli
cli(["ask", {bundle!r}, "-", "What is it?", "--max-new-tokens", "2"], standalone_mode=False)
"""

SERVE = """
from manyeyes.runtime.bundle import load_bundle
load_bundle({bundle!r}).answer("What is it?", images=[], max_new_tokens=2)
"""

TRACK = """
from manyeyes.registry.tracking import connect, step_run
connect(create=True)
with step_run("a step") as run:
    pass
import time
time.sleep(1)  # MLflow sends from a thread
"""

VALIDATE = """
from pathlib import Path
from manyeyes.data.validation import validate_snapshot
from tests.evaluation_fakes import make_snapshot
snapshot = make_snapshot(Path("snapshot"), images=3)
names = list(snapshot.manifest.datasets)
report = validate_snapshot(snapshot, datasets=names, eval_datasets=[], suite="conversations", out_dir=Path("out"))
assert report.rows > 0 and report.expectations
"""

IMPORTS = """
import manyeyes.model, datasets, diffusers, peft, timm, transformers, kfp, kfp.local, huggingface_hub
import great_expectations, mlflow, dvc.analytics
assert not dvc.analytics.is_enabled()
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled()
"""


def run(script: str, folder: Path, **environment: str) -> list[str]:
    """Run a script in a home of its own; the hosts that it asked for."""
    home = folder / "home"
    (home / "tmp").mkdir(parents=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        # MLflow is silent in CI and under pytest by itself.
        if name not in (*OFF, "DO_NOT_TRACK", "CI", "GITHUB_ACTIONS") and not name.startswith(("PYTEST", "XDG", "HF_"))
    }
    places = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + script],
        env={**kept, **places, "PYTHONPATH": f"{ROOT / 'models'}:{ROOT}", **environment},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hosts: list[str] = json.loads(done.stdout.splitlines()[-1])
    return hosts


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("script", [ASK, SERVE], ids=["ask", "load_bundle"])
def test_a_bundle_answers_without_a_trace(script: str, toy_bundle: Toy, tmp_path: Path) -> None:
    assert run(script.format(bundle=str(toy_bundle.bundle)), tmp_path) == []
    assert files_in(tmp_path / "home") == []


@pytest.mark.parametrize("script", [TRACK, VALIDATE, IMPORTS], ids=["mlflow", "great_expectations", "imports"])
def test_the_packages_underneath_contact_nobody(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path) == []
    ids = [name for name in files_in(tmp_path / "home") if re.search(r"id$|telemetry|analytics|Microsoft|\.ses$", name)]
    assert ids == []


def test_what_a_user_set_stays(tmp_path: Path) -> None:
    chosen = dict.fromkeys(OFF, "as I like it")
    script = f"import manyeyes, os\nassert all(os.environ[name] == 'as I like it' for name in {list(OFF)})"
    assert run(script, tmp_path, **chosen) == []


def test_images_and_page_name_every_variable() -> None:
    for file in ("infra/images/Containerfile", "docs/telemetry.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for name, value in OFF.items():
            assert f"{name}={value}" in text, (file, name)
