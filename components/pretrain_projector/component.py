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
    report: dsl.Output[dsl.HTML],
) -> None:
    """Put the encoders together and train the projector alone.

    Args:
        pinned: What preflight pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        encoder_checkpoints: Prealigned encoders, in the recipe's order.
        checkpoint: The model.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("pretrain_projector", locals())
