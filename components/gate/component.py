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
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
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
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.gate import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"gate": gate},
        registry_model=registry_model,
        pinned=pinned,
        validation=Path(validation.path),
        scorecard=Path(scorecard.path),
        bundle_scorecard=Path(bundle_scorecard.path),
        parity=Path(parity.path),
    )
