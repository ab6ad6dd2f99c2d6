"""The 95% intervals of a benchmark's sub-scores: categories, skills, kinds of question, other figures on its items.

A sub-score of a benchmark that is a mean is the mean of some of its items, and gets a mean's interval (``scoring``).
Any other is drawn anew with the clusters (``bootstrap``), all of a benchmark's at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow, Graded
from manyeyes.evaluation.statistics.bootstrap import Clusters, Floats, percentile_interval, seeded
from manyeyes.evaluation.statistics.scoring import clustered_mean

Interval = tuple[float, float]


def sub_score_intervals(row: BenchmarkRow, graded: Sequence[Graded], variant: str) -> dict[str, Interval]:
    """Lower and upper end of every sub-score of ``row.aggregate(graded, variant)``, by name.

    Intervals are not widened for being several.

    Args:
        row: The benchmark.
        graded: Its items.
        variant: Whose scoring.

    Returns:
        In each sub-score's own unit, which its interval never leaves.
    """
    scores = row.aggregate(graded, variant)
    names = [name for name in scores if name != "score"]
    if not names:
        return {}
    members = _members(row, graded, variant, names)
    intervals: dict[str, Interval] = {}
    if row.mean_scale is not None:
        for name in names:
            interval = _interval_of_mean(row, members[name], scores[name], len(graded))
            if interval is not None:
                intervals[name] = interval
    drawn = [name for name in names if name not in intervals]
    if drawn:
        clusters = Clusters(graded)
        draws = clusters.sub_score_draws(row.aggregate, graded, variant, drawn, generator=seeded(row.name, 0))
        right = row.aggregate([replace(item, score=1.0) for item in graded], variant)
        for column, name in enumerate(drawn):
            top = right.get(name, scores[name]) if row.unit == "points" else 100.0
            intervals[name] = _drawn_interval(row, draws[:, column], members[name], scores[name], top)
    return {name: intervals[name] for name in names}


def _members(
    row: BenchmarkRow, graded: Sequence[Graded], variant: str, names: Sequence[str]
) -> dict[str, Sequence[Graded]]:
    """The items of each sub-score: those that, on their own, still have it."""
    kinds: dict[object, list[Graded]] = {}
    for item in graded:
        kind = tuple(sorted((name, value) for name, value in item.facets.items() if name != "unit"))
        kinds.setdefault(kind, []).append(item)
    members: dict[str, list[Graded]] = {name: [] for name in names}
    for alike in kinds.values():
        # Where a figure needs more than one kind of item nothing is known of its parts, and all items count.
        alone = _aggregate(row, alike, variant) or dict.fromkeys(names, 0.0)
        for name in names:
            if name in alone:
                members[name] += alike
    return {name: items or graded for name, items in members.items()}


def _aggregate(row: BenchmarkRow, graded: Sequence[Graded], variant: str) -> Mapping[str, float] | None:
    try:
        return row.aggregate(graded, variant)
    except ZeroDivisionError:
        return None


def _interval_of_mean(row: BenchmarkRow, items: Sequence[Graded], value: float, n: int) -> Interval | None:
    """The interval of a mean of ``items``; ``None`` where the sub-score is none."""
    assert row.mean_scale is not None
    estimate = clustered_mean([item.score for item in items], [item.cluster for item in items])
    # Points of a whole (OCRBench) are worth their share of it.
    for scale in (row.mean_scale / 100, row.mean_scale / 100 * len(items) / n):
        if math.isclose(estimate.mean * scale, value, rel_tol=1e-9, abs_tol=1e-9):
            return min(estimate.low * scale, value), max(estimate.high * scale, value)
    return None


def _drawn_interval(row: BenchmarkRow, draws: Floats, items: Sequence[Graded], value: float, top: float) -> Interval:
    draws = draws[~np.isnan(draws)]
    clusters = [item.cluster for item in items]
    if row.unit != "relative" and (draws.size == 0 or np.ptp(draws) < 1e-9) and value in (0, top) and top > 0:
        # No draw differs from another; each cluster then counts as one item of a mean, so that doubt is left.
        estimate = clustered_mean([value / top] * len(items), clusters)
        return estimate.low * top / 100, estimate.high * top / 100
    low, high = percentile_interval(draws, clusters=len(set(clusters))) if draws.size else (-math.inf, math.inf)
    if row.unit == "relative" and math.isfinite(high):
        top = high
    return max(0.0, min(low, value)), max(value, min(high, top))
