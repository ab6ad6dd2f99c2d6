"""Train one encoder, with a projector of its own, against the frozen language model."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prealign_encoder(
    encoder: str,
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    encoder_checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Train one encoder, with a projector of its own, against the frozen language model.

    Args:
        encoder: Its name in the recipe; empty: the recipe has no such stage.
        pinned: What resolve_data pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        encoder_checkpoint: The encoder; its projector is dropped.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.prealign_encoder import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        label=encoder,
        outputs={"encoder_checkpoint": encoder_checkpoint},
        encoder=encoder,
        pinned=pinned,
        validation=Path(validation.path),
    )
