from __future__ import annotations

import numpy as np
import pytest

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.statistics.intervals import clustered_mean, student_quantile


@pytest.mark.parametrize("probability", [0.75, 0.95, 0.98])
def test_intervals_cover_the_truth_as_often_as_they_say(probability: float) -> None:
    # 150 images with about ten questions each; answers on one image go right or wrong together (a beta draw per
    # image). An interval that took questions for independent would cover far less often: asserted below.
    generator = np.random.default_rng(20)
    trials, images = 1000, 150
    covered = naive_covered = 0
    for _ in range(trials):
        sizes = generator.integers(6, 15, images)
        skill = generator.beta(2 * probability, 2 * (1 - probability), images)
        clusters = np.repeat(np.arange(images), sizes)
        outcomes = (generator.random(sizes.sum()) < np.repeat(skill, sizes)).astype(float)
        estimate = clustered_mean(outcomes.tolist(), clusters.tolist())
        covered += estimate.low <= 100 * probability <= estimate.high
        naive = 196 * np.sqrt(outcomes.var() / len(outcomes))
        naive_covered += abs(100 * outcomes.mean() - 100 * probability) <= naive
    # The standard error of a coverage of 95% over 1000 trials is 0.7 points.
    assert 0.925 <= covered / trials <= 0.975
    assert naive_covered / trials < 0.8


def test_independent_items_give_wilsons_interval() -> None:
    # 90 of 100 right, every item on an image of its own: Wilson's 95% interval is 82.56 to 94.48. Student's t with 99
    # degrees and the factor G / (G - 1), which the design effect is cut off at, make it slightly wider.
    estimate = clustered_mean([1.0] * 90 + [0.0] * 10, range(100))
    assert estimate.low == pytest.approx(82.56, abs=0.2)
    assert estimate.high == pytest.approx(94.48, abs=0.2)


def test_all_right_still_leaves_doubt() -> None:
    # 200 questions on 50 images: as sure as 50 independent answers, Wilson's lower end 50 / (50 + t^2).
    estimate = clustered_mean([1.0] * 200, [number // 4 for number in range(200)])
    t = student_quantile(0.975, 49)
    assert estimate.mean == estimate.high == 100
    assert estimate.low == pytest.approx(100 * 50 / (50 + t * t))


def test_one_image_says_nothing_about_others() -> None:
    estimate = clustered_mean([1.0, 1.0, 0.0], ["a", "a", "a"])
    assert (estimate.low, estimate.high) == (0, 100)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (30, 2.04227), (999, 1.96234)]
)
def test_student_quantile_equals_the_table(degrees: int, expected: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=2e-6)


def test_no_items_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no items"):
        clustered_mean([], [])


def test_other_lengths_are_refused() -> None:
    with pytest.raises(EvaluationError, match="2 outcomes and 1 clusters"):
        clustered_mean([1, 0], ["a"])
