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
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Write the ONNX bundle and compare its answers with torch's.

    Args:
        checkpoint: The model.
        pinned: What resolve_data pinned for this step.
        bundle: The bundle.
        parity: parity.json.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.export_onnx import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"bundle": bundle, "parity": parity},
        checkpoint=Path(checkpoint.path),
        pinned=pinned,
    )
