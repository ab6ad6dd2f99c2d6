"""Pin curation recipe, snapshot and code, and share the shards out."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_curation(
    curate_recipe: str,
    curate_recipe_text: str,
    curate_remote: str,
    data_md5: str,
    data_remote: str,
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned", [("gather_facts", str), ("curate_data", str), ("parts", list)]
):
    """Pin curation recipe, snapshot and code, and share the shards out.

    Args:
        curate_recipe: A shipped curation recipe.
        curate_recipe_text: A curation recipe of your own, as YAML, instead of a shipped one.
        curate_remote: A folder or s3:// for the new snapshot; empty: the remote of the data.
        data_md5: Snapshot, as in data.dvc; empty: the checkout's own.
        data_remote: A folder, s3:// or hub: that holds it; empty: the checkout's own.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("plan_curation", locals(), plan_curation)
