from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyeyes.errors import RecordError, StorageError
from manyeyes.harness.base import LocalArtifact, Reporter, Step, StepResult, as_user_error, run_step
from manyeyes.harness.events import ErrorReport, EventReader, emit
from manyeyes.pages import step_page


def double(reporter: Reporter, *, number: int, out: Path) -> StepResult:
    reporter.progress("halfway", done=0.5, eta_s=1.0)
    out.write_text(str(2 * number), encoding="utf-8")
    return StepResult(
        f"{2 * number}", metrics={"number": 2.0 * number}, values={"number": 2 * number},
        html=step_page("Doubled", "fine", {}),
        metadata={"digest": "abc"},
    )  # fmt: skip


def refuse(reporter: Reporter, *, out: Path) -> StepResult:
    raise RecordError("a pear", "an apple", "Buy apples.")


def fill_disk(reporter: Reporter, *, out: Path) -> StepResult:
    raise OSError(errno.ENOSPC, "No space left on device", str(out))


def crash(reporter: Reporter, *, out: Path) -> StepResult:
    raise ZeroDivisionError("by zero")


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("MANYEYES_RUN_DIR", str(folder))
    monkeypatch.setenv("MANYEYES_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MANYEYES_RUN_LOCK", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield folder
    signal.signal(signal.SIGTERM, handler)


def artifacts(folder: Path) -> dict[str, LocalArtifact]:
    return {name: LocalArtifact(str(folder / "task" / name)) for name in ("metrics", "report", "notes")}


def test_step_writes_reports_metrics_and_metadata(tmp_path: Path, run_dir: Path) -> None:
    out = LocalArtifact(str(tmp_path / "task" / "out"))
    shown = artifacts(tmp_path)
    (tmp_path / "task").mkdir()
    step = Step("double", double, imports=("fractions",), tracked=False)
    result = run_step(step, **shown, label="a", outputs={"out": out}, number=21)
    assert result.values == {"number": 42}
    assert Path(out.path).read_text(encoding="utf-8") == "42"
    assert out.metadata == {"digest": "abc"}
    assert shown["report"].metadata == {"digest": "abc", "step": "double[a]", "figure": "42"}
    written = json.loads(Path(shown["metrics"].path).read_text(encoding="utf-8"))
    assert written["number"] == 42.0
    assert set(written) == {"number", "seconds", "import_seconds"}
    # Kubeflow's page that compares runs shows what a step found, and not how long it took.
    assert shown["metrics"].metadata == {"number": 42.0}
    page = Path(shown["report"].path).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<p>fine</p>" in page
    assert "42" in Path(shown["notes"].path).read_text(encoding="utf-8")
    kinds = [(event.kind, event.step) for event in EventReader(run_dir).read_new()]
    assert kinds[0] == ("started", "double[a]")
    assert kinds[-1] == ("finished", "double[a]")


def test_step_writes_no_metrics_and_notes_where_its_component_has_none(tmp_path: Path, run_dir: Path) -> None:
    out, report = LocalArtifact(str(tmp_path / "out")), artifacts(tmp_path)["report"]
    run_step(Step("double", double, tracked=False), report=report, outputs={"out": out}, number=21)
    assert [path.name for path in (tmp_path / "task").iterdir()] == ["report"]
    assert report.metadata["figure"] == "42"


def test_artifact_that_other_steps_take_bears_no_words_on_a_cluster(tmp_path: Path, run_dir: Path) -> None:
    """Kubeflow repeats its metadata in the status of every step that takes it."""

    def work(_reporter: Reporter, *, out: Path) -> StepResult:
        out.write_text("42", encoding="utf-8")
        return StepResult("42", metadata={"digest": "ab" * 32, "md5": "cd" * 16, "kind": "torch"})

    out, report = LocalArtifact(str(tmp_path / "out")), artifacts(tmp_path)["report"]
    out.uri = "minio://mlpipeline/v2/artifacts/out"  # type: ignore[attr-defined]
    run_step(Step("work", work, tracked=False), report=report, outputs={"out": out})
    assert out.metadata == {"store_session_info": ""}
    assert report.metadata["digest"] == "ab" * 32


def test_failed_step_without_notes_leaves_error_json_beside_its_report(tmp_path: Path, run_dir: Path) -> None:
    step = Step("pick", refuse, tracked=False)
    with pytest.raises(SystemExit):
        run_step(step, report=artifacts(tmp_path)["report"], outputs={"out": LocalArtifact(str(tmp_path / "out"))})
    (path,) = (tmp_path / "task").iterdir()
    assert path.name == "error.json"
    assert ErrorReport.model_validate_json(path.read_text(encoding="utf-8")).found == "a pear"


@pytest.mark.parametrize(
    ("function", "found", "needed"),
    [(refuse, "a pear", "an apple"), (fill_disk, "No space left on device", "space and permission")],
)
def test_error_that_a_user_can_mend_exits_with_2_and_says_how(
    function: object, found: str, needed: str, tmp_path: Path, run_dir: Path
) -> None:
    shown = artifacts(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_step(
            Step("pick", function, tracked=False),  # type: ignore[arg-type]
            **shown,
            outputs={"out": LocalArtifact(str(tmp_path / "out"))},
        )
    assert stop.value.code == 2
    error = ErrorReport.model_validate_json((tmp_path / "task" / "error.json").read_text(encoding="utf-8"))
    assert found in error.found
    assert needed in error.needed
    assert error.user_error
    assert error.found in Path(shown["notes"].path).read_text(encoding="utf-8")
    assert [event.error for event in EventReader(run_dir).read_new() if event.kind == "failed"] == [error]


def test_defect_goes_on_as_it_is_and_is_no_user_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_step(
            Step("crash", crash, tracked=False),
            **artifacts(tmp_path),
            outputs={"out": LocalArtifact(str(tmp_path / "out"))},
        )
    error = ErrorReport.model_validate_json((tmp_path / "task" / "error.json").read_text(encoding="utf-8"))
    assert (error.error, error.user_error) == ("ZeroDivisionError", False)


def test_missing_module_counts_as_a_failed_step(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        run_step(Step("far", double, imports=("no_such_module",), tracked=False), **artifacts(tmp_path), number=1)
    assert (tmp_path / "task" / "error.json").is_file()


def test_only_errors_of_the_disk_are_storage_errors() -> None:
    assert isinstance(as_user_error(OSError(errno.ENOSPC, "full", "x")), StorageError)
    assert isinstance(as_user_error(OSError(errno.EACCES, "denied", "x")), StorageError)
    assert as_user_error(OSError(errno.ECONNRESET, "reset")) is None
    assert as_user_error(ValueError("x")) is None


def test_progress_comes_at_most_once_a_second(run_dir: Path) -> None:
    reporter = Reporter("quick")
    for number in range(100):
        reporter.progress(str(number))
    assert [event.figure for event in EventReader(run_dir).read_new()] == ["0"]


def test_reader_waits_for_a_line_that_is_still_being_written(run_dir: Path) -> None:
    emit("started", "a")
    reader = EventReader(run_dir)
    assert [event.step for event in reader.read_new()] == ["a"]
    emit("started", "b")
    whole = (run_dir / "events.jsonl").read_bytes()
    (run_dir / "events.jsonl").write_bytes(whole[:-5])
    assert reader.read_new() == []
    (run_dir / "events.jsonl").write_bytes(whole)
    assert [event.step for event in reader.read_new()] == ["b"]


def test_events_of_a_step_outside_a_run_go_nowhere(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    monkeypatch.delenv("MANYEYES_RUN_DIR")
    emit("started", "alone")
    assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("heard", [True, False])
def test_step_ends_when_the_holder_of_the_lock_is_killed(tmp_path: Path, *, heard: bool) -> None:
    """Also when the process that read its output was killed as well, so that nothing can be written any more."""
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(60)",
            str(lock),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    code = (
        "import time; from pathlib import Path; from manyeyes.harness.base import *\n"
        "def sleep(reporter): print('working', flush=True); time.sleep(60)\n"
        "a = lambda name: LocalArtifact(name)\n"
        "run_step(Step('sleep', sleep, tracked=False), metrics=a('m'), report=a('r'), notes=a('n'))"
    )
    step = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MANYEYES_RUN_LOCK": str(lock)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert step.stdout is not None
    assert step.stdout.readline() == "working\n"
    assert step.poll() is None
    if not heard:
        assert step.stderr is not None
        step.stderr.close()
        step.stderr = None
    holder.kill()
    holder.communicate()
    _, errors = step.communicate(timeout=10)
    assert step.returncode != 0
    assert not heard or "the runner is gone" in errors
