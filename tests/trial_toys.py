"""Trials whose models answer by rule: real scorecards and answers, no training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.benchmarks.easy_vqa import EASY_VQA
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.search.trial import ITEMS_FILE, TRIAL_FILE, Trial, TrialStage, mean_score
from manyeyes.search.variant import Variant
from tests.evaluation_fakes import RuleAnswerer, make_recipe, rule_with_errors

IMAGES = 24
SECOND = "easy-vqa-again"


def add_second_benchmark(patch: pytest.MonkeyPatch) -> None:
    """easy-VQA under another name, so that there are two benchmarks."""
    patch.setitem(BENCHMARKS, SECOND, replace(EASY_VQA, name=SECOND, title="easy-VQA again", scorer="another scorer"))


def make_trial(
    folder: Path,
    snapshot: Snapshot,
    variant: Variant,
    *,
    wrong: Sequence[int],
    benchmarks: Sequence[str] = ("easy-vqa",),
    parameters: int = 1_234_567,
    seconds: float = 61.5,
) -> Path:
    """A folder as ``train_trial`` leaves it; the model answers nonsense about the images ``wrong``."""
    recipe = make_recipe(evaluation__benchmarks=list(benchmarks))
    card = evaluate(
        RuleAnswerer(rule_with_errors(IMAGES, wrong)),
        recipe,
        snapshot=snapshot,
        out_dir=folder / "scores",
        code_digest="c" * 64,
        model_digest="k" * 64,
    )
    mean, ci95 = mean_score(card)
    names = variant.encoders or tuple(encoder.name for encoder in recipe.model.encoders)
    trial = Trial(
        variant=variant,
        recipe=recipe.canonical_json(),
        recipe_digest=recipe.digest,
        encoders=names,
        stages=(TrialStage(stage="sft", encoder=None, seconds=seconds, final_loss=0.25, checkpoint_digest="k" * 64),),
        scorecard=card,
        mean=mean,
        mean_ci95=ci95,
        parameters=parameters * len(names),
        visual_tokens=16,
        flops_per_sample={"sft": 3.2e9 * len(names)},
        train_seconds=seconds,
        evaluate_seconds=4.2,
    )
    shutil.copyfile(folder / "scores" / "items.parquet", folder / ITEMS_FILE)
    (folder / TRIAL_FILE).write_text(trial.model_dump_json(indent=2), encoding="utf-8")
    return folder
