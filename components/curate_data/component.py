"""Draw by a curation recipe, and write, validate and push what is drawn."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def curate_data(
    facts: dsl.Input[list[dsl.Artifact]],
    pinned: str,
    curated: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Draw by a curation recipe, and write, validate and push what is drawn.

    Args:
        facts: Of all parts.
        pinned: What plan_curation pinned for this step.
        curated: Manifest, listing and .dvc file of the new snapshot, the page, and what validation found.
        metrics: Scalars.
        report: The page of the curation.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("curate_data", locals())
