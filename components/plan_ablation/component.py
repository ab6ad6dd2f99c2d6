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
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned", [("variants", list)]
):
    """Turn the grid of an ablation into variants.

    Args:
        pinned: What resolve_data pinned for this step.
        ablate_grid: One path=[value, value, ...] a line.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.plan_ablation import STEP

    result = run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        pinned=pinned,
        ablate_grid=ablate_grid,
    )
    return (result.values["variants"],)
