"""Score a model on the recipe's benchmarks, with the image and without."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    kind: str,
    model: dsl.Input[dsl.Artifact],
    pinned: str,
    scorecard: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    other_scorecard: dsl.Input[dsl.Artifact] = None,
    registry_model: str = "",
) -> None:
    """Score a model on the recipe's benchmarks, with the image and without.

    Args:
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: Checkpoint or bundle.
        pinned: What preflight pinned for this step.
        scorecard: scorecard.json, items.parquet and the report.
        metrics: Scalars.
        report: For people.
        other_scorecard: Another scorecard of the same model, to show the difference.
        registry_model: Name in the registry whose champion the report compares with; empty: none.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("evaluate", locals(), label=kind, kind=kind)
