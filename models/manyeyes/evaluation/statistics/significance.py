"""Whether two models differ: paired tests on the same items, corrected for how many are made, and what they could see.

Source: Miller, arXiv:2411.00640, sections 3.2 (paired differences) and 4 (power); Holm, Scandinavian Journal of
Statistics 6 (1979), 65-70. Holm's correction is six lines here: scipy has none, and statsmodels would be a dependency
for these alone.

Also the 95% interval of a benchmark's score, in the score's own unit; items of one image or document go together.
Means have a closed form (``scoring``), all else is resampled (``bootstrap``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow, Graded
from manyeyes.evaluation.statistics.intervals import (
    CONFIDENCE,
    DRAWS,
    Clusters,
    clustered_error,
    clustered_mean,
    percentile_interval,
    score_draws,
    seeded,
    standard_error,
    student_quantile,
)

POWER = 0.8


@dataclass(frozen=True)
class PairedTest:
    """How far apart two models' scores are on the same items.

    Attributes:
        clusters: Images or documents.
        difference: Second minus first, in the score's unit.
        error: Its standard error, clustered; infinite where one cluster tells nothing.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        p: Probability of a difference as large or larger were the models equally good; two-sided.
        detectable: Difference that this test finds four times out of five at the 5% level. ``None`` where the models
            never differ, which says nothing about how much they could.
    """

    clusters: int
    difference: float
    error: float
    low: float
    high: float
    p: float
    detectable: float | None


def compare_scores(
    row: BenchmarkRow,
    first: Sequence[Graded],
    second: Sequence[Graded],
    variant: str,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> PairedTest:
    """Test whether two models score differently on a benchmark.

    A mean has its clustered standard error; any other score that of the difference over clusters drawn with
    replacement, the same for both models. Interval and p use Student's t with one degree less than clusters.

    Args:
        row: The benchmark.
        first: One model's items.
        second: The other's, of the same items in the same order.
        variant: Whose scoring.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: No items, or not the same ones.
    """
    if [item.id for item in first] != [item.id for item in second]:
        raise EvaluationError(
            f"{row.name}: {len(first)} items against {len(second)}, not the same ones in one order",
            "the same items in both",
            "Score both models on the same benchmark.",
        )
    clusters = Clusters(first)
    difference = row.aggregate(second, variant)["score"] - row.aggregate(first, variant)["score"]
    if row.mean_scale is not None:
        gains = [b.score - a.score for a, b in zip(first, second, strict=True)]
        error = row.mean_scale * clustered_error(gains, clusters.groups.tolist())
    elif all(a.score == b.score and a.parsed == b.parsed for a, b in zip(first, second, strict=True)):
        error = 0.0 if clusters.count > 1 else math.inf
    else:
        drawn = clusters.aggregate_draws(
            row.aggregate, [first, second], variant, draws=draws, generator=seeded(row.name, seed)
        )
        error = standard_error(drawn[:, 1] - drawn[:, 0], clusters=clusters.count)
    return difference_test(difference, error, clusters=clusters.count, reach=row.maximum)


def average_difference(parts: Sequence[tuple[BenchmarkRow, PairedTest]]) -> PairedTest:
    """The mean difference over benchmarks, each as percent of its maximum.

    Benchmarks are taken for independent; their errors add as squares. Degrees of freedom: Welch and Satterthwaite.

    Args:
        parts: Each benchmark and its test.

    Raises:
        EvaluationError: No parts.
    """
    if not parts:
        raise EvaluationError("no benchmarks to average", "at least one", "Score one first.")
    scales = [100 / row.maximum / len(parts) for row, _ in parts]
    difference = sum(scale * test.difference for scale, (_, test) in zip(scales, parts, strict=True))
    squares = [(scale * test.error) ** 2 for scale, (_, test) in zip(scales, parts, strict=True)]
    total = sum(squares)
    degrees = 1.0
    if 0 < total < math.inf:
        shares = (square**2 / (test.clusters - 1) for square, (_, test) in zip(squares, parts, strict=True) if square)
        degrees = max(1.0, total**2 / sum(shares))
    return difference_test(difference, math.sqrt(total), clusters=int(degrees) + 1, reach=100.0)


def difference_test(difference: float, error: float, *, clusters: int, reach: float) -> PairedTest:
    """Interval, p and detectable difference from a difference and its standard error.

    Args:
        difference: In the score's unit.
        error: Its standard error, in the same unit.
        clusters: One more than the degrees of freedom.
        reach: The largest difference there is.
    """
    if clusters < 2 or math.isinf(error):
        return PairedTest(clusters, difference, math.inf, min(-reach, difference), max(reach, difference), 1.0, None)
    degrees = clusters - 1
    t = student_quantile((1 + CONFIDENCE) / 2, degrees)
    if error == 0:
        p = 1.0 if difference == 0 else 0.0
        return PairedTest(clusters, difference, 0.0, difference, difference, p, None)
    return PairedTest(
        clusters=clusters,
        difference=difference,
        error=error,
        # A score relative to a reference may be above its maximum, and so may a difference.
        low=max(min(-reach, difference), difference - t * error),
        high=min(max(reach, difference), difference + t * error),
        p=two_sided(difference / error, degrees),
        detectable=(t + student_quantile(POWER, degrees)) * error,
    )


def holm(values: Sequence[float]) -> list[float]:
    """Values of p corrected for being several: below 0.05 with a false alarm among all in one of twenty cases at most.

    Args:
        values: One p a test, in [0, 1].

    Returns:
        In the same order.
    """
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def two_sided(t: float, degrees: float) -> float:
    """Probability that Student's t is as far from 0 as ``t`` or farther.

    Args:
        t: The statistic.
        degrees: Degrees of freedom, above 0.
    """
    return float(2 * special.stdtr(degrees, -abs(t)))


def score_interval(row: BenchmarkRow, graded: Sequence[Graded], variant: str) -> tuple[float, float]:
    """Lower and upper end of the 95% interval of ``row.aggregate(graded, variant)["score"]``.

    Where every item scores alike no draw differs from another; each cluster then counts as one item of a mean, so that
    all right still leaves doubt.

    Args:
        row: The benchmark.
        graded: Its items.
        variant: Whose scoring.
    """
    outcomes = [item.score for item in graded]
    alike = len(set(outcomes)) == 1 and row.aggregate(graded, variant)["score"] in (0, row.maximum)
    if row.mean_scale is not None or alike:
        scale = (row.mean_scale or row.maximum) / 100
        estimate = clustered_mean(outcomes, [item.cluster for item in graded])
        return estimate.low * scale, estimate.high * scale
    low, high = percentile_interval(score_draws(row, graded, variant), clusters=Clusters(graded).count)
    score = row.aggregate(graded, variant)["score"]
    # A score relative to a reference may be above its maximum, but an interval of one cluster is not endless.
    top = max(high, score) if row.unit == "relative" and np.isfinite(high) else max(row.maximum, score)
    return max(0.0, min(low, score)), min(top, max(high, score))


def added_interval(
    row: BenchmarkRow, graded: Sequence[Graded], baseline: Sequence[Graded], variant: str
) -> tuple[float, float]:
    """The 95% interval of one score minus another on the same items in the same order, paired by cluster.

    Args:
        row: The benchmark.
        graded: Its items, answered in one way.
        baseline: The same items, answered in another.
        variant: Whose scoring.
    """
    test = compare_scores(row, baseline, graded, variant)
    return test.low, test.high
