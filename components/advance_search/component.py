"""Close one round of a search: who won, whether to go on, and with which sets."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def advance_search(
    round_number: int,
    pinned: str,
    before: dsl.Input[dsl.Artifact],
    trials: dsl.Input[list[dsl.Artifact]],
    search: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Advanced", [("goes_on", str), ("candidates", list), ("encoders", list)]
):
    """Close one round of a search: who won, whether to go on, and with which sets.

    Args:
        round_number: 0 for the start set's.
        pinned: What preflight pinned for this step.
        before: The search before this round.
        trials: This round's trials.
        search: search.json and the trials so far.
        metrics: Scalars.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("advance_search", locals(), advance_search, label=f"round {int(round_number)}")
