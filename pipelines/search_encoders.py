"""Finds the best set of encoders of a recipe, round by round."""

# kfp reads the annotations themselves: no future import here.
from typing import Any, NamedTuple

from kfp import dsl

from components.advance_search.component import advance_search
from components.prealign_encoder.component import prealign_encoder
from components.preflight.component import preflight
from components.start_search.component import start_search
from components.summarise_run.component import summarise_run
from components.train_trial.component import train_trial
from components.validate_data.component import validate_data
from manyeyes.search.search import MAX_ROUNDS


class Round(NamedTuple):
    """What a round leaves to the next one."""

    goes_on: str
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
        candidates: Batches of variants.
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
    # Never cached, and cheap: how a run ended that is otherwise from the cache is known by it.
    advanced = advance_search(
        round_number=round_number,
        before=before,
        trials=dsl.Collected(scored.outputs["trial"]),
        pinned=advance,
    ).set_caching_options(False)
    return Round(**{name: advanced.outputs[name] for name in ("goes_on", "candidates", "search")})


def _rounds_from(number: int) -> Any:
    """The pipeline of a round and of those after it, each of which begins only when the search goes on.

    No loop of Kubeflow ends by itself, so every round that there may be is here, inside the one before it. The
    condition is on a parameter of the nested pipeline: kfp.local 2.17 cannot resolve the output of a nested pipeline in
    a condition, and takes it for one that does not hold ("Could not resolve CEL parameter", enhanced_dag_orchestrator).
    """
    following = _rounds_from(number + 1) if number < MAX_ROUNDS else None

    @dsl.pipeline(name=f"rounds-from-{number}")
    def rounds(
        goes_on: str,
        candidates: list,
        search: dsl.Input[dsl.Artifact],
        encoder_checkpoints: dsl.Input[list[dsl.Model]],
        trial: str,
        advance: str,
        validation: dsl.Input[dsl.Dataset],
    ) -> None:
        shared: dict[str, Any] = {"validation": validation, "trial": trial, "advance": advance}
        with dsl.If(goes_on == "yes", name="the search goes on"):
            closed = search_round(
                round_number=number,
                candidates=candidates,
                before=search,
                encoder_checkpoints=encoder_checkpoints,
                **shared,
            ).set_display_name(f"round {number}")
            if following is not None:
                following(
                    **{name: closed.outputs[name] for name in ("goes_on", "candidates", "search")},
                    encoder_checkpoints=encoder_checkpoints,
                    **shared,
                ).set_display_name("further rounds")

    return rounds


_further_rounds = _rounds_from(1)


@dsl.pipeline(name="search-rounds")
def search_rounds_of(
    candidates: list,
    encoders: list,
    search: dsl.Input[dsl.Artifact],
    trial: str,
    advance: str,
    validation: dsl.Input[dsl.Dataset],
) -> None:
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
    shared: dict[str, Any] = {"validation": validation, "trial": trial, "advance": advance}
    one_encoder = aligned.outputs["encoder_checkpoint"]
    # One dsl.Collected each: compiling changes the object.
    started = search_round(
        round_number=0,
        candidates=candidates,
        before=search,
        encoder_checkpoints=dsl.Collected(one_encoder),
        **shared,
    ).set_display_name("start set")
    _further_rounds(
        **{name: started.outputs[name] for name in ("goes_on", "candidates", "search")},
        encoder_checkpoints=dsl.Collected(one_encoder),
        **shared,
    ).set_display_name("further rounds")


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
        data_remote: A folder, s3://bucket/prefix or hub:OWNER/NAME@COMMIT that holds the snapshot. Empty in a checkout
            only.
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
        pinned = preflight(**form).set_caching_options(False).outputs
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
