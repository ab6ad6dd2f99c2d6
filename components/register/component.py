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
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
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
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.register import STEP

    result = run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        registry_model=registry_model,
        pinned=pinned,
        validation=Path(validation.path),
        scorecard=Path(scorecard.path),
        bundle_scorecard=Path(bundle_scorecard.path),
        parity=Path(parity.path),
        bundle=Path(bundle.path),
        gate=Path(gate.path),
    )
    return tuple(result.values[name] for name in ("name", "version", "aliases", "verdict"))
