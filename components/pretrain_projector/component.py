"""Put the encoders together and train the projector alone."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain_projector(
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,
    validation: dsl.Input[dsl.Dataset],
    encoder_checkpoints: dsl.Input[list[dsl.Model]],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Put the encoders together and train the projector alone.

    Args:
        recipe_json: Recipe with every default filled in.
        recipe_digest: Its sha256.
        data_md5: Snapshot.
        data_remote: A folder or s3:// that holds it.
        code_digest: Digest of the image or of the library's source.
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
        recipe_json=recipe_json,
        recipe_digest=recipe_digest,
        data_md5=data_md5,
        data_remote=data_remote,
        code_digest=code_digest,
        validation=Path(validation.path),
        encoder_checkpoints=[Path(artifact.path) for artifact in encoder_checkpoints],
    )
