"""Write the ONNX bundle and compare its answers with torch's."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export_onnx(
    checkpoint: dsl.Input[dsl.Model],
    pinned: str,
    bundle: dsl.Output[dsl.Model],
    parity: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Write the ONNX bundle and compare its answers with torch's.

    Args:
        checkpoint: The model.
        pinned: What preflight pinned for this step.
        bundle: The bundle.
        parity: parity.json.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("export_onnx", locals())
