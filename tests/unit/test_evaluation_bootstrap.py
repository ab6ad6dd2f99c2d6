from __future__ import annotations

import numpy as np
import pytest

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import mean_percent
from manyeyes.evaluation.statistics import intervals as bootstrap
from manyeyes.evaluation.statistics.intervals import (
    Aggregate,
    Clusters,
    average_interval,
    clustered_error,
    clustered_mean,
    draw_counts,
    percentile_interval,
    score_draws,
    seeded,
    standard_error,
)
from manyeyes.evaluation.statistics.significance import added_interval, score_interval
from tests.benchmark_toys import f1, make_graded, make_row, pairs

KINDS = ("F1", "mean", "clustered mean")
COVERAGE_WITH_30_CLUSTERS = {"F1": 0.94, "mean": 0.947, "clustered mean": 0.9475}
"""Stated in docs/certainty.md."""


def _coverage(clusters: int, *, kind: str, draws: int = 2000) -> float:
    """How often the 95% interval holds the true F1 or mean: eight questions an image, right or wrong together."""
    generator = np.random.default_rng(7)
    counts = draw_counts(clusters, draws=1000, generator=generator).astype(np.float64)
    truth = 2 * 0.8 / (2 * 0.8 + 0.4) if kind == "F1" else 0.8
    images = np.repeat(np.arange(clusters), 8)
    covered = 0
    for _ in range(draws):
        skill = generator.beta(8, 2, clusters)
        right = generator.random((clusters, 8)) < skill[:, None]
        hits, wrong = right[:, :4].sum(1), (~right).sum(1)  # the first four should be answered "yes"
        sums = counts @ np.stack([hits, wrong], axis=1)
        if kind == "F1":
            low, high = percentile_interval(2 * sums[:, 0] / (2 * sums[:, 0] + sums[:, 1]), clusters=clusters)
        elif kind == "mean":
            low, high = percentile_interval(1 - sums[:, 1] / len(images), clusters=clusters)
        else:
            estimate = clustered_mean(right.ravel().astype(float), images)  # type: ignore[arg-type]
            low, high = estimate.low / 100, estimate.high / 100
        covered += low <= truth <= high
    return covered / draws


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_covers_the_truth_as_often_as_it_says_with_200_clusters(kind: str) -> None:
    # A coverage of 95% over 2,000 draws has a standard error of 0.5 points.
    assert 0.93 <= _coverage(200, kind=kind) <= 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_the_coverage_with_30_clusters_is_what_the_page_states(kind: str) -> None:
    assert _coverage(30, kind=kind) == pytest.approx(COVERAGE_WITH_30_CLUSTERS[kind], abs=0.01)


def test_an_aggregate_on_resampled_clusters_equals_sums_on_the_same_draws() -> None:
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(12), 5)
    gold = ["yes" if value else "no" for value in generator.integers(0, 2, 60)]
    graded = make_graded(generator.integers(0, 2, 60).tolist(), clusters.tolist(), gold=gold)
    drawn = score_draws(make_row(aggregate=f1), graded, "official", draws=50, seed=1)
    counts = draw_counts(12, draws=50, generator=seeded("toy", 1))
    hits = np.bincount(clusters, weights=[item.parsed == "yes" == item.facets["gold"] for item in graded])
    wrong = np.bincount(clusters, weights=[item.score == 0 for item in graded])
    expected = 200 * (counts @ hits) / (2 * (counts @ hits) + counts @ wrong)
    np.testing.assert_allclose(drawn, expected)


@pytest.mark.parametrize("score", [f1, pairs])
def test_what_each_kind_of_item_adds_gives_the_interval_of_the_aggregate_on_every_draw(
    score: Aggregate, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(12)
    clusters = np.repeat(np.arange(250), 6)
    right = (generator.random(1500) < np.repeat(generator.beta(6, 2, 250), 6)).astype(float)
    gold = ["yes" if value else "no" for value in generator.integers(0, 2, 1500)]
    units = [str(place // 2) for place in range(1500)]
    graded = make_graded(right.tolist(), clusters.tolist(), gold=gold, unit=units)
    added = Clusters(graded).influence(score, graded, "official", most_kinds=50)
    assert added is not None
    assert abs(added.sum()) < 1e-9
    row = make_row(aggregate=score)
    quick = score_draws(row, graded, "official", draws=2000)
    monkeypatch.setattr(bootstrap, "_MANY_ITEMS", 10**9)
    slow = score_draws(row, graded, "official", draws=2000)
    # The same draws: they differ only by how a score bends.
    assert np.corrcoef(quick, slow)[0, 1] > 0.998
    assert quick.std() == pytest.approx(slow.std(), rel=0.02)
    ends = percentile_interval(quick, clusters=250), percentile_interval(slow, clusters=250)
    assert ends[0] == pytest.approx(ends[1], abs=0.1 * slow.std())


def test_too_many_kinds_of_items_or_a_sum_are_left_to_the_aggregate() -> None:
    graded = make_graded([1.0, 0.0, 0.5], list("abc"))
    clusters = Clusters(graded)
    assert clusters.influence(mean_percent, graded, "", most_kinds=2) is None
    assert clusters.influence(mean_percent, graded, "", most_kinds=3) is not None
    assert clusters.influence(lambda items, _: {"score": float(len(items))}, graded, "", most_kinds=3) is None


def test_draws_of_a_mean_vary_as_its_clustered_standard_error_says() -> None:
    generator = np.random.default_rng(4)
    clusters = np.repeat(np.arange(80), 6).tolist()
    scores = (generator.random(480) < np.repeat(generator.beta(3, 1, 80), 6)).astype(float).tolist()
    drawn = score_draws(make_row(), make_graded(scores, clusters), "official", draws=4000)
    assert standard_error(drawn, clusters=80) == pytest.approx(100 * clustered_error(scores, clusters), rel=0.05)


def test_the_same_seed_gives_the_same_draws_and_another_benchmark_others() -> None:
    graded = make_graded([1, 0, 1, 1, 0, 1], list("aabbcc"))
    first = score_draws(make_row("one"), graded, "official", draws=20)
    assert first.tolist() == score_draws(make_row("one"), graded, "official", draws=20).tolist()
    assert first.tolist() != score_draws(make_row("two"), graded, "official", draws=20).tolist()


def test_a_pair_drawn_twice_is_two_pairs() -> None:
    # One pair is right, the other is not. Taken for one pair of four items, a pair drawn twice would still count once,
    # and the mean over pairs would be 0 or 100 where only one of them is drawn, but never 50 with weights 1 and 2.
    graded = make_graded([1, 1, 1, 0, 1, 1], list("aabbcc"), unit=list("ppqqrr"))
    clusters = Clusters(graded)
    drawn = clusters.aggregate_draws(pairs, [graded], "official", draws=40, generator=np.random.default_rng(0))
    counts = draw_counts(3, draws=40, generator=np.random.default_rng(0))
    np.testing.assert_allclose(drawn[:, 0], 100 * (counts[:, 0] + counts[:, 2]) / 3)


def test_images_of_one_pair_are_drawn_together() -> None:
    graded = make_graded([1, 1, 1, 0], list("abcd"), unit=list("ppqq"))
    assert Clusters(graded).count == 2
    drawn = score_draws(make_row(aggregate=pairs), graded, "official", draws=30)
    assert set(drawn.tolist()) == {0.0, 50.0, 100.0}


def test_a_draw_without_a_needed_part_is_drawn_again() -> None:
    # F1 does not exist on a draw of rejections alone: 0 / 0.
    graded = make_graded([1, 1, 1], list("abc"), gold=["yes", "no", "no"])
    drawn = score_draws(make_row(aggregate=f1), graded, "official", draws=200)
    assert len(drawn) == 200
    assert set(drawn.tolist()) == {100.0}


def test_no_draw_gives_a_score_where_there_is_none() -> None:
    graded = make_graded([1, 1], list("ab"), gold=["no", "no"])
    with pytest.raises(EvaluationError, match="100 draws of 2 clusters give no score"):
        score_draws(make_row(aggregate=f1), graded, "official", draws=2)


def test_all_pairs_right_still_leave_doubt() -> None:
    graded = make_graded([1] * 20, [place // 2 for place in range(20)], unit=[str(place // 2) for place in range(20)])
    low, high = score_interval(make_row(aggregate=pairs), graded, "official")
    assert high == 100
    assert 60 < low < 75  # ten right of ten


def test_points_have_an_interval_in_points() -> None:
    row = make_row(mean_scale=1000.0, maximum=1000.0, aggregate=lambda items, _: {"score": 10 * _percent(items)})
    graded = make_graded([1, 0] * 50, range(100))
    low, high = score_interval(row, graded, "official")
    assert 350 < low < 500 < high < 650


def test_what_an_image_adds_to_an_f1_has_an_interval_around_it() -> None:
    generator = np.random.default_rng(5)
    clusters, gold = np.repeat(np.arange(40), 4).tolist(), ["yes", "no"] * 80
    on = make_graded((generator.random(160) < 0.9).astype(float).tolist(), clusters, gold=gold)
    off = make_graded((generator.random(160) < 0.5).astype(float).tolist(), clusters, gold=gold)
    row = make_row(aggregate=f1)
    added = f1(on, "")["score"] - f1(off, "")["score"]
    low, high = added_interval(row, on, off, "official")
    assert 0 < low < added < high


def test_an_average_over_benchmarks_is_surer_than_its_parts() -> None:
    generator = np.random.default_rng(6)
    parts = []
    for name, maximum in (("one", 100.0), ("two", 2000.0)):
        scale = maximum
        row = make_row(
            name,
            maximum=maximum,
            mean_scale=scale,
            aggregate=lambda items, _, scale=scale: {"score": scale / 100 * _percent(items)},
        )
        parts.append((row, make_graded((generator.random(200) < 0.7).astype(float).tolist(), range(200)), "official"))
    alone = [score_interval(row, graded, variant) for row, graded, variant in parts]
    low, high = average_interval(parts)
    assert (high - low) == pytest.approx((alone[0][1] - alone[0][0]) / 2**0.5, rel=0.15)
    assert 50 < low < 70 < high < 85


def _percent(items: object) -> float:
    scores = [item.score for item in items]  # type: ignore[attr-defined]
    return 100 * sum(scores) / len(scores)
