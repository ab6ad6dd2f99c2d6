"""The runner, on a toy pipeline: starts, ends, cache, failures, locks and every way of being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyeyes.harness.events import SUMMARY_FILE, EventReader, RunSummary
from tests.pipelines.checkout import ROOT, is_alive

RUN = """
import sys
from pathlib import Path
from rich.console import Console
from manyeyes.kubeflow.run import ProgressView
from manyeyes.kubeflow.run import RunOptions, run_pipeline
from manyeyes.kubeflow.summarise import in_words
from manyeyes.errors import ManyEyesError
arguments = {"text": sys.argv[1], "mode": sys.argv[2]}
try:
    summary = run_pipeline(
        RunOptions(Path("toy.yaml"), "toy", arguments, tracked=False), view=ProgressView(Console(width=100))
    )
except ManyEyesError as error:
    print(error)
    sys.exit(2)
print("\\n".join(in_words(summary)))
sys.exit({"succeeded": 0, "failed": 1, "interrupted": 130}[summary.status])
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    code = (
        "from kfp import compiler; from tests.pipelines.toy_pipeline import toy; "
        f"compiler.Compiler().compile(toy, {str(folder / 'toy.yaml')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    (folder / "pids").mkdir()
    return folder


def start(folder: Path, text: str, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, text, mode],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'models'}{os.pathsep}{ROOT}", "TOY_PIDS": str(folder / "pids")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def read_summary(folder: Path) -> RunSummary:
    return RunSummary.model_validate_json((folder / "runs" / "latest" / SUMMARY_FILE).read_text(encoding="utf-8"))


def run(folder: Path, text: str, mode: str = "well") -> tuple[int, str, RunSummary]:
    process = start(folder, text, mode)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output, read_summary(folder)


def start_hanging(folder: Path, mode: str = "hang") -> tuple[subprocess.Popen[str], list[int]]:
    """A run with two steps that hang; the pids of their processes."""
    for old in (folder / "pids").iterdir():
        old.unlink()
    process = start(folder, "one two", mode)
    deadline = time.monotonic() + 60
    while len(list((folder / "pids").iterdir())) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, [int(path.name) for path in (folder / "pids").iterdir()]


def wait_until_gone(pids: list[int], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.05)


def pipeline_process(folder: Path) -> int:
    """Pid of the process between the runner and the steps."""
    latest = (folder / "runs" / "latest").resolve()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"manyeyes.kubeflow.pipeline" in words and os.fsencode(latest) in words:
            return int(path.parent.name)
    raise AssertionError("no process runs the pipeline")


def test_first_run_works_and_the_second_comes_from_the_cache(toy: Path) -> None:
    code, output, first = run(toy, "good bad ugly")
    assert code == 0, output
    assert first.status == "succeeded"
    assert {step.name for step in first.steps} == {"words", "letters[good]", "letters[bad]", "letters[ugly]"}
    assert not any(step.cached for step in first.steps)
    assert all(
        step.report and "<!doctype html>" in Path(step.report).read_text(encoding="utf-8") for step in first.steps
    )
    assert "\x1b" not in output
    assert "executor_input" not in output
    assert len([line for line in output.splitlines() if line.startswith("letters[good]")]) == 1

    code, output, second = run(toy, "good bad ugly")
    assert code == 0, output
    assert {step.name: step.cached for step in second.steps} == {
        "words": False,
        "letters[good]": True,
        "letters[bad]": True,
        "letters[ugly]": True,
        "add": True,
    }
    assert {step.figure for step in second.steps if step.name.startswith("letters")} == {"4 letters", "3 letters"}
    assert all(step.seconds == 0 for step in second.steps if step.cached)
    assert 0 < second.overhead_s <= second.wall_s


def test_failing_step_says_found_needed_do_and_where_the_log_is(toy: Path) -> None:
    code, output, summary = run(toy, "good bad", "fail")
    assert code == 1
    assert summary.status == "failed"
    assert summary.error is not None
    assert summary.error.user_error
    for text in (
        "letters[bad] failed: RecordError",
        'word is "bad"',
        "a good word",
        "Take another word.",
        "pipeline.log",
    ):
        assert text in output
    errors = list((toy / "runs" / "latest").resolve().rglob("error.json"))
    assert [json.loads(path.read_text(encoding="utf-8"))["found"] for path in errors] == ['word is "bad"']
    assert "letters[bad] failed" in (errors[0].parent / "notes").read_text(encoding="utf-8")
    assert "Traceback" in (toy / "runs" / "latest" / "pipeline.log").read_text(encoding="utf-8")


def test_defect_in_a_step_is_no_user_error(toy: Path) -> None:
    _, output, summary = run(toy, "good", "crash")
    assert summary.error is not None
    assert not summary.error.user_error
    assert "defect" in output


def test_step_whose_process_dies_is_named(toy: Path) -> None:
    _, output, summary = run(toy, "good", "die")
    assert summary.error is not None
    assert summary.error.step == "letters[good]"
    assert "ended without saying why" in output


def test_second_run_in_a_checkout_is_refused_with_the_first_ones_pid(toy: Path) -> None:
    first, pids = start_hanging(toy)
    try:
        second = start(toy, "x", "well")
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert str(first.pid) in output
    finally:
        os.kill(first.pid, signal.SIGINT)
        first.communicate(timeout=60)
    wait_until_gone(pids)


def test_ctrl_c_stops_every_process_and_exits_with_130(toy: Path) -> None:
    process, pids = start_hanging(toy)
    pids.append(pipeline_process(toy))
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after" in output
    assert "failed" not in output
    wait_until_gone(pids, seconds=1)
    assert read_summary(toy).status == "interrupted"


def test_ctrl_c_waits_for_what_a_step_still_saves(toy: Path) -> None:
    process, pids = start_hanging(toy, "save")
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again ends it at once" in output
    assert all((toy / "pids" / f"{pid}-saved").is_file() for pid in pids)


def test_a_second_ctrl_c_waits_for_nothing(toy: Path) -> None:
    process, pids = start_hanging(toy, "save")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any((toy / "pids" / f"{pid}-saved").exists() for pid in pids)
    wait_until_gone(pids, seconds=1)


def test_kill_9_of_the_runner_leaves_no_orphan_and_the_next_run_starts(toy: Path) -> None:
    process, pids = start_hanging(toy)
    pids.append(pipeline_process(toy))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until_gone(pids)
    code, output, _ = run(toy, "after")
    assert code == 0, output


def test_kill_9_of_runner_and_pipeline_process_leaves_no_orphan(toy: Path) -> None:
    process, pids = start_hanging(toy)
    middle = pipeline_process(toy)
    os.kill(process.pid, signal.SIGKILL)
    os.kill(middle, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until_gone([*pids, middle])


def test_kill_9_of_the_pipeline_process_is_reported_and_leaves_no_orphan(toy: Path) -> None:
    process, pids = start_hanging(toy)
    os.kill(pipeline_process(toy), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "ended without saying why" in output
    wait_until_gone(pids, seconds=1)


def test_progress_of_a_running_step_reaches_the_events(toy: Path) -> None:
    process, pids = start_hanging(toy)
    events = EventReader((toy / "runs" / "latest").resolve()).read_new()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    wait_until_gone(pids, seconds=1)
    assert {(event.figure, event.done) for event in events if event.eta_s} == {("hanging", 0.5)}


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_a_locale_that_lacks_a_character_stops_no_run(
    toy: Path, locale: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in locale.items():
        monkeypatch.setenv(name, value)
    # Arguments are decoded by the locale, too; what a recipe holds is not.
    monkeypatch.setattr(f"{__name__}.RUN", RUN.replace("sys.argv[1]", ascii(f"größe → {len(locale)}中")))
    process = start(toy, "", "well")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    summary = read_summary(toy)
    assert {step.name for step in summary.steps} >= {
        "words",
        "letters[größe]",
        "letters[→]",
        f"letters[{len(locale)}中]",
    }
    assert f"letters of {len(locale)}中" in (toy / "runs" / "latest" / "pipeline.log").read_text(encoding="utf-8")
