"""Trains the whole model on conversations."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from manyeyes.errors import RecipeError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import is_absent, parse_pinned
from manyeyes.harness.stage import HEAVY, train_stage
from manyeyes.steps.pretrain_projector import by_encoder
from manyeyes.storage import link_or_copy


def sft(
    reporter: Reporter,
    *,
    pinned: str,
    validation: Path,
    encoder_checkpoints: Sequence[Path],
    pretrained: Path,
    checkpoint: Path,
) -> StepResult:
    """Run the ``sft`` stage.

    Args:
        reporter: Shows the progress.
        pinned: From ``preflight``.
        validation: Folder of ``validate_data``.
        encoder_checkpoints: Folders of ``prealign_encoder``; used when the recipe has no pretrain stage.
        pretrained: Checkpoint of ``pretrain_projector``, or its marker.
        checkpoint: Folder to write; a copy of ``pretrained`` when the recipe has no sft stage.

    Raises:
        RecipeError: Neither pretrain nor sft: there is no model to judge.
    """
    recipe = parse_pinned(pinned).recipe
    absent = is_absent(pretrained)
    if recipe.stages.sft is None:
        if absent:
            raise RecipeError(
                "the recipe has neither pretrain nor sft", "a stage that makes a model", "Add stages.sft."
            )
        shutil.copytree(pretrained, checkpoint, copy_function=link_or_copy, dirs_exist_ok=True)
        return StepResult("not in this recipe", markdown="This recipe has no sft stage; pretrain's model is kept.\n")
    return train_stage(
        reporter,
        "sft",
        pinned=pinned,
        validation=validation,
        out=checkpoint,
        encoder_checkpoints=by_encoder(recipe.prealigned_encoders(), encoder_checkpoints) if absent else {},
        checkpoint=None if absent else pretrained,
    )


STEP = Step("sft", sft, imports=HEAVY, outputs=("checkpoint",))
