"""Trains one encoder, with a projector of its own, against the frozen language model; keeps the encoder."""

from __future__ import annotations

from pathlib import Path

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import mark_absent
from manyeyes.harness.stage import HEAVY, train_stage


def prealign_encoder(
    reporter: Reporter,
    *,
    encoder: str,
    pinned: str,
    validation: Path,
    encoder_checkpoint: Path,
) -> StepResult:
    """Run the ``prealign`` stage for one encoder.

    Args:
        reporter: Shows the progress.
        encoder: Its name in the recipe; empty for a recipe without that stage, which leaves a marker.
        pinned: From ``preflight``.
        validation: Folder of ``validate_data``.
        encoder_checkpoint: Folder to write: ``encoder.safetensors`` and ``encoder.json``.
    """
    if not encoder:
        mark_absent(encoder_checkpoint, "the recipe has no prealign stage")
        return StepResult("not in this recipe", markdown="This recipe has no prealign stage.\n")
    result = train_stage(
        reporter,
        "prealign",
        pinned=pinned,
        validation=validation,
        out=encoder_checkpoint,
        encoder=encoder,
    )
    return StepResult(
        headline=result.headline,
        metrics=result.metrics,
        html=result.html,
        markdown=result.markdown,
        metadata={**result.metadata, "encoder": encoder},
    )


STEP = Step("prealign_encoder", prealign_encoder, imports=HEAVY, outputs=("encoder_checkpoint",))
