"""Look at every sample of some shards for a validation."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def profile_shards(
    part: str,
    pinned: str,
    facts: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Look at every sample of some shards for a validation.

    Args:
        part: Which shards, one of the parts of plan_validation.
        pinned: What plan_validation pinned for this step.
        facts: What was found of each shard; no image is in it.
        report: For people.
    """
    from manyeyes.data.curation.parts import part_key
    from manyeyes.kubeflow.component import run_component

    run_component("profile_shards", locals(), label=part_key(part))
