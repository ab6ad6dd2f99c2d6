"""Puts the encoders together and trains the projector alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import is_absent, mark_absent, parse_pinned
from manyeyes.harness.stage import HEAVY, train_stage


def pretrain_projector(
    reporter: Reporter,
    *,
    pinned: str,
    validation: Path,
    encoder_checkpoints: Sequence[Path],
    checkpoint: Path,
) -> StepResult:
    """Run the ``pretrain`` stage.

    Args:
        reporter: Shows the progress.
        pinned: From ``preflight``.
        validation: Folder of ``validate_data``.
        encoder_checkpoints: Folders of ``prealign_encoder``, in the order of the recipe's encoders.
        checkpoint: Folder to write; only a marker when the recipe has no such stage.
    """
    recipe = parse_pinned(pinned).recipe
    if recipe.stages.pretrain is None:
        mark_absent(checkpoint, "the recipe has no pretrain stage")
        return StepResult("not in this recipe", markdown="This recipe has no pretrain stage.\n")
    return train_stage(
        reporter,
        "pretrain",
        pinned=pinned,
        validation=validation,
        out=checkpoint,
        encoder_checkpoints=by_encoder(recipe.prealigned_encoders(), encoder_checkpoints),
    )


def by_encoder(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Path]:
    """Folders of ``prealign_encoder`` by encoder name; without those that hold a marker only."""
    present = [folder for folder in folders if not is_absent(folder)]
    return dict(zip(names, present, strict=True))


STEP = Step("pretrain_projector", pretrain_projector, imports=HEAVY, outputs=("checkpoint",))
