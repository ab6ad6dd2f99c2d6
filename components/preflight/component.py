"""Check everything that a run needs, say all that is wrong at once, and pin recipe, data and code."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    recipe: str,
    recipe_overrides: str,
    recipe_text: str,
    data_md5: str,
    data_remote: str,
    registry_model: str,
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Resolved",
    [
        ("validate_data", str),
        ("prealign_encoder", list),
        ("pretrain_projector", str),
        ("sft", str),
        ("evaluate", str),
        ("export_onnx", str),
        ("register", str),
        ("start_search", str),
        ("advance_search", str),
        ("plan_ablation", str),
        ("compare_trials", str),
        ("train_trial", str),
        ("registry_model", str),
    ],
):
    """Check everything that a run needs, say all that is wrong at once, and pin recipe, data and code.

    The cache keys of all later steps are made of what it pins.

    Args:
        recipe: A shipped recipe.
        recipe_overrides: One a.b=value a line.
        recipe_text: A recipe of your own, as YAML, instead of a shipped one.
        data_md5: Snapshot, as in data.dvc; empty: the checkout's own.
        data_remote: A folder, s3:// or hub:OWNER/NAME@COMMIT that holds it; empty: the checkout's own.
        registry_model: Name in the registry; empty: the recipe's own.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("preflight", locals(), preflight)
