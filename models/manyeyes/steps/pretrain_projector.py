"""Puts the encoders together and trains the projector alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import is_absent, mark_absent
from manyeyes.harness.stage import HEAVY, train_stage
from manyeyes.recipe import parse_recipe


def pretrain_projector(
    reporter: Reporter,
    *,
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,
    validation: Path,
    encoder_checkpoints: Sequence[Path],
    checkpoint: Path,
) -> StepResult:
    """Run the ``pretrain`` stage.

    Args:
        reporter: Shows the progress.
        recipe_json: From ``resolve_data``.
        recipe_digest: From ``resolve_data``.
        data_md5: From ``resolve_data``.
        data_remote: From ``resolve_data``.
        code_digest: From ``resolve_data``.
        validation: Folder of ``validate_data``.
        encoder_checkpoints: Folders of ``prealign_encoder``, in the order of the recipe's encoders.
        checkpoint: Folder to write; only a marker when the recipe has no such stage.
    """
    recipe = parse_recipe(recipe_json)
    if recipe.stages.pretrain is None:
        mark_absent(checkpoint, "the recipe has no pretrain stage")
        return StepResult("not in this recipe", markdown="This recipe has no pretrain stage.\n")
    return train_stage(
        reporter,
        "pretrain",
        recipe_json=recipe_json,
        recipe_digest=recipe_digest,
        data_md5=data_md5,
        data_remote=data_remote,
        code_digest=code_digest,
        validation=validation,
        out=checkpoint,
        encoder_checkpoints=by_encoder(recipe.prealigned_encoders(), encoder_checkpoints),
    )


def by_encoder(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Path]:
    """Folders of ``prealign_encoder`` by encoder name; without those that hold a marker only."""
    present = [folder for folder in folders if not is_absent(folder)]
    return dict(zip(names, present, strict=True))


STEP = Step("pretrain_projector", pretrain_projector, imports=HEAVY, outputs=("checkpoint",))
