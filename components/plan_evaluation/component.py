"""Find the model to score and the benchmarks to ask."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_evaluation(
    evaluate_model: str,
    evaluate_benchmarks: str,
    pinned: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned",
    [
        ("fetch_model", str),
        ("score_benchmark", str),
        ("merge_scorecards", str),
        ("benchmarks", list),
        ("kind", str),
        ("model", str),
        ("model_digest", str),
        ("champion", str),
    ],
):
    """Find the model to score and the benchmarks to ask.

    Args:
        evaluate_model: A folder, s3://, or NAME, NAME@ALIAS, NAME/VERSION in the registry.
        evaluate_benchmarks: Names; empty: the recipe's own.
        pinned: What resolve_data pinned for this step.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.plan_evaluation import STEP

    result = run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        evaluate_model=evaluate_model,
        evaluate_benchmarks=evaluate_benchmarks,
        pinned=pinned,
    )
    return tuple(result.values.values())
