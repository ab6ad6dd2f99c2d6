"""Put the trials of an ablation side by side."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_trials(
    ablate_grid: str,
    pinned: str,
    trials: dsl.Input[list[dsl.Artifact]],
    comparison: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Put the trials of an ablation side by side.

    Args:
        ablate_grid: As plan_ablation took it; its first variant is what the others are compared with.
        pinned: What preflight pinned for this step.
        trials: One of every variant.
        comparison: comparison.json and every trial.
        metrics: Scalars.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("compare_trials", locals())
