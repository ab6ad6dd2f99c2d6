"""Makes a registered version the champion, from the Kubeflow UI."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.promote_version.component import promote_version
from components.summarise_run.component import summarise_run


@dsl.pipeline(name="promote")
def promote(registry_model: str, registry_version: str, reason: str, force: bool = False) -> None:
    """Make a version the champion; the old champion becomes previous.

    Args:
        registry_model: Name in the registry.
        registry_version: Number or alias, for instance challenger.
        reason: Why. Kept with the version as the tag promotion_reason.
        force: Promote a version that the gate failed, too.
    """
    summary = summarise_run(pipeline="promote", subject=registry_model, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    with dsl.ExitHandler(summary.set_caching_options(False), name="promote"):
        promoted = promote_version(model=registry_model, version=registry_version, reason=reason, force=force)
        promoted.set_caching_options(False)
