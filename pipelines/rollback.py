"""Makes the previous champion the champion again, from the Kubeflow UI."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.restore_previous.component import restore_previous
from components.summarise_run.component import summarise_run


@dsl.pipeline(name="rollback")
def rollback(registry_model: str, reason: str) -> None:
    """Make the previous champion the champion again; the two swap.

    Args:
        registry_model: Name in the registry.
        reason: Why. Kept with the version that is champion again as the tag promotion_reason.
    """
    summary = summarise_run(pipeline="rollback", subject=registry_model, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    with dsl.ExitHandler(summary.set_caching_options(False), name="roll back"):
        restore_previous(model=registry_model, reason=reason).set_caching_options(False)
