"""What a step leaves on its MLflow run, as tags, for the run's summary."""

from __future__ import annotations

import os
from collections.abc import Mapping

from manyeyes.harness.events import ErrorReport

FIGURE_TAG, ERROR_TAG = "manyeyes.figure", "manyeyes.error"

# MLflow takes so many in a tag.
_CHARACTERS = 5000


def pipeline_tags() -> dict[str, str]:
    """What marks a step's run as one of this pipeline run, where no parent run does.

    ``MANYEYES_PIPELINE_RUN`` is the pipeline run's id; on a cluster it comes from the pod's label.
    """
    run = os.environ.get("MANYEYES_PIPELINE_RUN")
    return {"manyeyes.pipeline_run": run} if run else {}


def result_tags(figure: str, metadata: Mapping[str, str | int | float]) -> dict[str, str]:
    """The figure that matters, and each digest and location, as ``manyeyes.<name>``."""
    facts = {f"manyeyes.{name}": _cut(str(value), _CHARACTERS) for name, value in metadata.items()}
    return {FIGURE_TAG: _cut(figure, _CHARACTERS), **facts}


def error_as_tag(record: ErrorReport) -> str:
    """``error.json`` as a tag can hold it: long texts are cut, and then the single problems are left out."""
    text = record.model_dump_json()
    if len(text) <= _CHARACTERS:
        return text
    short = {name: _cut(getattr(record, name), _CHARACTERS // 8) for name in ("found", "needed", "do")}
    text = record.model_copy(update={**short, "problems": ()}).model_dump_json()
    return text if len(text) <= _CHARACTERS else ""


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
