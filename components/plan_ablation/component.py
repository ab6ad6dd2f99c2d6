"""Turn the grid of an ablation into variants."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_ablation(
    pinned: str,
    ablate_grid: str,
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned", [("batches", list)]
):
    """Turn the grid of an ablation into variants.

    Args:
        pinned: What preflight pinned for this step.
        ablate_grid: One path=[value, value, ...] a line.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("plan_ablation", locals(), plan_ablation)
