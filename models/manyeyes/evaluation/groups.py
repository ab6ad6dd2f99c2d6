"""Cambrian-1's four groups of four benchmarks, and their averages.

Each benchmark counts as percent of its maximum: MME's perception by 20, OCRBench by 10. CV-Bench counts twice, as its
2D and its 3D part, whose mean its score is. A group that lacks a benchmark has no average, and says what it lacks.

Source: Cambrian-1, arXiv:2406.16860, table 1 and section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.scorecard import BenchmarkScore, GroupAverage
from manyeyes.evaluation.statistics.bootstrap import average_interval

GROUPS: dict[str, tuple[str, ...]] = {
    "general": ("mme", "mmbench", "seed", "gqa"),
    "knowledge": ("scienceqa", "mmmu", "mathvista", "ai2d"),
    "ocr-chart": ("chartqa", "ocrbench", "textvqa", "docvqa"),
    "vision-centric": ("mmvp", "realworldqa", "cv-bench", "cv-bench"),
}
"""Name of the group to its benchmarks; one that stands twice counts twice."""


def average_groups(benchmarks: Mapping[str, BenchmarkScore], outcomes: Sequence[Outcome]) -> dict[str, GroupAverage]:
    """The average of each group of which two benchmarks or more are scored, by name, in the groups' order.

    Args:
        benchmarks: Scores by benchmark.
        outcomes: Every item's answer; the intervals are drawn from them.
    """
    groups: dict[str, GroupAverage] = {}
    for group, names in GROUPS.items():
        percents = {
            name: round(100 * benchmarks[name].score / benchmarks[name].maximum, 4)
            for name in dict.fromkeys(names)
            if name in benchmarks
        }
        missing = [name for name in dict.fromkeys(names) if name not in benchmarks]
        if len(percents) < 2:
            continue
        if missing:
            groups[group] = GroupAverage(score=None, ci95=None, parts=percents, missing=missing)
            continue
        score = sum(percents[name] for name in names) / len(names)
        parts = {
            name: (
                find_benchmark(name),
                [outcome.graded for outcome in outcomes if outcome.benchmark == name],
                benchmarks[name].variant,
            )
            for name in percents
        }
        # A benchmark that stands twice is drawn the same way twice, so that its halves go together.
        low, high = average_interval([parts[name] for name in names])
        groups[group] = GroupAverage(
            score=round(score, 4),
            ci95=(round(max(0.0, min(low, score)), 4), round(min(100.0, max(high, score)), 4)),
            parts=percents,
            missing=[],
        )
    return groups
