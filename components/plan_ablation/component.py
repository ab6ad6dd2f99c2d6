"""Turn the grid of an ablation into variants."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_ablation(
    recipe_json: str,
    code_digest: str,  # noqa: ARG001  (part of the cache key)
    ablate_grid: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned", [("variants", list)]
):
    """Turn the grid of an ablation into variants.

    Args:
        recipe_json: Recipe with every default filled in.
        code_digest: Digest of the image or of the library's source.
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
        recipe_json=recipe_json,
        ablate_grid=ablate_grid,
    )
    return (result.values["variants"],)
