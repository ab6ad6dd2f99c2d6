"""A stage in several processes: the same model, and nothing left behind when something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyeyes.data.snapshot import open_folder
from manyeyes.errors import RecipeError
from manyeyes.training.launch import launch_stage
from manyeyes.training.stage import read_stage_report
from tests.training_toys import toy_recipe, toy_snapshot

ROOT = Path(__file__).resolve().parents[2]
CONSTANT = {"kind": "constant", "warmup_ratio": 0}


def launch(folder: Path, name: str, *, processes: int, **changes: object) -> Path:
    launch_stage(
        toy_recipe(schedule=CONSTANT, **changes),
        "prealign",
        processes=processes,
        threads=1,
        snapshot=open_folder(folder / "data"),
        code_digest="code",
        out=folder / name,
        work_dir=folder / f"work-{name}",
        encoder="left",
    )
    return folder / name


def test_started_processes_learn_what_one_learns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy_snapshot(tmp_path / "data")
    before = dict(os.environ)
    one = launch(tmp_path, "one", processes=1, epochs=2)
    two = launch(tmp_path, "two", processes=2, epochs=2)
    assert dict(os.environ) == before
    log = "".join(capfd.readouterr())
    assert "Fatal" not in log, "each ends in order"
    assert "Traceback" not in log
    losses = [[point.loss for point in read_stage_report(path).history] for path in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    alone, together = (load_file(path / "encoder.safetensors") for path in (one, two))
    differences = torch.cat([(alone[name] - together[name]).abs().flatten() for name in alone])
    # Adam turns rounding differences of tiny gradients into steps of the learning rate's size; most stay tiny.
    assert differences.mean() < 1e-6


def test_an_error_of_the_stage_is_the_error_of_the_launch(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    with pytest.raises(RecipeError, match='has no stage "sft"'):
        launch_stage(
            toy_recipe().model_copy(update={"stages": toy_recipe().stages.model_copy(update={"sft": None})}),
            "sft",
            processes=2,
            threads=1,
            snapshot=open_folder(tmp_path / "data"),
            code_digest="code",
            out=tmp_path / "out",
            work_dir=tmp_path / "work",
        )
    assert not (tmp_path / "out").exists()


def test_started_processes_end_with_a_killed_parent_even_while_they_wait_for_each_other(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    code = (
        "from pathlib import Path; from tests.invariants.test_training_launch import launch; "
        f"launch(Path({str(tmp_path)!r}), 'long', processes=2, epochs=2000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not list((tmp_path / "work-long").glob("*/step-*")):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    first, second = _children(parent.pid)
    # The first one is soon inside a collective, where Python handles no signal.
    os.kill(second, signal.SIGSTOP)
    try:
        time.sleep(3)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert _ends(first)
    finally:
        os.kill(second, signal.SIGCONT)
    assert _ends(second)


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.05)
    return not _alive(pid)


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    return state != "Z"
