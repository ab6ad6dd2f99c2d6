"""Decide whether the model may be promoted."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    registry_model: str,
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    scorecard: dsl.Input[dsl.Artifact],
    bundle_scorecard: dsl.Input[dsl.Artifact],
    parity: dsl.Input[dsl.Artifact],
    gate: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Decide whether the model may be promoted.

    Args:
        registry_model: Name in the registry.
        pinned: What resolve_data pinned for this step.
        validation: Verdict on the snapshot.
        scorecard: Torch's scores.
        bundle_scorecard: The bundle's scores.
        parity: How the bundle's answers differ from torch's.
        gate: gate.json.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("gate", locals())
