"""Does the model look? Benchmarks by what the image adds, beside what guessing gets.

A benchmark on which little is gained by the image measures the language model; one on which a model with a grey or a
wrong image does as well as with the right one, too.

Source: Cambrian-1, arXiv:2406.16860, sorts benchmarks so.
"""

from __future__ import annotations

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard
from manyeyes.pages import Bar, Mark, Table, span

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
NOTE = (
    "Image adds: the score with the image minus the score without, in points; 95% paired, clustered by image. "
    "Guessing: what blind guessing gets on an item on average; scores of pairs or categories are no means of items."
)
MARKS = {
    "off": ("no image", "○", "quiet"),
    "grey": ("grey image", "■", "quiet"),
    _OTHER: ("another item's image", "▲", "bad"),
    "on": ("with the image", "●", "on"),
}
"""By what is shown: in words, sign and colour; the last one is drawn on top."""


def by_image(scorecard: Scorecard) -> dict[str, BenchmarkScore]:
    """The benchmarks, the one to which the image adds most first; by percent of the maximum."""
    ranked = sorted(scorecard.benchmarks.items(), key=lambda entry: -entry[1].image_adds / entry[1].maximum)
    return dict(ranked)


def looking_sentence(scorecard: Scorecard) -> str:
    """Which benchmarks do not need the image."""
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


def looking_table(scorecard: Scorecard, *, titles: bool) -> Table:
    """The figures, sorted by what the image adds, under the benchmarks' titles or their names."""
    rows = [
        [
            _title(name) if titles else name,
            f"{score.score:.2f}",
            f"{score.image_off:.2f}",
            *(
                f"{score.conditions[shown].score:.2f}" if shown in score.conditions else "not asked"
                for shown in ("grey", _OTHER)
            ),
            f"{score.chance:.2f}%",
            f"{score.image_adds:+.2f}",
            span(score.image_adds_ci95, signed=True),
        ]
        for name, score in by_image(scorecard).items()
    ]
    return Table(_HEADER, rows, numbers=(1, 2, 3, 4, 5, 6))


def looking_bars(scorecard: Scorecard) -> list[Bar]:
    """The same as marks on a line for each benchmark."""
    bars = []
    for name, score in by_image(scorecard).items():
        values = {condition: shown.score for condition, shown in score.conditions.items()}
        values |= {"off": score.image_off, "on": score.score}
        marks = [
            Mark(values[key], kind, f"{what}: {values[key]:.2f}", sign)
            for key, (what, sign, kind) in MARKS.items()
            if key in values
        ]
        low, high = sorted((score.image_off, score.score))
        bars.append(
            Bar(
                _title(name),
                f"{score.image_adds:+.2f}",
                joined=(low, high),
                # Guessing is in percent, whatever the benchmark's unit.
                dashed=score.chance * score.maximum / 100,
                marks=marks,
                title=f"guessing: {score.chance:.2f}",
                scale=(0.0, score.maximum),
            )
        )
    return bars


def _title(name: str) -> str:
    return BENCHMARKS[name].title if name in BENCHMARKS else name
