"""Put the trials of an ablation side by side."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_trials(
    variants: list,
    pinned: str,
    trials: dsl.Input[list[dsl.Artifact]],
    comparison: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Put the trials of an ablation side by side.

    Args:
        variants: From plan_ablation; the first is what the others are compared with.
        pinned: What resolve_data pinned for this step.
        trials: One of every variant.
        comparison: comparison.json and every trial.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.compare_trials import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"comparison": comparison},
        pinned=pinned,
        variants=[str(text) for text in variants],
        trials=[Path(artifact.path) for artifact in trials],
    )
