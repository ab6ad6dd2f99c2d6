"""Make the previous champion the champion again."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def restore_previous(
    model: str,
    reason: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Make the previous champion the champion again.

    Args:
        model: Name in the registry.
        reason: Why; kept with the version.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.restore_previous import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        model=model,
        reason=reason,
    )
