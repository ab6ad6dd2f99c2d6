"""``compare.html`` and its Markdown: the figures of a comparison, and the items on which the models part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.compare import ComparedBenchmark, ModelComparison, Verdict, paired_outcomes
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.page import markdown_table, page, table
from manyeyes.evaluation.picture import image_tag
from manyeyes.evaluation.results import Results
from manyeyes.evaluation.scorecard import Interval

EXAMPLES = 12

ReadImage = Callable[[str, str], bytes | None]
"""(benchmark, sha256 of the image) to the file; ``None`` where it is not at hand."""

_HEADER = ("benchmark", "questions", "first", "second", "difference", "95%", "p", "p, Holm", "second is", "detects")
_IN_WORDS: Mapping[Verdict, str] = {"better": "better", "worse": "worse", "not shown": "not shown to differ"}
_CLASS: Mapping[Verdict, str] = {"better": "good", "worse": "bad", "not shown": "quiet"}
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
    names = _names(comparison)
    title = f"{names[1]} against {names[0]}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_sentence(comparison))}</p>",
        f'<div class="key"><span>first: {escape(names[0])}</span><span>second: {escape(names[1])}</span></div>',
        table(_HEADER, _rows(comparison, html=True), numbers=[1, 2, 3, 4, 6, 7, 9]),
        f'<p class="quiet">{escape(_NOTE)}</p>',
        "<h2>Differences</h2>",
        _strips(comparison),
    ]
    if comparison.not_compared:
        left_out = [[escape(name), escape(reason)] for name, reason in comparison.not_compared.items()]
        parts += ["<h2>Not compared</h2>", table(["benchmark", "why"], left_out)]
    if images_missing:
        parts.append(f"<p><b>No pictures:</b> {escape(images_missing)}</p>")
    for name, compared in comparison.benchmarks.items():
        outcomes = paired_outcomes(first.items, second.items, name)
        parts.append(_items(name, compared, outcomes, names=names, read_image=read_image, examples=examples))
    parts.append(_fine_print(comparison))
    return page(title, "\n".join(parts))


def render_comparison_text(comparison: ModelComparison) -> str:
    """The figures as Markdown."""
    names = _names(comparison)
    lines = [
        f"# {names[1]} against {names[0]}",
        "",
        _sentence(comparison),
        "",
        markdown_table(_HEADER, _rows(comparison, html=False)),
        "",
        _NOTE,
    ]
    if comparison.not_compared:
        lines += ["", "Not compared: " + "; ".join(f"{n} ({why})" for n, why in comparison.not_compared.items()) + "."]
    return "\n".join(lines) + "\n"


def shown_images(
    first: Results, second: Results, benchmarks: Sequence[str], *, examples: int = EXAMPLES
) -> dict[str, set[str]]:
    """The sha256 of every image that the page shows, by benchmark."""
    wanted: dict[str, set[str]] = {}
    for name in benchmarks:
        outcomes = paired_outcomes(first.items, second.items, name)
        chosen = _choose(outcomes, sign=1, examples=examples) + _choose(outcomes, sign=-1, examples=examples)
        wanted[name] = {ours.image_sha256 for ours, _ in chosen if ours.image_sha256}
    return wanted


def _names(comparison: ModelComparison) -> tuple[str, str]:
    first, second = comparison.first, comparison.second
    return first.name, second.name


def _sentence(comparison: ModelComparison) -> str:
    verdicts = [compared.verdict for compared in comparison.benchmarks.values()]
    average = comparison.average
    mean = f"{average.difference:+.2f} points ({_span(average.ci95)}; p {_p(average.p)})"
    if len(verdicts) == 1:
        (compared,) = comparison.benchmarks.values()
        asked = f"{compared.n:,} questions on {compared.clusters:,} images"
        return f"The second is {_IN_WORDS[compared.verdict]}: {compared.difference:+.2f} {_unit(compared)} on {asked}."
    return (
        f"Of {len(verdicts)} benchmarks the second is better on {verdicts.count('better')}, worse on "
        f"{verdicts.count('worse')} and not shown to differ on {verdicts.count('not shown')}. Mean over benchmarks, "
        f"each as percent of its maximum: {mean}."
    )


def _rows(comparison: ModelComparison, *, html: bool) -> list[list[str]]:
    rows = []
    for name, compared in comparison.benchmarks.items():
        verdict = _IN_WORDS[compared.verdict]
        shown = f'<span class="{_CLASS[compared.verdict]}">{verdict}</span>' if html else verdict
        rows.append(
            [
                escape(compared.title) if html else name,
                f"{compared.n:,}",
                f"{compared.first:.2f}",
                f"{compared.second:.2f}",
                f"{compared.difference:+.2f}",
                f'<span class="nowrap">{_span(compared.ci95)}</span>' if html else _span(compared.ci95),
                _p(compared.p),
                _p(compared.p_holm),
                shown,
                "" if compared.detectable is None else f"{compared.detectable:.2f}",
            ]
        )
    return rows


def _strips(comparison: ModelComparison) -> str:
    """A dot and its interval for each benchmark around no difference; as percent of the maximum."""
    scaled = {}
    for name, compared in comparison.benchmarks.items():
        scale = _to_percent(name)
        scaled[name] = (compared.difference * scale, compared.ci95[0] * scale, compared.ci95[1] * scale)
    reach = max((abs(end) for _, low, high in scaled.values() for end in (low, high)), default=0) * 1.05 or 1.0

    def place(points: float) -> float:
        return 50 + 50 * max(-1.0, min(1.0, points / reach))

    parts = []
    for name, (difference, low, high) in sorted(scaled.items(), key=lambda entry: -entry[1][0]):
        compared = comparison.benchmarks[name]
        colour = {"better": "--good", "worse": "--bad", "not shown": "--off"}[compared.verdict]
        parts.append(
            f'<div class="group">{escape(compared.title)}</div>'
            f'<div class="track" title="{difference:+.2f} ({low:.2f} to {high:.2f})">'
            f'<div class="mark" style="left:50%"></div><div class="whisker" '
            f'style="left:{place(low):.2f}%;width:{place(high) - place(low):.2f}%"></div>'
            f'<div style="position:absolute;top:50%;left:{place(difference):.2f}%;width:.7rem;height:.7rem;'
            f'border-radius:50%;background:var({colour});transform:translate(-50%,-50%)"></div></div>'
            f"<div>{difference:+.2f}</div>"
        )
    key = (
        '<div class="key"><span><i class="dash"></i>no difference</span><span>right of it: the second is better</span>'
        "<span>whiskers: 95%</span><span>points of 100</span></div>"
    )
    return f'{key}<div class="bars">{"".join(parts)}</div>'


def _to_percent(name: str) -> float:
    return 100 / BENCHMARKS[name].maximum


def _items(
    name: str,
    compared: ComparedBenchmark,
    outcomes: Sequence[tuple[Outcome, Outcome]],
    *,
    names: tuple[str, str],
    read_image: ReadImage,
    examples: int,
) -> str:
    tiles = [
        (compared.only_second, "only the second right"),
        (compared.only_first, "only the first right"),
        (compared.both, "both right"),
        (compared.neither, "both wrong"),
    ]
    tile_html = "".join(f'<div class="tile"><b>{count:,}</b>{what}</div>' for count, what in tiles)
    parts = [f"<h2>{escape(compared.title)}</h2>", f'<div class="tiles">{tile_html}</div>']
    for sign, total, what in ((1, compared.only_second, names[1]), (-1, compared.only_first, names[0])):
        chosen = _choose(outcomes, sign=sign, examples=examples)
        if not chosen:
            parts.append(f"<p>No item on which only {escape(what)} is right.</p>")
            continue
        shown = f"{total:,}" if len(chosen) == total else f"{len(chosen)} of {total:,}, spread over the benchmark"
        cards = "".join(_card(name, pair, read_image) for pair in chosen)
        parts.append(f"<h3>Only {escape(what)} is right: {shown}</h3>" + f'<div class="samples">{cards}</div>')
    return "\n".join(parts)


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


def _card(name: str, pair: tuple[Outcome, Outcome], read_image: ReadImage) -> str:
    first, second = pair
    data = read_image(name, first.image_sha256) if first.image_sha256 else None
    picture = "" if data is None else image_tag(data, alt=first.id)
    answers = "".join(
        f"<li>{label}: {_answer(outcome)}</li>" for label, outcome in (("first", first), ("second", second))
    )
    return (
        f'<div class="sample">{picture}<ul><li>{escape(first.question)}</li>{answers}'
        f'<li>right: {escape(first.reference)}</li><li class="quiet">{escape(first.id)}</li></ul></div>'
    )


def _answer(outcome: Outcome) -> str:
    said = escape(outcome.prediction.strip() or "(nothing)")
    if outcome.correct in (0, 1):
        kind, mark = ("good", "✓") if outcome.correct else ("bad", "✗")
        return f'<span class="{kind}">{said} {mark}</span>'
    return f"{said} <b>({100 * outcome.correct:.0f}%)</b>"


def _fine_print(comparison: ModelComparison) -> str:
    rows = [
        [
            side,
            f"{escape(model.name)}: {escape(', '.join(part for part in (model.recipe, model.kind) if part))} "
            f"<code>{escape(model.digest)}</code>",
        ]
        for side, model in (("first", comparison.first), ("second", comparison.second))
    ]
    if comparison.data_md5:
        rows.append(["data", f"<code>{escape(comparison.data_md5)}</code>"])
    return f"<details><summary>Digests</summary>{table(['what', 'value'], rows)}</details>"


def _unit(compared: ComparedBenchmark) -> str:
    return "points" if compared.unit == "percent" else "points of the benchmark's own"


def _span(interval: Interval) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"
