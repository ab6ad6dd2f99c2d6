"""Draws a training mixture from a snapshot by a curation recipe, and pushes a snapshot that has it too."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.curate_data.component import curate_data
from components.gather_facts.component import gather_facts
from components.plan_curation.component import plan_curation
from components.publish_snapshot.component import publish_snapshot
from components.summarise_run.component import summarise_run


# A pipeline of its own for the same reasons as stages in pipelines/train.py.
@dsl.pipeline(name="curation")
def curation(parts: list, gather: str, draw: str) -> dsl.Dataset:
    """Look at all shards, parts of them side by side, then draw, write and publish.

    Args:
        parts: Which shards, a text a step.
        gather: What is pinned for gather_facts.
        draw: What is pinned for curate_data and publish_snapshot.
    """
    with dsl.ParallelFor(parts, name="each part") as part:
        gathered = gather_facts(part=part, pinned=gather)
    curated = curate_data(facts=dsl.Collected(gathered.outputs["facts"]), pinned=draw)
    # Never cached, and cheap: the remote may have lost files since, and how a run ended is known by it.
    publish_snapshot(curated=curated.outputs["curated"], pinned=draw).set_caching_options(False)
    return curated.outputs["curated"]


@dsl.pipeline(name="curate")
def curate(
    curate_recipe: str = "clean",
    curate_recipe_text: str = "",
    curate_remote: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> None:
    """Draw a training mixture from a snapshot by a curation recipe; a new snapshot has it beside all else.

    Args:
        curate_recipe: A curation recipe's name. The new data set is called after it, for instance clean-train.
        curate_recipe_text: A curation recipe of your own, as YAML, taken instead of curate_recipe.
        curate_remote: A folder or s3://bucket/prefix that the new snapshot goes to. Empty: where the data is.
        data_md5: Snapshot (outs[0].md5 in data.dvc). Empty in a checkout only.
        data_remote: A folder, s3://bucket/prefix or hub:OWNER/NAME@COMMIT that holds the snapshot. Empty in a checkout
            only.
    """
    summary = summarise_run(
        pipeline="curate",
        subject=curate_recipe,
        recipe_text=curate_recipe_text,
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )
    with dsl.ExitHandler(summary.set_caching_options(False), name="curate and publish"):
        planned = plan_curation(
            curate_recipe=curate_recipe,
            curate_recipe_text=curate_recipe_text,
            curate_remote=curate_remote,
            data_md5=data_md5,
            data_remote=data_remote,
        ).set_caching_options(False)
        curation(
            parts=planned.outputs["parts"],
            gather=planned.outputs["gather_facts"],
            draw=planned.outputs["curate_data"],
        ).set_display_name("curate")
