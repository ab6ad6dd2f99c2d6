"""Finds the best set of encoders of a recipe, round by round."""

# kfp reads the annotations themselves: no future import here.
from typing import NamedTuple

from kfp import dsl

from components.advance_search.component import advance_search
from components.prealign_encoder.component import prealign_encoder
from components.preflight.component import preflight
from components.resolve_data.component import resolve_data
from components.start_search.component import start_search
from components.summarise_run.component import summarise_run
from components.train_trial.component import train_trial
from components.validate_data.component import validate_data
from manyeyes.search.search import MAX_ROUNDS


class Round(NamedTuple):
    """What a round leaves to the next one."""

    candidates: list
    search: dsl.Artifact


# The nested pipelines are there for the same reasons as stages in pipelines/train.py.
@dsl.pipeline(name="search-round")
def search_round(
    round_number: int,
    candidates: list,
    before: dsl.Input[dsl.Artifact],
    encoder_checkpoints: dsl.Input[list[dsl.Model]],
    trial: str,
    advance: str,
    validation: dsl.Input[dsl.Dataset],
) -> Round:
    """Train and score every candidate of a round, side by side, and choose.

    Args:
        round_number: 0 for the start set's.
        candidates: Batches of variants; one empty text when the search has ended.
        before: The search before this round.
        encoder_checkpoints: Prealigned encoders, or a marker.
        trial: What is pinned for train_trial.
        advance: What is pinned for advance_search.
        validation: Profile, verdict and quarantine of the snapshot.
    """
    with dsl.ParallelFor(candidates, name="each batch") as candidate:
        scored = train_trial(
            variants=candidate,
            validation=validation,
            encoder_checkpoints=encoder_checkpoints,
            pinned=trial,
        )
    advanced = advance_search(
        round_number=round_number,
        before=before,
        trials=dsl.Collected(scored.outputs["trial"]),
        pinned=advance,
    )
    return Round(candidates=advanced.outputs["candidates"], search=advanced.outputs["search"])


@dsl.pipeline(name="search-rounds")
def search_rounds_of(
    candidates: list,
    encoders: list,
    search: dsl.Input[dsl.Artifact],
    trial: str,
    advance: str,
    validation: dsl.Input[dsl.Dataset],
) -> dsl.Artifact:
    """Prealign every encoder once, then go round by round.

    Args:
        candidates: Text of the start set.
        encoders: Encoders to prealign, each with what is pinned for it; one empty name for none.
        search: A search that has not begun.
        trial: What is pinned for train_trial.
        advance: What is pinned for advance_search.
        validation: Profile, verdict and quarantine of the snapshot.
    """
    with dsl.ParallelFor(encoders, name="each encoder") as encoder:
        aligned = prealign_encoder(encoder=encoder.encoder, validation=validation, pinned=encoder.pinned)
    # No loop of Kubeflow ends by itself: every round that there may be is here, and once the search has ended the
    # others find one empty candidate and do nothing.
    for number in range(MAX_ROUNDS + 1):
        closed = search_round(
            round_number=number,
            candidates=candidates,
            before=search,
            encoder_checkpoints=dsl.Collected(aligned.outputs["encoder_checkpoint"]),
            validation=validation,
            trial=trial,
            advance=advance,
        ).set_display_name("start set" if number == 0 else f"round {number}")
        candidates, search = closed.outputs["candidates"], closed.outputs["search"]
    return search


@dsl.pipeline(name="search-encoders")
def search_encoders(
    recipe: str = "tiny",
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
    search_start: str = "",
    search_rounds: int = 3,
    search_min_gain: float = 0.0,
) -> None:
    """Find the best set of a recipe's encoders: each round adds the one that helps most, until none helps.

    Args:
        recipe: A recipe's name. Its encoders are what is chosen from.
        recipe_overrides: Changes to the recipe, one a line, for instance stages.sft.epochs=1
        recipe_text: A recipe of your own, as YAML, taken instead of recipe.
        data_md5: Snapshot (outs[0].md5 in data.dvc). Empty in a checkout only.
        data_remote: A folder or s3://bucket/prefix that holds the snapshot. Empty in a checkout only.
        search_start: Encoders to start from, by their names in the recipe, separated by commas. Empty: the first one.
        search_rounds: Encoders added at most, 1 to 5.
        search_min_gain: Points of the mean score that a round must gain; otherwise the search ends.
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
        pipeline="search_encoders", subject=recipe, recipe_text=recipe_text, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
    )
    with dsl.ExitHandler(summary.set_caching_options(False), name="search for encoders"):
        checked = preflight(**form).set_caching_options(False)
        resolved = resolve_data(**form).set_caching_options(False).after(checked)
        pinned = resolved.outputs
        begun = start_search(
            pinned=pinned["start_search"],
            search_start=search_start,
            search_rounds=search_rounds,
            search_min_gain=search_min_gain,
        )
        validation = validate_data(pinned=pinned["validate_data"]).outputs["validation"]
        search_rounds_of(
            candidates=begun.outputs["candidates"],
            encoders=pinned["prealign_encoder"],
            search=begun.outputs["search"],
            validation=validation,
            trial=pinned["train_trial"],
            advance=pinned["advance_search"],
        )
