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
    report: dsl.Output[dsl.HTML],
) -> None:
    """Score a model on one benchmark, with the image and without.

    Args:
        benchmark: A row of BENCHMARKS.
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: Checkpoint or bundle.
        pinned: What plan_evaluation pinned for this step.
        scorecard: scorecard.json, items.parquet and the report.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("score_benchmark", locals(), label=benchmark, kind=kind)
