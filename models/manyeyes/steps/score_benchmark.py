"""Scores a model on one benchmark, so that benchmarks run side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.recipe import parse_recipe
from manyeyes.steps.evaluate import STEPS as EVALUATE_STEPS
from manyeyes.steps.evaluate import evaluate
from manyeyes.steps.plan_evaluation import ask_benchmarks


def score_benchmark(
    reporter: Reporter,
    *,
    benchmark: str,
    kind: Literal["torch", "bundle"],
    model: Path,
    recipe_json: str,
    recipe_digest: str,  # noqa: ARG001  (part of the cache key)
    data_md5: str,
    data_remote: str,
    code_digest: str,
    scorecard: Path,
) -> StepResult:
    """Write ``scorecard.json``, ``items.parquet``, ``report.html`` and ``report.md`` of one benchmark.

    Args:
        reporter: Shows the progress.
        benchmark: A row of BENCHMARKS.
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        model: Its folder.
        recipe_json: From ``plan_evaluation``.
        recipe_digest: From ``plan_evaluation``.
        data_md5: From ``resolve_data``.
        data_remote: From ``resolve_data``.
        code_digest: From ``resolve_data``.
        scorecard: Folder to write.
    """
    recipe = ask_benchmarks(parse_recipe(recipe_json), [benchmark])
    return evaluate(
        reporter,
        kind=kind,
        model=model,
        recipe_json=recipe.canonical_json(),
        recipe_digest=recipe.digest,
        data_md5=data_md5,
        data_remote=data_remote,
        code_digest=code_digest,
        scorecard=scorecard,
    )


STEPS: dict[str, Step] = {
    kind: Step("score_benchmark", score_benchmark, imports=step.imports, outputs=step.outputs)
    for kind, step in EVALUATE_STEPS.items()
}
