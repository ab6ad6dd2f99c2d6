"""Figures and results in words, the same in every form of a report."""

from __future__ import annotations

from manyeyes.evaluation.scorecard import BenchmarkScore
from manyeyes.pages import span

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


def sentence(score: BenchmarkScore) -> str:
    """A benchmark's result in one or two sentences."""
    asked = (
        f"{score.n:,} questions on {score.images:,} images"
        if score.n == score.n_total
        else f"{score.n:,} of {score.n_total:,} questions, on {score.images:,} images; the judge gave no verdict on "
        f"{score.unjudged:,}"
        if score.unjudged
        else f"only the first {score.n:,} of {score.n_total:,} questions, on {score.images:,} images"
    )
    right = "% right" if score.unit == "percent" else f"{unit_mark(score)} {meaning(score)}"
    ceiling = ""
    if score.question_only_ceiling is not None:
        ceiling = f" The question alone allows at most {score.question_only_ceiling:.2f}%."
    chosen = ""
    if score.multiple_choice != "generate":
        chosen = (
            f" {score.chosen:,} answers were chosen from options after one prefill (likelihood), not written: another "
            "protocol than the papers', in which none can be unreadable."
        )
    return (
        f"{score.score:.2f}{right} ({span(score.ci95)}) on {asked}; {score.image_off:.2f}{unit_mark(score)} without "
        f"the image.{ceiling}{chosen}"
    )


def verdict(score: float) -> str:
    """A tick, a cross, or the share of right."""
    return "✓" if score >= 1 else "✗" if score <= 0 else f"({score:.2f})"
