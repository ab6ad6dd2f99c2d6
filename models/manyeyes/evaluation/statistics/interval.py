"""The 95% interval of a benchmark's score, in the score's own unit; items of one image or document go together.

Means have a closed form (``scoring``), all else is resampled (``bootstrap``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow, Graded
from manyeyes.evaluation.statistics.bootstrap import Clusters, percentile_interval, score_draws
from manyeyes.evaluation.statistics.scoring import clustered_mean
from manyeyes.evaluation.statistics.significance import compare_scores


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
