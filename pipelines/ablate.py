"""Trains and scores every combination of a grid of recipe values, and compares them."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.compare_trials.component import compare_trials
from components.plan_ablation.component import plan_ablation
from components.preflight.component import preflight
from components.summarise_run.component import summarise_run
from components.train_trial.component import train_trial
from components.validate_data.component import validate_data


# A pipeline of its own for the same reasons as stages in pipelines/train.py.
@dsl.pipeline(name="trials")
def trials(
    ablate_grid: str,
    batches: list,
    trial: str,
    compare: str,
    validation: dsl.Input[dsl.Dataset],
) -> dsl.Artifact:
    """Train and score every variant, batches of them side by side, and compare them.

    Args:
        ablate_grid: One path=[value, value, ...] a line.
        batches: Texts of its variants, shared among a few steps.
        trial: What is pinned for train_trial.
        compare: What is pinned for compare_trials.
        validation: Profile, verdict and quarantine of the snapshot.
    """
    with dsl.ParallelFor(batches, name="each batch") as batch:
        scored = train_trial(variants=batch, validation=validation, pinned=trial)
    # Never cached, and cheap: how a run ended that is otherwise from the cache is known by it.
    compared = compare_trials(
        ablate_grid=ablate_grid,
        trials=dsl.Collected(scored.outputs["trial"]),
        pinned=compare,
    ).set_caching_options(False)
    return compared.outputs["comparison"]


@dsl.pipeline(name="ablate")
def ablate(
    ablate_grid: str,
    recipe: str = "tiny",
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> None:
    """Train and score every combination of a grid of recipe values; one page with the differences.

    Args:
        ablate_grid: One path=[value, value, ...] a line, for instance model.fusion.strategy=[channel-concat,
            sequence-append]; as-is stands for the recipe's own value. All are compared with the first combination.
        recipe: A recipe's name.
        recipe_overrides: Changes that hold for every variant, one a line, for instance stages.sft.epochs=1
        recipe_text: A recipe of your own, as YAML, taken instead of recipe.
        data_md5: Snapshot (outs[0].md5 in data.dvc). Empty in a checkout only.
        data_remote: A folder, s3://bucket/prefix or hub:OWNER/NAME@COMMIT that holds the snapshot. Empty in a checkout
            only.
    """
    form = {
        "recipe": recipe,
        "recipe_overrides": recipe_overrides,
        "recipe_text": recipe_text,
        "data_md5": data_md5,
        "data_remote": data_remote,
        "registry_model": "",
    }
    summary = summarise_run(
        pipeline="ablate", subject=recipe, recipe_text=recipe_text, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
    )
    with dsl.ExitHandler(summary.set_caching_options(False), name="train and compare variants"):
        pinned = preflight(**form).set_caching_options(False).outputs
        planned = plan_ablation(pinned=pinned["plan_ablation"], ablate_grid=ablate_grid)
        validation = validate_data(pinned=pinned["validate_data"]).outputs["validation"]
        trials(
            ablate_grid=ablate_grid,
            batches=planned.outputs["batches"],
            validation=validation,
            trial=pinned["train_trial"],
            compare=pinned["compare_trials"],
        ).set_display_name("train and compare")
