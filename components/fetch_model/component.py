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
    pinned: str,  # noqa: ARG001  (part of the cache key)
    fetched: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Fetch the model that is to be scored, and check each of its files.

    Args:
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: A folder, s3:// or models:/NAME/VERSION.
        model_digest: Of the checkpoint or bundle.
        pinned: What plan_evaluation pinned for this step.
        fetched: The checkpoint or bundle.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.fetch_model import STEPS

    run_step(
        STEPS[kind],
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"fetched": fetched},
        kind=kind,
        model=model,
        model_digest=model_digest,
    )
