from __future__ import annotations

import numpy as np
import pytest

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.scoring import clustered_mean, paired_difference, student_quantile


def test_paired_difference_equals_the_hand_computed_one() -> None:
    # Three images with two questions each. Differences: (+1, 0), (0, 0), (-1, +1): mean 1/6.
    # Residual sums per image: 1 - 2/6 = 2/3; -1/3; -1/3. Squares: 4/9 + 1/9 + 1/9 = 2/3.
    # Variance: 3/2 * (2/3) / 36 = 1/36, so the error is 1/6. t(0.975, 2) = 4.302653.
    challenger = [1, 1, 0, 1, 0, 1]
    champion = [0, 1, 0, 1, 1, 0]
    difference = paired_difference(challenger, champion, ["a", "a", "b", "b", "c", "c"])
    assert difference.n == 6
    assert difference.clusters == 3
    assert difference.mean == pytest.approx(100 / 6)
    assert difference.low == pytest.approx(100 * (1 / 6 - 4.302653 / 6), abs=1e-4)
    assert difference.high == pytest.approx(100 * (1 / 6 + 4.302653 / 6), abs=1e-4)


def test_equal_models_differ_by_nothing() -> None:
    difference = paired_difference([1, 0, 1], [1, 0, 1], ["a", "b", "c"])
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_the_difference_does_not_depend_on_the_order_of_items() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.integers(0, 2, (2, 60)).astype(float)
    images = generator.integers(0, 12, 60)
    order = generator.permutation(60)
    first = paired_difference(list(ours), list(theirs), images.tolist())
    second = paired_difference(list(ours[order]), list(theirs[order]), images[order].tolist())
    assert first.mean == pytest.approx(second.mean)
    assert first.low == pytest.approx(second.low)


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


def test_difference_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(21)
    trials, images, size = 1000, 100, 8
    clusters = np.repeat(np.arange(images), size).tolist()
    covered = 0
    for _ in range(trials):
        hard = np.repeat(generator.beta(8, 2, images), size)
        ours = (generator.random(images * size) < hard + 0.02 * (1 - hard)).astype(float)
        theirs = (generator.random(images * size) < hard).astype(float)
        difference = paired_difference(ours.tolist(), theirs.tolist(), clusters)
        covered += difference.low <= 100 * 0.02 * 0.2 <= difference.high
    assert 0.93 <= covered / trials <= 0.97


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
    with pytest.raises(EvaluationError, match="2 outcomes against 1"):
        paired_difference([1, 0], [1], ["a", "b"])
    with pytest.raises(EvaluationError, match="2 outcomes and 1 clusters"):
        clustered_mean([1, 0], ["a"])
