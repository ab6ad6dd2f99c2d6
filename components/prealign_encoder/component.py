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
    report: dsl.Output[dsl.HTML],
) -> None:
    """Train one encoder, with a projector of its own, against the frozen language model.

    Args:
        encoder: Its name in the recipe; empty: the recipe has no such stage.
        pinned: What preflight pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        encoder_checkpoint: The encoder; its projector is dropped.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("prealign_encoder", locals(), label=encoder)
