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
    report: dsl.Output[dsl.HTML],
) -> None:
    """Make a version the champion.

    Args:
        model: Name in the registry.
        version: Number or alias.
        reason: Why; kept with the version.
        force: Promote a version that the gate failed, too.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("promote_version", locals())
