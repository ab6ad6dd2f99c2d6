"""Check what a search is asked for and name the start set."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def start_search(
    pinned: str,
    search_start: str,
    search_rounds: int,
    search_min_gain: float,
    search: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Started", [("candidates", list)]
):
    """Check what a search is asked for and name the start set.

    Args:
        pinned: What resolve_data pinned for this step.
        search_start: Names of the start set, separated by commas; empty: the recipe's first encoder.
        search_rounds: Rounds at most.
        search_min_gain: Points that a round must gain.
        search: search.json.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.start_search import STEP

    result = run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"search": search},
        pinned=pinned,
        search_start=search_start,
        search_rounds=int(search_rounds),
        search_min_gain=search_min_gain,
    )
    return (result.values["candidates"],)
