"""Means with intervals that respect clusters: questions on one image are not independent of each other.

Every figure is a percentage, every interval is two-sided at 95%.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from manyeyes.errors import EvaluationError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        n: Items.
        clusters: Images that the items belong to.
        mean: Percent for a score, points for a difference.
        low: Lower end of the 95% interval, same unit.
        high: Upper end of the 95% interval, same unit.
    """

    n: int
    clusters: int
    mean: float
    low: float
    high: float


def clustered_mean(outcomes: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of outcomes in [0, 1] with a Wilson interval whose sample size is the effective one.

    The clustered standard error gives the design effect; ``n`` divided by it is how many independent items would know
    as much. Wilson's interval at that size stays inside [0, 100] and keeps its width where every answer is right.
    Clusters never count for more than independent items; where all outcomes are equal, each cluster counts once.

    Args:
        outcomes: One figure in [0, 1] per item; 1 is right.
        clusters: The image of each item.

    Raises:
        EvaluationError: No items, or as many clusters as items are not given.

    Source:
        Clustered standard errors: Miller, arXiv:2411.00640. Effective sample size inside a score interval: Korn and
        Graubard, Survey Methodology 24 (1998), 193-201; Dean and Pagano, J. Surv. Stat. Methodol. 3 (2015), 484-503.
    """
    values, groups, count = _checked(outcomes, clusters)
    n = len(values)
    mean = float(values.mean())
    if count == 1:
        return Estimate(n=n, clusters=1, mean=100 * mean, low=0.0, high=100.0)
    variance = _clustered_variance(values, groups, count)
    effective = min(float(n), max(1.0, mean * (1 - mean) / variance)) if variance > 0 else float(count)
    t = student_quantile((1 + CONFIDENCE) / 2, count - 1)
    t2 = t * t / effective
    centre = (mean + t2 / 2) / (1 + t2)
    half = t / (1 + t2) * float(np.sqrt(mean * (1 - mean) / effective + t2 / (4 * effective)))
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return Estimate(n=n, clusters=count, mean=100 * mean, low=100 * min(low, mean), high=100 * max(high, mean))


def clustered_error(values: Sequence[float] | NDArray[np.float64], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose items are independent between clusters only; infinite for one cluster.

    Args:
        values: One figure per item.
        clusters: The image of each item.

    Raises:
        EvaluationError: No items, or lengths differ.

    Source:
        Miller, arXiv:2411.00640, section 2.2, with the small-sample factor G / (G - 1).
    """
    array, groups, count = _checked(values, clusters)
    return float(np.sqrt(_clustered_variance(array, groups, count))) if count > 1 else float("inf")


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t.

    Args:
        probability: In (0, 1).
        degrees: Degrees of freedom, at least 1.
    """
    return float(special.stdtrit(degrees, probability))


def _checked(
    values: Sequence[float] | NDArray[np.float64], clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        raise EvaluationError("no items to score", "at least one", "Raise evaluation.max_items, or check the data set.")
    if len(clusters) != len(array):
        raise EvaluationError(
            f"{len(array)} outcomes and {len(clusters)} clusters", "one image per outcome", "Pass them in one order."
        )
    numbers: dict[Hashable, int] = {}
    groups = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
    return array, groups, len(numbers)


def _clustered_variance(values: NDArray[np.float64], groups: NDArray[np.int64], count: int) -> float:
    """Variance of the mean: squared residual sums per cluster, with the small-sample factor G / (G - 1)."""
    residual_sums = np.bincount(groups, weights=values - values.mean(), minlength=count)
    return float(count / (count - 1) * np.square(residual_sums).sum() / len(values) ** 2)
