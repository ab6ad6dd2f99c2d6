"""Train and score variants of a recipe, one after another."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_trial(
    variants: str,
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    trial: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    encoder_checkpoints: dsl.Input[list[dsl.Model]] = None,
) -> None:
    """Train and score variants of a recipe, one after another.

    Args:
        variants: Texts of variants, one a line.
        pinned: What preflight pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        trial: trial.json and items.parquet, of several variants in a folder each.
        report: For people.
        encoder_checkpoints: Prealigned encoders, or markers; without them a variant prealigns its own.
    """
    from manyeyes.kubeflow.component import run_component
    from manyeyes.search.variant import batch_key

    run_component("train_trial", locals(), label=batch_key(variants))
