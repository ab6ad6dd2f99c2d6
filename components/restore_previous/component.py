"""Make the previous champion the champion again."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def restore_previous(
    model: str,
    reason: str,
    report: dsl.Output[dsl.HTML],
) -> None:
    """Make the previous champion the champion again.

    Args:
        model: Name in the registry.
        reason: Why; kept with the version.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("restore_previous", locals())
