"""Intervals of sub-scores: means of some items in closed form, all else drawn anew."""

from __future__ import annotations

import numpy as np
import pytest

from manyeyes.evaluation.benchmarks import BENCHMARKS, Graded
from manyeyes.evaluation.statistics import intervals as bootstrap
from manyeyes.evaluation.statistics.intervals import clustered_mean, sub_score_intervals

RANDOM = np.random.default_rng(5)


def mme(images: int, *, right: float, category: str = "count") -> list[Graded]:
    """Two questions an image."""
    return [
        Graded(
            f"{category}/{image}/{number}",
            f"{category}/{image}",
            "yes",
            float(RANDOM.random() < right),
            {"category": category, "unit": f"{category}/{image}"},
        )
        for image in range(images)
        for number in range(2)
    ]


def test_a_sub_score_that_is_a_mean_has_the_interval_of_its_items() -> None:
    kinds = ["colour", "shape", "shape"]
    graded = [
        Graded(str(n), str(n // 4), "a", float(n % 3 == 0), {"type": kinds[n % 7 % 3]} if n % 5 else {})
        for n in range(200)
    ]
    intervals = sub_score_intervals(BENCHMARKS["easy-vqa"], graded, "official")
    assert list(intervals) == ["colour", "shape"]
    for kind, ends in intervals.items():
        items = [item for item in graded if item.facets.get("type") == kind]
        expected = clustered_mean([item.score for item in items], [item.cluster for item in items])
        assert ends == pytest.approx((expected.low, expected.high))


def test_a_share_of_the_points_is_scaled_by_what_its_items_are_worth() -> None:
    # 30 of 40 questions are of one kind: 750 of OCRBench's 1,000 points.
    graded = [Graded(str(n), str(n), "a", float(n % 2), {"type": "Doc-oriented VQA"}) for n in range(30)]
    graded += [Graded(str(n), str(n), "a", 1.0, {"type": "Key Information Extraction"}) for n in range(30, 40)]
    intervals = sub_score_intervals(BENCHMARKS["ocrbench"], graded, "official")
    half = clustered_mean([float(n % 2) for n in range(30)], list(range(30)))
    assert intervals["Doc-oriented VQA"] == pytest.approx((7.5 * half.low, 7.5 * half.high))
    low, high = intervals["Key Information Extraction"]
    assert high == 250
    assert 0 < low < 250


def test_points_of_a_category_are_drawn_and_stay_within_its_points() -> None:
    graded = [*mme(30, right=0.7), *mme(30, right=1.0, category="color"), *mme(1, right=1.0, category="posters")]
    scores = BENCHMARKS["mme"].aggregate(graded, "official")
    intervals = sub_score_intervals(BENCHMARKS["mme"], graded, "official")
    assert intervals.keys() == scores.keys() - {"score"}
    for name, (low, high) in intervals.items():
        assert 0 <= low <= scores[name] <= high, name
    low, high = intervals["count"]
    assert 20 < high - low < 120
    # All right leaves doubt, one image tells nothing.
    assert scores["color"] == intervals["color"][1] == 200
    assert 150 < intervals["color"][0] < 200
    assert intervals["posters"] == (0, 200)
    # Nothing of cognition was asked.
    assert intervals["cognition"] == (0, 0)


def test_the_draws_of_the_score_and_of_its_other_name_agree() -> None:
    # MME's score is its perception, which is drawn a second time as a sub-score.
    graded = mme(40, right=0.8)
    clusters = bootstrap.Clusters(graded)
    aggregate = BENCHMARKS["mme"].aggregate
    (generator, again) = (np.random.default_rng(1) for _ in range(2))
    score = clusters.aggregate_draws(aggregate, [graded], "official", draws=50, generator=generator)[:, 0]
    names = ["perception", "accuracy"]
    both = clusters.sub_score_draws(aggregate, graded, "official", names, draws=50, generator=again)
    np.testing.assert_allclose(both[:, 0], score)
    assert np.ptp(both[:, 1]) > 0


def test_a_draw_without_a_sub_scores_items_says_nothing_of_it() -> None:
    rare = [Graded("r", "r", "a", 1.0, {"source": "rare", "type": "2D", "task": "Count"})]
    graded = rare + [
        Graded(str(n), str(n), "a", float(n % 3 > 0), {"source": "ADE20K", "type": "2D", "task": "Count"})
        for n in range(20)
    ]
    row = BENCHMARKS["cv-bench"]
    draws = bootstrap.Clusters(graded).sub_score_draws(
        row.aggregate, graded, "official", ["rare", "ADE20K"], generator=np.random.default_rng(0)
    )
    absent = np.isnan(draws[:, 0])
    assert absent.mean() == pytest.approx((20 / 21) ** 21, abs=0.05)
    assert (draws[~absent, 0] == 100).all()
    assert not np.isnan(draws[:, 1]).any()
    intervals = sub_score_intervals(row, graded, "official")
    assert intervals["rare"] == (0, 100)
    assert intervals["ADE20K"][1] - intervals["ADE20K"][0] < 60


def test_many_items_are_counted_by_kind_and_give_nearly_the_same_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    graded = []
    for image in range(150):
        for number in range(8):
            reference = ("yes", "no")[number % 2]
            right = generator.random() < 0.8
            said = reference if right else ("no", "yes")[number % 2]
            facets = {"category": ("random", "popular")[image % 2], "reference": reference}
            graded.append(Graded(f"{image}/{number}", str(image), said, float(right), facets))
    by_kind = sub_score_intervals(BENCHMARKS["pope"], graded, "official")
    monkeypatch.setattr(bootstrap, "_MANY_ITEMS", 10**9)
    drawn = sub_score_intervals(BENCHMARKS["pope"], graded, "official")
    for name, (low, high) in drawn.items():
        assert by_kind[name] == pytest.approx((low, high), abs=0.15 * (high - low)), name


def test_a_benchmark_without_sub_scores_has_no_intervals_of_them() -> None:
    assert sub_score_intervals(BENCHMARKS["gqa"], [Graded("a", "a", "x", 1.0)], "official") == {}
