"""Turn the draws of a balance into variants."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_balance(
    pinned: str,
    validation: dsl.Input[dsl.Dataset],
    balance_draws: str,
    balance_stage: str,
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned", [("grid", str), ("batches", list)]
):
    """Turn the draws of a balance into variants.

    Args:
        pinned: What preflight pinned for train_trial.
        validation: Profile, verdict and quarantine of the snapshot.
        balance_draws: One field=[value, value, ...] of the stage's draw a line.
        balance_stage: The stage whose draw it is.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("plan_balance", locals(), plan_balance)
