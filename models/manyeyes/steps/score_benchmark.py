"""Scores a model on one benchmark, so that benchmarks run side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import parse_pinned
from manyeyes.steps.evaluate import STEPS as EVALUATE_STEPS
from manyeyes.steps.evaluate import evaluate
from manyeyes.steps.plan_evaluation import ask_benchmarks


def score_benchmark(
    reporter: Reporter,
    *,
    benchmark: str,
    kind: Literal["torch", "bundle"],
    model: Path,
    pinned: str,
    scorecard: Path,
) -> StepResult:
    """Write ``scorecard.json``, ``items.parquet``, ``report.html`` and ``report.md`` of one benchmark.

    Args:
        reporter: Shows the progress.
        benchmark: A row of BENCHMARKS.
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        model: Its folder.
        pinned: From ``plan_evaluation``.
        scorecard: Folder to write.
    """
    inputs = parse_pinned(pinned)
    inputs = replace(inputs, recipe=ask_benchmarks(inputs.recipe, [benchmark]))
    return evaluate(
        reporter,
        kind=kind,
        model=model,
        pinned=inputs.of("evaluate").text(),
        scorecard=scorecard,
    )


STEPS: dict[str, Step] = {
    kind: Step("score_benchmark", score_benchmark, imports=step.imports, outputs=step.outputs)
    for kind, step in EVALUATE_STEPS.items()
}
