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
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Started", [("candidates", list)]
):
    """Check what a search is asked for and name the start set.

    Args:
        pinned: What preflight pinned for this step.
        search_start: Names of the start set, separated by commas; empty: the recipe's first encoder.
        search_rounds: Rounds at most.
        search_min_gain: Points that a round must gain.
        search: search.json.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("start_search", locals(), start_search)
