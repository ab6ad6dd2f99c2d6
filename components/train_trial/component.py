"""Train and score one variant of a recipe."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_trial(
    variant: str,
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    trial: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
    encoder_checkpoints: dsl.Input[list[dsl.Model]] = None,
) -> None:
    """Train and score one variant of a recipe.

    Args:
        variant: Text of a variant; empty: nothing to do.
        pinned: What resolve_data pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        trial: trial.json and items.parquet.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
        encoder_checkpoints: Prealigned encoders, or markers; without them the variant prealigns its own.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.search.variant import parse_variant
    from manyeyes.steps.train_trial import STEPS

    run_step(
        STEPS["trial" if variant else "nothing"],
        metrics=metrics,
        report=report,
        notes=notes,
        label=parse_variant(variant).key if variant else "",
        outputs={"trial": trial},
        variant=variant,
        pinned=pinned,
        validation=Path(validation.path),
        encoder_checkpoints=[Path(artifact.path) for artifact in encoder_checkpoints or ()],
    )
