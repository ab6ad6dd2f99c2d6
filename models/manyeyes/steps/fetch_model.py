"""Puts the model that is to be scored where the next steps find it; the same model comes from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.pages import facts_table, step_page
from manyeyes.registry.pull import ModelLocation
from manyeyes.registry.pull import fetch_model as fetch


def fetch_model(
    reporter: Reporter,
    *,
    kind: Literal["torch", "bundle"],
    model: str,
    model_digest: str,
    fetched: Path,
) -> StepResult:
    """Copy a model's files and check each of them.

    Args:
        reporter: Shows the progress.
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        model: From ``plan_evaluation``: a folder, ``s3://`` or ``models:/NAME/VERSION``.
        model_digest: From ``plan_evaluation``.
        fetched: Folder to write.

    Raises:
        CheckpointError: A file is missing or was changed.
        BundleError: The same of a bundle.
        RegistryError: The registry has lost it.
    """
    reporter.progress(f"fetching {model}", done=0.1)
    fetch(ModelLocation(kind, model, model_digest), fetched)
    size = sum(path.stat().st_size for path in fetched.rglob("*") if path.is_file())
    rows: list[tuple[str, object]] = [("model", model), ("kind", kind), ("digest", model_digest), ("bytes", size)]
    return StepResult(
        headline=f"{size / 1e6:,.1f} MB from {model}",
        metrics={"bytes": float(size)},
        html=step_page("Model", "Fetched, and every file checked against its manifest.", {"": facts_table(rows)}),
        markdown=facts_table(rows).markdown() + "\n",
        metadata={"model": model, "kind": kind, "model_digest": model_digest},
    )


# A bundle is checked without torch, whose import takes seconds.
STEPS: dict[str, Step] = {
    "torch": Step("fetch_model", fetch_model, imports=("torch", "manyeyes.model"), outputs=("fetched",), tracked=False),
    "bundle": Step("fetch_model", fetch_model, outputs=("fetched",), tracked=False),
}
