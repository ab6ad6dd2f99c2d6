"""``report.html``: a report as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from manyeyes.evaluation.looking import looking_html
from manyeyes.evaluation.page import page
from manyeyes.evaluation.picture import image_tag
from manyeyes.evaluation.plots import scores_plot, trade_off_plots
from manyeyes.evaluation.report_contents import Example, ExampleAnswer, Report
from manyeyes.evaluation.report_tables import (
    Sheet,
    Text,
    comparison_sentences,
    comparison_sheet,
    conditions_sheet,
    examples_sentence,
    facts_sheet,
    groups_sheet,
    machines_sheet,
    mistakes_sheet,
    overview_sheet,
    settings_sheet,
    sources_sentence,
    sub_scores_sheet,
    trade_off_sentence,
    trade_off_sheet,
    types_sheet,
    unread_sheet,
)
from manyeyes.evaluation.report_words import (
    CONDITION_TITLES,
    NOTHING,
    figure,
    meaning,
    sentence,
    span,
    unit_mark,
    verdict,
)
from manyeyes.evaluation.scorecard import BenchmarkScore, Interval

_NOTES_SHOWN = 12


def render_html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The whole report as one HTML file without scripts or references.

    Args:
        report: What it says.
        pictures: Image files by sha256, for the examples; those that are missing are named instead.
    """
    return page(report.title, "\n".join(_parts(report, pictures)))


def _parts(report: Report, pictures: Mapping[str, bytes]) -> Iterator[str]:
    card = report.scorecard
    yield f"<h1>{escape(report.title)}</h1>"
    yield (
        f'<p class="quiet">Model <code>{escape(card.model.digest[:16])}</code>, data '
        f"<code>{escape(card.data_md5[:16])}</code>. All intervals are at 95% and clustered by image.</p>"
    )
    for name, reason in card.skipped.items():
        yield f"<p>{escape(name)} is not scored: {escape(reason)}.</p>"
    if len(card.benchmarks) > 1:
        yield f"<h2>{len(card.benchmarks)} benchmarks</h2>{_table(overview_sheet(report))}"
        yield _section("Cambrian-1's groups", groups_sheet(report))
    if card.benchmarks:
        yield from _comparison(report)
        yield looking_html(card)
    for name, score in card.benchmarks.items():
        yield from _benchmark(report, name, score, pictures)
    yield from _reproduction(report)


def _comparison(report: Report) -> Iterator[str]:
    yield "<h2>Beside other models</h2>"
    yield "".join(f"<p>{escape(text)}</p>" for text in comparison_sentences(report))
    yield _table(comparison_sheet(report))
    if report.comparison.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.comparison.notes)
        # All benchmarks against all four systems have some fifty.
        start = "<details open>" if len(report.comparison.notes) <= _NOTES_SHOWN else "<details>"
        yield f'{start}<summary>Notes on what differs</summary><ol class="notes">{notes}</ol></details>'
    sources = sources_sentence(report)
    if sources:
        yield f'<p class="quiet">{escape(sources)}</p>'
    if len(report.comparison.rows) > 1:
        yield f"<h3>Score by benchmark</h3>{scores_plot(report)}"
    trade_off = trade_off_sheet(report)
    if trade_off is not None:
        yield f"<h3>Score against cost</h3><p>{escape(trade_off_sentence(report))}</p>"
        yield trade_off_plots(report)
        yield _table(trade_off)
    yield _section("Size and cost", facts_sheet(report), tag="h3")


def _benchmark(report: Report, name: str, score: BenchmarkScore, pictures: Mapping[str, bytes]) -> Iterator[str]:
    details = report.details[name]
    mark = unit_mark(score)
    tiles = [
        (f"{figure(score.score)}{mark}", f"{meaning(score)}, with the image", span(score.ci95)),
        (f"{figure(score.image_off)}{mark}", f"{meaning(score)}, image removed", span(score.image_off_ci95)),
        (f"{score.image_adds:+.2f}", "points from the image", span(score.image_adds_ci95, signed=True)),
        (f"{score.parse_failures:,}", "answers not understood", f"of {score.n:,} questions"),
    ]
    shown = "".join(
        f'<div class="tile"><b>{value}</b>{escape(what)}<span>{detail}</span></div>' for value, what, detail in tiles
    )
    yield f"<h2>{escape(details.title)}</h2><p>{escape(sentence(score))}</p>"
    yield f'<p class="quiet">{escape(details.metric)}; {escape(details.dataset)}.</p>'
    yield f'<div class="tiles">{shown}</div>'
    yield f"<h3>By what is shown</h3>{_table(conditions_sheet(score))}"
    yield f"<h3>By type of answer</h3>{_bars(score)}"
    yield f"<details><summary>The figures</summary>{_table(types_sheet(score))}</details>"
    yield _section("Sub-scores", sub_scores_sheet(score), tag="h3")
    if details.mistakes:
        yield f"<h3>Most frequent mistakes</h3><p>Wrong answers: {details.wrong:,}.</p>"
        yield _table(mistakes_sheet(report, name))
    else:
        yield "<h3>Mistakes</h3><p>None: every answer is right.</p>"
    if details.unread:
        yield f"<h3>Not understood</h3><p>{escape(_unread_sentence(score, len(details.unread)))}</p>"
        yield _table(unread_sheet(report, name))
    if details.worst:
        yield f"<h3>Worst images</h3><p>{escape(examples_sentence(report, name))}</p>"
        yield _examples(details.worst, pictures)
    if details.best:
        yield "<h3>Best images</h3><p>Every answer is right, and the image makes the most difference.</p>"
        yield _examples(details.best, pictures)


def _unread_sentence(score: BenchmarkScore, shown: int) -> str:
    first = f"; the first {shown:,}" if shown < score.parse_failures else ""
    return f"{score.parse_failures:,} texts that no answer could be read from{first}."


def _bars(score: BenchmarkScore) -> str:
    scale = 100 / score.maximum
    ends, ends_off = ((low * scale, high * scale) for low, high in (score.ci95, score.image_off_ci95))
    rows = [_bar_pair(f"all ({score.n:,})", score.score * scale, ends, score.image_off * scale, ends_off, score)]
    # One type alone is all of them.
    rows += [
        _bar_pair(f"{name} ({part.n:,})", part.score, part.ci95, part.image_off, part.image_off_ci95, None)
        for name, part in score.by_type.items()
        if len(score.by_type) > 1
    ]
    ceiling = ""
    if score.question_only_ceiling is not None:
        ceiling = '<span><i class="dash"></i>best possible from the question alone</span>'
    key = (
        '<div class="key"><span><i class="on"></i>with the image</span><span><i class="off"></i>image removed</span>'
        f"{ceiling}<span>whiskers: 95%</span></div>"
    )
    return f'{key}<div class="bars">{"".join(rows)}</div>'


def _bar_pair(
    label: str, on: float, on_ci: Interval, off: float, off_ci: Interval, ceiling_of: BenchmarkScore | None
) -> str:
    ceiling = ""
    if ceiling_of is not None and ceiling_of.question_only_ceiling is not None:
        ceiling = f'<div class="mark" style="left:{ceiling_of.question_only_ceiling:.2f}%"></div>'
    return (
        f'<div class="group">{escape(label)}</div>{_bar("on", on, on_ci, "")}<div>{on:.2f}%</div>'
        f'<div class="group next"></div>{_bar("off next", off, off_ci, ceiling)}<div class="next">{off:.2f}%</div>'
    )


def _bar(kind: str, value: float, interval: Interval, extra: str) -> str:
    # A score relative to a reference may be above 100.
    low, high = (min(100.0, end) for end in interval)
    fill, _, place = kind.partition(" ")
    return (
        f'<div class="track {place}" title="{value:.2f}% ({span(interval)})">'
        f'<div class="fill {fill}" style="width:{min(100.0, value):.2f}%">'
        f'</div><div class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>{extra}</div>'
    )


def _examples(examples: list[Example], pictures: Mapping[str, bytes]) -> str:
    return f'<div class="samples">{"".join(_example(example, pictures) for example in examples)}</div>'


def _example(example: Example, pictures: Mapping[str, bytes]) -> str:
    lines = "".join(_answer(answer) for answer in example.answers)
    more = f'<li class="quiet">and {example.left_out:,} more</li>' if example.left_out else ""
    picture = pictures.get(example.image_sha256)
    shown = (
        f"<code>{escape(example.image_sha256[:12])}</code>"
        if picture is None
        else image_tag(picture, alt=example.item.partition("#")[0])
    )
    return f'<div class="sample">{shown}<ul>{lines}{more}</ul></div>'


def _answer(answer: ExampleAnswer) -> str:
    said = escape(answer.answers["image-on"] or NOTHING)
    score = answer.scores["image-on"]
    right = "" if score >= 1 else f" right: {escape(answer.reference)}"
    kind = "good" if score >= 1 else "bad"
    others = "".join(
        f'<div class="quiet">{CONDITION_TITLES[name]}: {escape(text or NOTHING)} {verdict(answer.scores[name])}</div>'
        for name, text in answer.answers.items()
        if name != "image-on"
    )
    return f'<li>{escape(answer.question)}<br><span class="{kind}">{said} {verdict(score)}</span>{right}{others}</li>'


def _reproduction(report: Report) -> Iterator[str]:
    found = report.reproduction
    yield "<h2>To get these figures again</h2>"
    yield f'<pre class="wrap">{escape(found.command)}</pre>'
    if found.started_as:
        yield f'<p>It was started as:</p><pre class="wrap">{escape(found.started_as)}</pre>'
    yield _table(machines_sheet(report))
    if found.recipe:
        yield f"<details><summary>recipe.yaml</summary><pre>{escape(found.recipe)}</pre></details>"
    for details in report.details.values():
        whole = "" if details.prompt_is_whole else ", between the turns of the tokenizer's own chat template"
        yield (
            f"<details><summary>{escape(details.title)}: all that the model reads for the first question{whole}"
            f'</summary><pre class="wrap">{escape(details.prompt)}</pre></details>'
        )
    yield f"<details><summary>Digests and settings</summary>{_table(settings_sheet(report))}</details>"


def _section(title: str, sheet: Sheet | None, *, tag: str = "h2") -> str:
    return "" if sheet is None else f"<{tag}>{escape(title)}</{tag}>{_table(sheet)}"


def _table(sheet: Sheet) -> str:
    def cell(tag: str, place: int, content: str) -> str:
        kind = ' class="number"' if place in sheet.numbers else ""
        label = f' data-label="{escape(sheet.header[place])}"' if tag == "td" and sheet.stacked else ""
        return f"<{tag}{kind}{label}>{content}</{tag}>"

    def line(place: int, row: list[str | Text]) -> str:
        cells = "".join(cell("td", column, _content(sheet, column, value)) for column, value in enumerate(row))
        return f'<tr class="strong">{cells}</tr>' if place in sheet.strong else f"<tr>{cells}</tr>"

    head = "".join(cell("th", place, escape(title)) for place, title in enumerate(sheet.header))
    body = "\n".join(line(place, row) for place, row in enumerate(sheet.rows))
    start = '<table class="stack">' if sheet.stacked else "<table>"
    return f'<div class="scroll">{start}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _content(sheet: Sheet, column: int, value: str | Text) -> str:
    text = value if isinstance(value, Text) else Text(value)
    main = f"<code>{escape(text.main)}</code>" if column in sheet.code else escape(text.main)
    if sheet.header[column] == "95%":
        main = f'<span class="nowrap">{main}</span>'
    notes = f"<sup>[{', '.join(map(str, text.notes))}]</sup>" if text.notes else ""
    detail = f'<span class="detail">{escape(text.detail)}</span>' if text.detail else ""
    return f"{main}{notes}{detail}"
