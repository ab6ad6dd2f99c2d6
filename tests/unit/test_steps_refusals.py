from __future__ import annotations

import os
from pathlib import Path

import pytest

from manyeyes.errors import DataError, RegistryUnreachableError
from manyeyes.harness.base import LocalArtifact, Reporter, Step, StepResult, run_step
from manyeyes.harness.events import ErrorReport, error_line, find_error_line

ADDRESS = "s3://bucket/train/run-1/sft/5f1c/metrics"


class Artifact(LocalArtifact):
    """As Kubeflow's: with the address in the object store, which all attempts at a task share."""

    def __init__(self, path: Path, uri: str) -> None:
        super().__init__(str(path))
        self.uri = uri


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def _cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANYEYES_WORKDIR", str(tmp_path / "work"))
    monkeypatch.setenv("MANYEYES_RETRIES", "0")
    monkeypatch.setenv("KFP_RETRY_INDEX", "0")
    monkeypatch.delenv("MANYEYES_RUN_DIR", raising=False)
    monkeypatch.delenv("MANYEYES_RUN_LOCK", raising=False)


def attempt(
    calls: list[str], folder: Path, *, error: Exception | None, address: str = ADDRESS, by_hand: bool = False
) -> int:
    """One pod: its exit code. The controller makes the second and further ones, unless somebody retries by hand."""
    os.environ["KFP_RETRY_INDEX"] = "0" if by_hand else str(len(calls))

    def work(_report: Reporter) -> StepResult:
        calls.append("worked")
        if error is not None:
            raise error
        return StepResult(headline="done")

    artifacts = {name: Artifact(folder / name, address) for name in ("metrics", "report", "notes")}
    try:
        run_step(Step("sft", work, tracked=False), **artifacts)  # type: ignore[arg-type]
    except SystemExit as end:
        return int(end.code or 0)
    except RuntimeError:
        return 1
    return 0


BAD = DataError("nine bad rows", "good rows", "Fix them.")


@pytest.mark.usefixtures("_cluster")
def test_second_attempt_after_a_users_error_ends_at_once_with_the_same_error(
    tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(calls, tmp_path / "1", error=BAD) == 2
    first = find_error_line(capsys.readouterr().err)
    assert attempt(calls, tmp_path / "2", error=None) == 2
    assert calls == ["worked"]
    second = find_error_line(capsys.readouterr().err)
    assert first == second
    assert ErrorReport.model_validate_json((tmp_path / "2" / "error.json").read_text(encoding="utf-8")) == first
    assert "nine bad rows" in (tmp_path / "2" / "notes").read_text(encoding="utf-8")


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize("error", [RuntimeError("bug"), RegistryUnreachableError("no answer", "one", "Wait.")])
def test_what_may_go_well_the_second_time_is_tried_again(tmp_path: Path, calls: list[str], error: Exception) -> None:
    calls.append("before")  # the first pod tries again by itself: test_steps_retries.py
    assert attempt(calls, tmp_path / "1", error=error) in (1, 2)
    assert attempt(calls, tmp_path / "2", error=None) == 0
    assert calls == ["before", "worked", "worked"]


@pytest.mark.usefixtures("_cluster")
def test_another_task_and_a_later_retry_by_hand_are_not_touched(tmp_path: Path, calls: list[str]) -> None:
    assert attempt(calls, tmp_path / "1", error=BAD) == 2
    assert attempt(calls, tmp_path / "2", error=None, address="s3://bucket/train/run-2/sft/77aa/metrics") == 0
    (note,) = (tmp_path / "work" / "refusals").iterdir()
    assert attempt(calls, tmp_path / "3", error=None, by_hand=True) == 0
    assert not note.exists()


@pytest.mark.parametrize("missing", ["MANYEYES_WORKDIR", "MANYEYES_RETRIES"])
@pytest.mark.usefixtures("_cluster")
def test_without_retries_or_a_volume_nothing_is_remembered(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    assert attempt(calls, tmp_path / "1", error=BAD) == 2
    assert attempt(calls, tmp_path / "2", error=None) == 0


def test_last_error_line_of_a_log_counts_and_half_a_line_does_not() -> None:
    report = ErrorReport(step="a", error="E", found="f", needed="n", do="d", retry=False, user_error=True)
    other = report.model_copy(update={"step": "b"})
    log = f"noise\n{error_line(report)}prefix {error_line(other)}manyeyes-error: {{half\n"
    assert find_error_line(log) == other
    assert find_error_line("noise\n") is None
