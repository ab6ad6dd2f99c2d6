"""Register the model with its evidence; promote it when the gate says so."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    registry_model: str,
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    scorecard: dsl.Input[dsl.Artifact],
    bundle_scorecard: dsl.Input[dsl.Artifact],
    parity: dsl.Input[dsl.Artifact],
    bundle: dsl.Input[dsl.Model],
    gate: dsl.Input[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Registered", [("name", str), ("version", str), ("aliases", list), ("verdict", str)]
):
    """Register the model with its evidence; promote it when the gate says so.

    Args:
        registry_model: Name in the registry.
        pinned: What resolve_data pinned for this step.
        validation: Verdict on the snapshot.
        scorecard: Torch's scores.
        bundle_scorecard: The bundle's scores.
        parity: How the bundle's answers differ from torch's.
        bundle: The bundle.
        gate: The gate's decision.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("register", locals())
