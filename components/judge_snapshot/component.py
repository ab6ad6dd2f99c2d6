"""Join what was found of all shards, and let Great Expectations judge it."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge_snapshot(
    facts: dsl.Input[list[dsl.Artifact]],
    pinned: str,
    validation: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Join what was found of all shards, and let Great Expectations judge it.

    Args:
        facts: Of all parts.
        pinned: What plan_validation pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("judge_snapshot", locals())
