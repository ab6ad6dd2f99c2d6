"""Fetch the model that is to be scored, and check each of its files."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_model(
    kind: str,
    model: str,
    model_digest: str,
    pinned: str,
    fetched: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Fetch the model that is to be scored, and check each of its files.

    Args:
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: A folder, s3:// or models:/NAME/VERSION.
        model_digest: Of the checkpoint or bundle.
        pinned: What plan_evaluation pinned for this step.
        fetched: The checkpoint or bundle.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("fetch_model", locals(), kind=kind)
