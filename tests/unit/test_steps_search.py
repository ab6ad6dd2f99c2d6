"""Trials, searches and their pages, with models that answer by rule."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError, PipelineError, RecipeError
from manyeyes.evaluation.benchmarks import BENCHMARKS, Graded
from manyeyes.evaluation.benchmarks.benchmark import mean_percent
from manyeyes.evaluation.benchmarks.easy_vqa import EASY_VQA
from manyeyes.harness.base import Reporter, StepResult
from manyeyes.recipe import load_recipe
from manyeyes.search.search import MAX_ROUNDS, read_search
from manyeyes.search.trial import difference, mean_score, read_trial
from manyeyes.search.variant import Variant, parse_batch
from manyeyes.steps.advance_search import advance_search
from manyeyes.steps.compare_trials import AblationComparison, compare_trials
from manyeyes.steps.start_search import start_search
from manyeyes.steps.train_trial import shared_encoders
from tests.evaluation_fakes import make_snapshot
from tests.pinned_toys import pin
from tests.trial_toys import IMAGES, SECOND, add_second_benchmark, make_trial

REPORTER = Reporter("test")
POOL = ("clip", "convnext", "sam")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def pinned(step: str, *names: str) -> str:
    encoders = [{"name": name, "encoder": "vit-tiny-p16-64"} for name in names or POOL]
    return pin(load_recipe("tiny", overrides={"model.encoders": encoders}), step)


def start(folder: Path, **options: object) -> StepResult:
    given = {"search_start": "", "search_rounds": 2, "search_min_gain": 0.0, **options}
    return start_search(REPORTER, pinned=pinned("start_search"), search=folder, **given)


def run_round(before: Path, candidates: list[str], snapshot: Snapshot, wrong: dict[str, int]) -> StepResult:
    """Close a round whose models are wrong about this many images, by set; the new search lies beside the old one."""
    after = before.with_name(f"{before.name}-next")
    trials = []
    for variant in [found for batch in candidates for found in parse_batch(batch)]:
        folder = before.with_name(f"{before.name}-{variant.key}")
        trials.append(make_trial(folder, snapshot, variant, wrong=range(wrong[variant.key])))
    return advance_search(REPORTER, pinned=pinned("advance_search"), before=before, trials=trials[::-1], search=after)


@pytest.mark.parametrize(
    ("keeps", "trains", "shared"),
    [
        (False, {"projector": 1e-3}, ()),
        (True, {"projector": 1e-3}, POOL),
        (True, {"projector": 1e-3, "encoders.convnext": 1e-4}, ("clip", "sam")),
        (True, {"projector": 1e-3, "encoders": 1e-4}, ()),
    ],
)
def test_trials_share_features_of_encoders_that_none_of_their_stages_trains(
    keeps: bool, trains: dict[str, float], shared: tuple[str, ...]
) -> None:
    encoders = [{"name": name, "encoder": "vit-tiny-p16-64"} for name in POOL]
    changes = {"stages.pretrain.keep_features": keeps, "stages.sft.train": trains}
    recipe = load_recipe("tiny", overrides={"model.encoders": encoders, "stages.prealign": None, **changes})
    assert shared_encoders(recipe) == shared


def test_mean_of_two_benchmarks_has_the_interval_of_independent_errors(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_second_benchmark(monkeypatch)
    both = make_trial(tmp_path / "a", snapshot, Variant(), wrong=range(6), benchmarks=("easy-vqa", SECOND))
    card = read_trial(both).scorecard
    first, second = card.benchmarks["easy-vqa"], card.benchmarks[SECOND]
    mean, (low, high) = mean_score(card)
    assert mean == pytest.approx((first.score + second.score) / 2)
    assert mean - low == pytest.approx(math.hypot(first.score - first.ci95[0], second.score - second.ci95[0]) / 2, 1e-3)
    assert high - mean == pytest.approx(
        math.hypot(first.ci95[1] - first.score, second.ci95[1] - second.score) / 2, 1e-3
    )


def test_difference_is_paired_and_zero_against_itself(snapshot: Snapshot, tmp_path: Path) -> None:
    few = make_trial(tmp_path / "few", snapshot, Variant(), wrong=range(3))
    many = make_trial(tmp_path / "many", snapshot, Variant(), wrong=range(15))
    same = difference(few, few)
    assert (same.mean, same.ci95, same.is_certain) == (0.0, (0.0, 0.0), False)
    better = difference(few, many)
    assert better.mean == pytest.approx(100 * 12 / IMAGES, abs=1e-3)
    assert better.is_certain
    assert difference(many, few).mean == pytest.approx(-better.mean)


def test_difference_is_of_the_benchmarks_own_figure_as_percent_of_its_maximum(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 points a share of right answers, 20 at most: 21 of 24 images give 20 points, 9 give 15.
    def capped(graded: Sequence[Graded], variant: str) -> dict[str, float]:
        return {"score": min(20.0, 40 * mean_percent(graded, variant)["score"] / 100)}

    row = replace(EASY_VQA, name=SECOND, scorer="capped", aggregate=capped, mean_scale=None, maximum=20.0)
    monkeypatch.setitem(BENCHMARKS, SECOND, row)
    few = make_trial(tmp_path / "few", snapshot, Variant(), wrong=range(3), benchmarks=("easy-vqa", SECOND))
    many = make_trial(tmp_path / "many", snapshot, Variant(), wrong=range(15), benchmarks=("easy-vqa", SECOND))
    found = difference(few, many)
    assert found.by_benchmark[SECOND].difference == pytest.approx(5)
    assert found.mean == pytest.approx((50 + 25) / 2, abs=1e-3)
    assert found.ci95[0] < found.mean < found.ci95[1]


def test_trials_with_other_questions_are_not_compared(snapshot: Snapshot, tmp_path: Path) -> None:
    other = make_snapshot(tmp_path / "other", images=3)
    ours = make_trial(tmp_path / "ours", snapshot, Variant(), wrong=())
    theirs = make_trial(tmp_path / "theirs", other, Variant(), wrong=())
    with pytest.raises(EvaluationError, match="different questions"):
        difference(ours, theirs)


def test_search_adds_the_best_encoder_and_ends_without_gain(snapshot: Snapshot, tmp_path: Path) -> None:
    begun = start(tmp_path / "s")
    assert begun.values["candidates"] == ['{"encoders":["clip"]}']
    first = run_round(tmp_path / "s", begun.values["candidates"], snapshot, {"clip": 12})
    assert first.values["candidates"] == ['{"encoders":["clip","convnext"]}', '{"encoders":["clip","sam"]}']
    second = run_round(tmp_path / "s-next", first.values["candidates"], snapshot, {"clip+convnext": 8, "clip+sam": 4})
    assert second.values == {
        "goes_on": "yes",
        "candidates": ['{"encoders":["clip","convnext","sam"]}'],
        "encoders": ["clip", "sam"],
    }
    third = run_round(tmp_path / "s-next-next", second.values["candidates"], snapshot, {"clip+convnext+sam": 5})
    assert third.values == {"goes_on": "no", "candidates": [], "encoders": ["clip", "sam"]}
    search, trials = read_search(tmp_path / "s-next-next-next")
    assert search.ended == "round 2 gained -4.17 points, not more than 0"
    assert [round_.chosen for round_ in search.rounds] == ["clip", "clip+sam", None]
    assert search.rounds[1].candidates == ("clip+sam", "clip+convnext")
    assert search.rounds[1].gain == pytest.approx(100 * 8 / IMAGES, abs=1e-3)
    assert set(trials) == {"clip", "clip+convnext", "clip+sam", "clip+convnext+sam"}

    page = third.html
    assert page.lower().startswith("<!doctype html>")
    for text in ("clip + sam", "Round 2: one encoder more", "+33.33", "-4.17", "rung below", "3.2 G"):
        assert text in page, text
    assert "<script" not in page
    assert "http" not in page


def test_search_ends_with_all_encoders_or_after_its_rounds(snapshot: Snapshot, tmp_path: Path) -> None:
    begun = start(tmp_path / "all", search_start="sam, clip")
    assert begun.values["candidates"] == ['{"encoders":["clip","sam"]}']  # in the recipe's order
    first = run_round(tmp_path / "all", begun.values["candidates"], snapshot, {"clip+sam": 9})
    last = run_round(tmp_path / "all-next", first.values["candidates"], snapshot, {"clip+convnext+sam": 3})
    assert last.values == {"goes_on": "no", "candidates": [], "encoders": list(POOL)}
    assert read_search(tmp_path / "all-next-next")[0].ended == "every encoder is in the set"

    begun = start(tmp_path / "one", search_rounds=1)
    first = run_round(tmp_path / "one", begun.values["candidates"], snapshot, {"clip": 9})
    last = run_round(tmp_path / "one-next", first.values["candidates"], snapshot, {"clip+convnext": 3, "clip+sam": 4})
    assert last.values == {"goes_on": "no", "candidates": [], "encoders": ["clip", "convnext"]}
    assert read_search(tmp_path / "one-next-next")[0].ended == "1 round was asked for"


def test_gain_below_the_asked_one_ends_the_search(snapshot: Snapshot, tmp_path: Path) -> None:
    begun = start(tmp_path / "s", search_min_gain=10.0)
    first = run_round(tmp_path / "s", begun.values["candidates"], snapshot, {"clip": 9})
    last = run_round(tmp_path / "s-next", first.values["candidates"], snapshot, {"clip+convnext": 7, "clip+sam": 8})
    assert last.values == {"goes_on": "no", "candidates": [], "encoders": ["clip"]}


def test_trials_of_another_round_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    start(tmp_path / "s")
    stranger = make_trial(tmp_path / "x", snapshot, Variant(encoders=("sam",)), wrong=())
    with pytest.raises(PipelineError, match="those of this round: clip"):
        advance_search(
            REPORTER,
            pinned=pinned("advance_search"),
            before=tmp_path / "s",
            trials=[stranger],
            search=tmp_path / "after",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_start": "clip, sm"}, 'Did you mean "sam"'),
        ({"search_start": "clip,convnext,sam"}, "at least one encoder to add"),
        ({"search_start": "clip,clip"}, "each once"),
        ({"search_rounds": 0}, f"1 to {MAX_ROUNDS}"),
        ({"search_rounds": MAX_ROUNDS + 1}, f"1 to {MAX_ROUNDS}"),
        ({"search_min_gain": -1.0}, "0 points or more"),
    ],
)
def test_impossible_search_is_refused_before_it_begins(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        start(tmp_path / "s", **options)


def test_comparison_puts_every_variant_beside_the_first(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_second_benchmark(monkeypatch)
    wrong = {"concat": 6, "append": 2, "mined": 6}
    variants = [Variant(changes={"model.fusion.strategy": name}) for name in wrong]
    grid = f"model.fusion.strategy=[{', '.join(wrong)}]"
    trials = [
        make_trial(
            tmp_path / name, snapshot, variant, wrong=range(count), benchmarks=("easy-vqa", SECOND), parameters=10**9
        )
        for variant, (name, count) in zip(variants, wrong.items(), strict=True)
    ]
    out = tmp_path / "comparison"
    result = compare_trials(
        REPORTER,
        pinned=pinned("compare_trials"),
        ablate_grid=grid,
        trials=trials[::-1],
        comparison=out,
    )
    written = AblationComparison.model_validate_json((out / "comparison.json").read_text(encoding="utf-8"))
    assert [row.label for row in written.trials] == [f"fusion.strategy={name}" for name in wrong]
    assert [row.difference for row in written.trials] == [None, pytest.approx(100 * 4 / IMAGES, abs=1e-3), 0.0]
    assert result.headline.startswith("best of 3: fusion.strategy=append")
    assert len(list(out.glob("trials/*/items.parquet"))) == 3
    for text in ("fusion.strategy=append ✓", "+16.67", SECOND, "2 G", "1 of 2"):
        assert text in result.html, text
    assert "fusion.strategy=append" in result.markdown

    # One step may have trained several of them.
    batch = tmp_path / "batch"
    batch.mkdir()
    for folder in trials[1:]:
        folder.rename(batch / folder.name)
    again = compare_trials(
        REPORTER,
        pinned=pinned("compare_trials"),
        ablate_grid=grid,
        trials=[batch, trials[0]],
        comparison=tmp_path / "again",
    )
    assert again.html == result.html
    with pytest.raises(PipelineError, match=r"no trial of .*fusion\.strategy=mined"):
        compare_trials(
            REPORTER,
            pinned=pinned("compare_trials"),
            ablate_grid=grid,
            trials=trials[:1],
            comparison=tmp_path / "second",
        )


def test_trial_file_that_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text(json.dumps({"variant": {}}), encoding="utf-8")
    with pytest.raises(PipelineError, match=r"trial\.json"):
        read_trial(tmp_path)


def test_scores_of_draws_are_drawn_against_the_number_in_which_they_differ(snapshot: Snapshot, tmp_path: Path) -> None:
    wrong = {250_000: 2, 150_000: 6, 350_000: 3}
    trials = [
        make_trial(tmp_path / str(cap), snapshot, Variant(changes={"stages.sft.draw.cap": cap}), wrong=range(count))
        for cap, count in wrong.items()
    ]
    logged: dict[int, dict[str, float]] = {}

    class Log:
        run_id = "run"

        def log_metrics(self, figures: dict[str, float], *, step: int) -> None:
            logged[step] = figures

    result = compare_trials(
        Reporter("test", Log()),  # type: ignore[arg-type]
        pinned=pinned("compare_trials"),
        ablate_grid=f"stages.sft.draw.cap={list(wrong)}",
        trials=trials,
        comparison=tmp_path / "comparison",
    )
    for text in ("Draws of tiny", "Mean score against stages.sft.draw.cap", "<polyline"):
        assert text in result.html, text
    assert {place: round(figures["mean_score"], 1) for place, figures in logged.items()} == {
        cap: round(100 * (IMAGES - count) / IMAGES, 1) for cap, count in wrong.items()
    }
    assert all(figures["mean_score_low"] < figures["mean_score_high"] for figures in logged.values())
