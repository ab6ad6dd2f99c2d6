"""Look at every sample of some shards for a curation."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gather_facts(
    part: str,
    pinned: str,
    facts: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Look at every sample of some shards for a curation.

    Args:
        part: Which shards, one of the parts of plan_curation.
        pinned: What plan_curation pinned for this step.
        facts: What a draw asks of each shard; no image is in it.
        report: For people.
    """
    from manyeyes.data.curation.parts import part_key
    from manyeyes.kubeflow.component import run_component

    run_component("gather_facts", locals(), label=part_key(part))
