"""Put the encoders together and train the projector alone."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain_projector(
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    encoder_checkpoints: dsl.Input[list[dsl.Model]],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Put the encoders together and train the projector alone.

    Args:
        pinned: What resolve_data pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        encoder_checkpoints: Prealigned encoders, in the recipe's order.
        checkpoint: The model.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.pretrain_projector import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"checkpoint": checkpoint},
        pinned=pinned,
        validation=Path(validation.path),
        encoder_checkpoints=[Path(artifact.path) for artifact in encoder_checkpoints],
    )
