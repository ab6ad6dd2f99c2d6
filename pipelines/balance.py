"""Trains and scores a recipe on several draws of its data, and compares them: how much of what to train on."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.plan_balance.component import plan_balance
from components.preflight.component import preflight
from components.summarise_run.component import summarise_run
from components.validate_data.component import validate_data
from pipelines.ablate import trials


@dsl.pipeline(name="balance")
def balance(
    balance_draws: str,
    balance_stage: str = "sft",
    recipe: str = "tiny",
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> None:
    """Train and score a recipe on several draws of one snapshot; one page with the score against the draw.

    Args:
        balance_draws: One field=[value, value, ...] of the stage's draw a line, for instance
            cap=[150000, 250000, 350000, 450000] or ratio=[{general: 2, ocr: 1}, {general: 1, ocr: 1}]; as-is stands
            for the recipe's own. All are compared with the first.
        balance_stage: The stage that is trained on the draws.
        recipe: A recipe's name.
        recipe_overrides: Changes that hold for every draw, one a line, for instance stages.sft.draw.total=1350000
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
        pipeline="balance", subject=recipe, recipe_text=recipe_text, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
    )
    with dsl.ExitHandler(summary.set_caching_options(False), name="train and compare draws"):
        pinned = preflight(**form).set_caching_options(False).outputs
        validation = validate_data(pinned=pinned["validate_data"]).outputs["validation"]
        planned = plan_balance(
            pinned=pinned["train_trial"],
            validation=validation,
            balance_draws=balance_draws,
            balance_stage=balance_stage,
        )
        trials(
            ablate_grid=planned.outputs["grid"],
            batches=planned.outputs["batches"],
            validation=validation,
            trial=pinned["train_trial"],
            compare=pinned["compare_trials"],
        ).set_display_name("train and compare")
