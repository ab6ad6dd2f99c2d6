"""``compare.html`` and its Markdown, with the items on which the models part, and ``correlation.html``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.compare import ComparedBenchmark, ModelComparison, Results, Verdict, paired_outcomes
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.statistics.correlation import BenchmarkCorrelation
from manyeyes.pages import Bar, Mark, Picture, Point, Table, Text, make_picture, render, scatter, span
from manyeyes.runtime.preprocess import decode_image

EXAMPLES = 12

ReadImage = Callable[[str, str], bytes | None]
"""(benchmark, sha256 of the image) to the file; ``None`` where it is not at hand."""

_HEADER = ("benchmark", "questions", "first", "second", "difference", "95%", "p", "p, Holm", "second is", "detects")
_IN_WORDS: Mapping[Verdict, str] = {"better": "better", "worse": "worse", "not shown": "not shown to differ"}
_KINDS: Mapping[Verdict, str] = {"better": "good", "worse": "bad", "not shown": "quiet"}
_NOTE = (
    "Difference: second minus first on the same questions, with a paired 95% interval over images. p: how often equals "
    "would differ as much or more; Holm's correction holds the chance of any false alarm on this page at 5%. Detects: "
    "the difference that a benchmark would show in four of five cases; a smaller one may be there unseen. The interval "
    "covers which questions were asked, not how another training seed would have come out."
)


def render_comparison(
    comparison: ModelComparison,
    first: Results,
    second: Results,
    *,
    read_image: ReadImage,
    images_missing: str = "",
    examples: int = EXAMPLES,
) -> str:
    """The whole page as one HTML file without scripts or references.

    Args:
        comparison: The figures.
        first: For its answers.
        second: For its answers.
        read_image: Gives the pictures.
        images_missing: Why there are none, for people; empty where there are.
        examples: Most items of each kind and benchmark.
    """

    def show(benchmark: str, sha256: str) -> Picture | None:
        data = read_image(benchmark, sha256) if sha256 else None
        return None if data is None else make_picture(decode_image(data))

    pairs = {name: paired_outcomes(first.items, second.items, name) for name in comparison.benchmarks}
    return render(
        "compare.html",
        **_shown(comparison, titles=True),
        strips=_strips(comparison),
        images_missing=images_missing,
        pairs={
            name: [_choose(outcomes, sign=sign, examples=examples) for sign in (1, -1)]
            for name, outcomes in pairs.items()
        },
        show=show,
    )


def render_comparison_text(comparison: ModelComparison) -> str:
    """The figures as Markdown."""
    return render("compare.md", **_shown(comparison, titles=False))


def _shown(comparison: ModelComparison, *, titles: bool) -> dict[str, object]:
    return {
        "title": f"{comparison.second.name} against {comparison.first.name}",
        "comparison": comparison,
        "sentence": _sentence(comparison),
        "figures": _table(comparison, titles=titles),
        "note": _NOTE,
    }


def images_to_show(
    first: Results, second: Results, benchmarks: Sequence[str], *, examples: int = EXAMPLES
) -> dict[str, set[str]]:
    """The sha256 of every image that the page shows, by benchmark."""
    wanted: dict[str, set[str]] = {}
    for name in benchmarks:
        outcomes = paired_outcomes(first.items, second.items, name)
        chosen = _choose(outcomes, sign=1, examples=examples) + _choose(outcomes, sign=-1, examples=examples)
        wanted[name] = {ours.image_sha256 for ours, _ in chosen if ours.image_sha256}
    return wanted


def _sentence(comparison: ModelComparison) -> str:
    verdicts = [compared.verdict for compared in comparison.benchmarks.values()]
    average = comparison.average
    mean = f"{average.difference:+.2f} points ({span(average.ci95, signed=True)}; p {_p(average.p)})"
    if len(verdicts) == 1:
        (compared,) = comparison.benchmarks.values()
        asked = f"{compared.n:,} questions on {compared.clusters:,} images"
        return f"The second is {_IN_WORDS[compared.verdict]}: {compared.difference:+.2f} {_unit(compared)} on {asked}."
    return (
        f"Of {len(verdicts)} benchmarks the second is better on {verdicts.count('better')}, worse on "
        f"{verdicts.count('worse')} and not shown to differ on {verdicts.count('not shown')}. Mean over benchmarks, "
        f"each as percent of its maximum: {mean}."
    )


def _table(comparison: ModelComparison, *, titles: bool) -> Table:
    rows: list[list[str | Text]] = [
        [
            compared.title if titles else name,
            f"{compared.n:,}",
            f"{compared.first:.2f}",
            f"{compared.second:.2f}",
            f"{compared.difference:+.2f}",
            span(compared.ci95, signed=True),
            _p(compared.p),
            _p(compared.p_holm),
            Text(_IN_WORDS[compared.verdict], kind=_KINDS[compared.verdict]),
            "" if compared.detectable is None else f"{compared.detectable:.2f}",
        ]
        for name, compared in comparison.benchmarks.items()
    ]
    return Table(_HEADER, rows, numbers=(1, 2, 3, 4, 6, 7, 9))


def _strips(comparison: ModelComparison) -> list[Bar]:
    """A dot and its interval for each benchmark around no difference; as percent of the maximum."""
    scales = {name: 100 / BENCHMARKS[name].maximum for name in comparison.benchmarks}
    ends = [abs(end) * scales[name] for name, compared in comparison.benchmarks.items() for end in compared.ci95]
    reach = max(ends, default=0) * 1.05 or 1.0
    bars = []
    for name, compared in comparison.benchmarks.items():
        difference, low, high = (scales[name] * value for value in (compared.difference, *compared.ci95))
        kind = "off" if compared.verdict == "not shown" else _KINDS[compared.verdict]
        bars.append(
            Bar(
                compared.title,
                f"{difference:+.2f}",
                interval=(low, high),
                dashed=0.0,
                marks=[Mark(difference, kind)],
                title=f"{difference:+.2f} ({span((low, high))})",
                scale=(-reach, reach),
            )
        )
    return sorted(bars, key=lambda bar: -bar.marks[0].at)


def _choose(outcomes: Sequence[tuple[Outcome, Outcome]], *, sign: int, examples: int) -> list[tuple[Outcome, Outcome]]:
    """The items with the largest gain of one side, evenly over the benchmark where they are alike."""
    gaining = [pair for pair in outcomes if sign * (pair[1].correct - pair[0].correct) > 0]
    largest = max((abs(pair[1].correct - pair[0].correct) for pair in gaining), default=0.0)
    best = [pair for pair in gaining if abs(pair[1].correct - pair[0].correct) == largest]
    if len(best) >= examples:
        return [best[place * len(best) // examples] for place in range(examples)]
    rest = [pair for pair in gaining if pair not in best]
    rest.sort(key=lambda pair: -abs(pair[1].correct - pair[0].correct))
    return (best + rest)[:examples]


def _unit(compared: ComparedBenchmark) -> str:
    return "points" if compared.unit == "percent" else "points of the benchmark's own"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


_NUM_COLOURS = 8


def render_correlation(found: BenchmarkCorrelation) -> str:
    """The page as one HTML file without scripts or references."""
    kinds = {name: f"group-{group % _NUM_COLOURS}" for name, group in found.groups.items()}
    groups = []
    for number in sorted(set(found.groups.values())):
        members = [name for name, group in found.groups.items() if group == number]
        known = {BENCHMARKS[name].cambrian_group or "" for name in members if name in BENCHMARKS} - {""}
        groups.append((kinds[members[0]], ", ".join(members), ", ".join(sorted(known))))
    points = [Point(x, y, name, name, kinds[name]) for name, (x, y) in found.loadings.items()]
    return render(
        "correlation.html",
        title=f"How {len(found.benchmarks)} benchmarks go together over {len(found.models)} models",
        found=found,
        shares=[f"{100 * share:.0f}%" for share in found.explained[:2]],
        groups=groups,
        plot=scatter(points, x_label="first component", y_label="second component", width=640, height=600),
        matrix=[(name, kinds[name], row) for name, row in zip(found.benchmarks, found.correlation, strict=True)],
    )
