"""Does the model look? Benchmarks by what the image adds, beside what guessing gets.

A benchmark on which little is gained by the image measures the language model; one on which a model with a grey or a
wrong image does as well as with the right one, too.

Source: Cambrian-1, arXiv:2406.16860, sorts benchmarks so.
"""

from __future__ import annotations

from html import escape

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.page import markdown_table, table
from manyeyes.evaluation.scorecard import BenchmarkScore, Interval, Scorecard

_OTHER = "other-image"
_HEADER = (
    "benchmark",
    "with image",
    "no image",
    "grey image",
    "another's image",
    "guessing",
    "image adds",
    "95%",
)
_NOTE = (
    "Image adds: the score with the image minus the score without, in points; 95% paired, clustered by image. "
    "Guessing: what blind guessing gets on an item on average; scores of pairs or categories are no means of items."
)
_MARKS = {
    "off": ("no image", "○", "--quiet"),
    "grey": ("grey image", "■", "--quiet"),
    _OTHER: ("another item's image", "▲", "--bad"),
    "on": ("with the image", "●", "--on"),
}
"""By what is shown: in words, sign and colour; the last one is drawn on top."""


def by_image(scorecard: Scorecard) -> dict[str, BenchmarkScore]:
    """The benchmarks, the one to which the image adds most first; by percent of the maximum."""
    ranked = sorted(scorecard.benchmarks.items(), key=lambda entry: -entry[1].image_adds / entry[1].maximum)
    return dict(ranked)


def looking_html(scorecard: Scorecard) -> str:
    """A section: a chart and a table, sorted by what the image adds."""
    rows = [
        [escape(_title(name)), *cells[:6], f'<span class="nowrap">{cells[6]}</span>']
        for name, cells in ((name, _cells(score)) for name, score in by_image(scorecard).items())
    ]
    key = "".join(
        f'<span><b class="glyph" style="color:var({colour})">{sign}</b> {what}</span>'
        for what, sign, colour in reversed(_MARKS.values())
    )
    bars = "".join(_bar(_title(name), score) for name, score in by_image(scorecard).items())
    return "\n".join(
        [
            "<h2>Does it look?</h2>",
            f"<p>{escape(_sentence(scorecard))}</p>",
            f'<div class="key">{key}<span><i class="dash"></i>guessing</span></div>',
            f'<div class="bars strip">{bars}</div>',
            table(_HEADER, rows, numbers=[1, 2, 3, 4, 5, 6]),
            f'<p class="quiet">{escape(_NOTE)}</p>',
        ]
    )


def looking_markdown(scorecard: Scorecard) -> str:
    """The table as Markdown."""
    rows = [[name, *_cells(score)] for name, score in by_image(scorecard).items()]
    return "\n".join(["## Does it look?", "", _sentence(scorecard), "", markdown_table(_HEADER, rows), "", _NOTE, ""])


def _sentence(scorecard: Scorecard) -> str:
    blind = [
        name
        for name, score in by_image(scorecard).items()
        if any(
            low <= 0 for low in [score.image_adds_ci95[0], *(c.image_adds_ci95[0] for c in score.conditions.values())]
        )
    ]
    if not blind:
        return "On every benchmark the right image adds to the score, whatever takes its place."
    return f"Not shown to need the right image (an interval of what it adds reaches 0): {', '.join(blind)}."


def _cells(score: BenchmarkScore) -> list[str]:
    shown = {name: f"{condition.score:.2f}" for name, condition in score.conditions.items()}
    return [
        f"{score.score:.2f}",
        f"{score.image_off:.2f}",
        shown.get("grey", "not asked"),
        shown.get(_OTHER, "not asked"),
        f"{score.chance:.2f}%",
        f"{score.image_adds:+.2f}",
        _span(score.image_adds_ci95),
    ]


def _bar(title: str, score: BenchmarkScore) -> str:
    values = {name: condition.score for name, condition in score.conditions.items()}
    values |= {"off": score.image_off, "on": score.score}
    marks = "".join(
        f'<span class="glyph at" style="left:{min(100.0, 100 * values[name] / score.maximum):.2f}%;'
        f'color:var({colour})" title="{what}: {values[name]:.2f}">{sign}</span>'
        for name, (what, sign, colour) in _MARKS.items()
        if name in values
    )
    low, high = sorted(min(100.0, 100 * value / score.maximum) for value in (score.image_off, score.score))
    return (
        f'<div class="group">{escape(title)}</div><div class="track">'
        f'<div class="span" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
        f'<div class="mark" style="left:{score.chance:.2f}%" title="guessing: {score.chance:.2f}"></div>{marks}</div>'
        f"<div>{score.image_adds:+.2f}</div>"
    )


def _title(name: str) -> str:
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def _span(interval: Interval) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}"
