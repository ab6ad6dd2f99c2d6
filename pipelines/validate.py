"""Looks at every sample of a snapshot, shards side by side, and lets Great Expectations judge it."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.judge_snapshot.component import judge_snapshot
from components.plan_validation.component import plan_validation
from components.profile_shards.component import profile_shards
from components.summarise_run.component import summarise_run


# A pipeline of its own for the same reasons as stages in pipelines/train.py.
@dsl.pipeline(name="validation")
def validation(parts: list, pinned: str) -> dsl.Dataset:
    """Look at all shards, parts of them side by side, then judge.

    Args:
        parts: Which shards, a text a step.
        pinned: What is pinned for all of its steps.
    """
    with dsl.ParallelFor(parts, name="each part") as part:
        profiled = profile_shards(part=part, pinned=pinned)
    # Never cached, and cheap: how a run ended is known by it.
    judged = judge_snapshot(facts=dsl.Collected(profiled.outputs["facts"]), pinned=pinned).set_caching_options(False)
    return judged.outputs["validation"]


@dsl.pipeline(name="validate")
def validate(
    recipe: str = "tiny",
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> None:
    """Check whether a snapshot is fit for a recipe, as validate_data of train does, by several steps side by side.

    Args:
        recipe: A shipped recipe: which data sets are looked at, and what its training would refuse.
        recipe_overrides: Changes to the recipe, one a line, for instance data.eval_datasets=[easy-vqa-test]
        recipe_text: A recipe of your own, as YAML, taken instead of recipe.
        data_md5: Snapshot (outs[0].md5 in data.dvc). Empty in a checkout only.
        data_remote: A folder, s3://bucket/prefix or hub:OWNER/NAME@COMMIT that holds the snapshot. Empty in a checkout
            only.
    """
    summary = summarise_run(
        pipeline="validate", subject=recipe, recipe_text=recipe_text, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
    )
    with dsl.ExitHandler(summary.set_caching_options(False), name="profile and judge"):
        planned = plan_validation(
            recipe=recipe,
            recipe_overrides=recipe_overrides,
            recipe_text=recipe_text,
            data_md5=data_md5,
            data_remote=data_remote,
        ).set_caching_options(False)
        validation(parts=planned.outputs["parts"], pinned=planned.outputs["validate_data"]).set_display_name("validate")
