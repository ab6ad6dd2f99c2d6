"""Make a curated snapshot visible in its remote."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish_snapshot(
    curated: dsl.Input[dsl.Dataset],
    pinned: str,
    report: dsl.Output[dsl.HTML],
) -> None:
    """Make a curated snapshot visible in its remote.

    Args:
        curated: From curate_data.
        pinned: What plan_curation pinned for curate_data.
        report: What to give to a pipeline, and to commit.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("publish_snapshot", locals())
