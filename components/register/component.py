"""Decide whether the model may be promoted, register it with its evidence, and promote it when the gate says so."""

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
    gate: dsl.Output[dsl.Artifact],
    gate_report: dsl.Output[dsl.HTML],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Registered", [("name", str), ("version", str), ("aliases", list), ("verdict", str)]
):
    """Decide whether the model may be promoted, register it with its evidence, and promote it when the gate says so.

    Two steps in one pod: nothing is ever between them, and neither is ever cached.

    Args:
        registry_model: Name in the registry.
        pinned: What preflight pinned for this step.
        validation: Verdict on the snapshot.
        scorecard: Torch's scores.
        bundle_scorecard: The bundle's scores.
        parity: How the bundle's answers differ from torch's.
        bundle: The bundle.
        gate: The gate's decision.
        gate_report: The gate's page, for people.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    # A further attempt in this pod does not judge anew: aliases may have moved.
    run_component("gate", locals(), report="gate_report", once=True)
    return run_component("register", locals(), register)
