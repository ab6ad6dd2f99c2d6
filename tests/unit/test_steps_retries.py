"""A step that fails with what may be gone by the next time starts itself anew, in its own pod."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyeyes.harness.events import ErrorReport, find_error_line

# Counts its attempts in a file and fails in the first ones; leaves half of its output behind each time.
STEP = """
import sys
from pathlib import Path
from manyeyes.errors import RegistryUnreachableError, SnapshotError
from manyeyes.harness.base import LocalArtifact, Step, StepResult, run_step

def function(reporter, *, folder):
    count = len(Path("attempts").read_text().split()) if Path("attempts").exists() else 0
    with Path("attempts").open("a") as file:
        file.write(f"{count}\\n")
    assert not folder.exists(), "an output of the attempt before"
    folder.mkdir()
    (folder / "half").touch()
    if count < int(sys.argv[1]):
        raise {
            "away": RegistryUnreachableError("MLflow is away", "it", "Start it.", retry=True),
            "wrong": SnapshotError("a file is damaged", "another", "Push it again."),
            "defect": ZeroDivisionError("a defect"),
        }[sys.argv[2]]
    return StepResult(headline="done")

step = Step("sft", function, outputs=("folder",), tracked=False)
run_step(step, report=LocalArtifact("report"), outputs={"folder": LocalArtifact("out")})
"""


def run(folder: Path, failures: int, kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STEP, str(failures), kind]
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("MANYEYES", "KFP"))}
    return subprocess.run(
        command, cwd=folder, env=cleared | environment, capture_output=True, text=True, timeout=120, check=False
    )


def attempts(folder: Path) -> int:
    return len((folder / "attempts").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("kind", ["away", "defect"])
def test_a_further_attempt_succeeds_and_leaves_no_error(tmp_path: Path, kind: str) -> None:
    done = run(tmp_path, 2, kind, MANYEYES_RETRIES="0,0")
    assert done.returncode == 0, done.stderr
    assert attempts(tmp_path) == 3
    assert "attempt 3 of 3 in 0 s" in done.stderr
    assert not (tmp_path / "error.json").exists()
    assert find_error_line(done.stderr) is None


@pytest.mark.parametrize(
    ("kind", "environment", "expected"),
    [
        ("away", {"MANYEYES_RETRIES": "0,0"}, 3),
        ("away", {"MANYEYES_RETRIES": "0"}, 2),
        ("away", {}, 1),
        ("wrong", {"MANYEYES_RETRIES": "0,0"}, 1),
        # The controller retries pods: the second one makes one attempt alone.
        ("away", {"MANYEYES_RETRIES": "0,0", "KFP_RETRY_INDEX": "1"}, 1),
        ("away", {"MANYEYES_RETRIES": "0,0", "KFP_RETRY_INDEX": "0"}, 3),
        ("away", {"MANYEYES_RETRIES": "0,0", "KFP_RETRY_INDEX": ""}, 3),
    ],
)
def test_the_last_attempt_fails_with_its_reason(
    tmp_path: Path, kind: str, environment: dict[str, str], expected: int
) -> None:
    done = run(tmp_path, 9, kind, **environment)
    assert done.returncode == 2
    assert attempts(tmp_path) == expected
    record = ErrorReport.model_validate_json((tmp_path / "error.json").read_text(encoding="utf-8"))
    assert record.retry == (kind == "away")
