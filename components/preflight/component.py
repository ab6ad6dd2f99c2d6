"""Check everything that a run needs, and show all that is wrong at once, before any GPU is asked for."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
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
) -> None:
    """Check everything that a run needs, and show all that is wrong at once, before any GPU is asked for.

    Args:
        recipe: A shipped recipe.
        recipe_overrides: One a.b=value a line.
        recipe_text: A recipe of your own, as YAML, instead of a shipped one.
        data_md5: Snapshot, as in data.dvc; empty: the checkout's own.
        data_remote: A folder or s3:// that holds it; empty: the checkout's own.
        registry_model: Name in the registry; empty: the recipe's own.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("preflight", locals())
