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
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,
    validation: Path,
    encoder_checkpoint: Path,
) -> StepResult:
    """Run the ``prealign`` stage for one encoder.

    Args:
        reporter: Shows the progress.
        encoder: Its name in the recipe; empty for a recipe without that stage, which leaves a marker.
        recipe_json: From ``resolve_data``.
        recipe_digest: From ``resolve_data``.
        data_md5: From ``resolve_data``.
        data_remote: From ``resolve_data``.
        code_digest: From ``resolve_data``.
        validation: Folder of ``validate_data``.
        encoder_checkpoint: Folder to write: ``encoder.safetensors`` and ``encoder.json``.
    """
    if not encoder:
        mark_absent(encoder_checkpoint, "the recipe has no prealign stage")
        return StepResult("not in this recipe", markdown="This recipe has no prealign stage.\n")
    result = train_stage(
        reporter,
        "prealign",
        recipe_json=recipe_json,
        recipe_digest=recipe_digest,
        data_md5=data_md5,
        data_remote=data_remote,
        code_digest=code_digest,
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
