"""Score a model on one benchmark, with the image and without."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def score_benchmark(
    benchmark: str,
    kind: str,
    model: dsl.Input[dsl.Model],
    pinned: str,
    scorecard: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Score a model on one benchmark, with the image and without.

    Args:
        benchmark: A row of BENCHMARKS.
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: Checkpoint or bundle.
        pinned: What plan_evaluation pinned for this step.
        scorecard: scorecard.json, items.parquet and the report.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.score_benchmark import STEPS

    run_step(
        STEPS[kind],
        metrics=metrics,
        report=report,
        notes=notes,
        label=benchmark,
        outputs={"scorecard": scorecard},
        benchmark=benchmark,
        kind=kind,
        model=Path(model.path),
        pinned=pinned,
    )
