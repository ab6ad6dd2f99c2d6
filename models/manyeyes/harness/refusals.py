"""Retries for failures that are not the user's: a step remembers what only the user can mend.

Kubeflow 2.17 retries a failed task whatever its exit code was: ``retryPolicy`` has a count and pauses
(backend/src/v2/compiler/argocompiler of kubeflow/pipelines), and its launcher turns every exit code into 1. So a step
that fails with an error that the user must mend leaves a note beside the running checkpoints, and a further attempt at
the same task ends at once with the same error, before anything is imported or fetched. Attempts at one task share the
addresses of its outputs, which nothing else has.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from manyeyes.harness.events import ErrorReport

# Seconds that a note counts; a profile with retries sets it. A run that somebody retries by hand later starts afresh.
WINDOW = "MANYEYES_RETRY_WINDOW_S"


def remember_refusal(address: str, report: ErrorReport) -> None:
    """Leave a note for further attempts at the task whose output has this address; do nothing where none will come."""
    note = _note(address)
    if note is None or not report.user_error or report.retry:
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_name(f".{note.name}.{os.getpid()}.tmp")
    temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(note)


def earlier_refusal(address: str) -> ErrorReport | None:
    """What an earlier attempt at the same task failed with, when only the user can mend that."""
    note = _note(address)
    if note is None or not note.is_file():
        return None
    if time.time() - note.stat().st_mtime > float(os.environ[WINDOW]):
        note.unlink(missing_ok=True)
        return None
    return ErrorReport.model_validate_json(note.read_text(encoding="utf-8"))


def _note(address: str) -> Path | None:
    workdir = os.environ.get("MANYEYES_WORKDIR")
    if not address or not workdir or not os.environ.get(WINDOW):
        return None
    return Path(workdir) / "refusals" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"
