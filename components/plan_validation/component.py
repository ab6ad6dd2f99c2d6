"""Pin recipe, snapshot and code, and share the shards out."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_validation(
    recipe: str,
    recipe_overrides: str,
    recipe_text: str,
    data_md5: str,
    data_remote: str,
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned", [("validate_data", str), ("parts", list)]
):
    """Pin recipe, snapshot and code, and share the shards out.

    Args:
        recipe: A shipped recipe.
        recipe_overrides: One a.b=value a line.
        recipe_text: A recipe of your own, as YAML, instead of a shipped one.
        data_md5: Snapshot, as in data.dvc; empty: the checkout's own.
        data_remote: A folder, s3:// or hub:OWNER/NAME@COMMIT that holds it; empty: the checkout's own.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("plan_validation", locals(), plan_validation)
