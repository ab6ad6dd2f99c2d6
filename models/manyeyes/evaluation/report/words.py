"""Figures and results in words, the same in every form of a report."""

from __future__ import annotations

from manyeyes.evaluation.scorecard import BenchmarkScore

CONDITION_TITLES = {
    "image-on": "with the image",
    "image-off": "without",
    "grey": "grey image",
    "other-image": "another's image",
}
NOTHING = "(nothing)"


def unit_mark(score: BenchmarkScore) -> str:
    """What stands behind a figure in the benchmark's unit."""
    return "" if score.unit == "points" else "%"


def meaning(score: BenchmarkScore) -> str:
    """What a figure in the benchmark's unit says."""
    if score.unit == "relative":
        return "of what the reference answers get"
    return "right" if score.unit == "percent" else f"of {score.maximum:g} points"


def verdict(score: float) -> str:
    """A tick, a cross, or the share of right."""
    return "✓" if score >= 1 else "✗" if score <= 0 else f"({score:.2f})"
