"""Make a version the champion."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote_version(
    model: str,
    version: str,
    reason: str,
    force: bool,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Make a version the champion.

    Args:
        model: Name in the registry.
        version: Number or alias.
        reason: Why; kept with the version.
        force: Promote a version that the gate failed, too.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from manyeyes.harness.base import run_step
    from manyeyes.steps.promote_version import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        model=model,
        version=version,
        reason=reason,
        force=force,
    )
