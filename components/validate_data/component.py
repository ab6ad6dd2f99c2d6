"""Profile the snapshot and let Great Expectations judge it."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate_data(
    pinned: str,
    validation: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Profile the snapshot and let Great Expectations judge it.

    Args:
        pinned: What resolve_data pinned for this step.
        validation: Profile, verdict and quarantine of the snapshot.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.validate_data import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"validation": validation},
        pinned=pinned,
    )
