"""``report.md``: a report for a terminal or the Kubeflow UI, pictures left out."""

from __future__ import annotations

from collections.abc import Iterator

from manyeyes.evaluation.looking import looking_markdown
from manyeyes.evaluation.page import markdown_table
from manyeyes.evaluation.report_contents import Example, Report
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
from manyeyes.evaluation.report_words import CONDITION_TITLES, NOTHING, sentence, verdict
from manyeyes.evaluation.scorecard import BenchmarkScore


def render_markdown(report: Report) -> str:
    """The whole report as Markdown.

    Args:
        report: What it says.
    """
    return "\n".join(part for part in _parts(report) if part is not None) + "\n"


def _parts(report: Report) -> Iterator[str]:
    card = report.scorecard
    yield f"# {report.title}\n"
    digests = f"Model `{card.model.digest[:16]}`, data `{card.data_md5[:16]}`."
    yield f"{digests} All intervals are at 95% and clustered by image.\n"
    for name, reason in card.skipped.items():
        yield f"{name} is not scored: {reason}.\n"
    if len(card.benchmarks) > 1:
        yield f"## {len(card.benchmarks)} benchmarks\n\n{_table(overview_sheet(report))}\n"
        yield from _section("## Cambrian-1's groups", groups_sheet(report))
    if card.benchmarks:
        yield from _comparison(report)
        yield looking_markdown(card)
    for name, score in card.benchmarks.items():
        yield from _benchmark(report, name, score)
    yield from _reproduction(report)


def _comparison(report: Report) -> Iterator[str]:
    yield "## Beside other models\n"
    yield "\n\n".join(_plain(text) for text in comparison_sentences(report)) + "\n"
    yield _table(comparison_sheet(report)) + "\n"
    for number, note in enumerate(report.comparison.notes, start=1):
        yield f"{number}. {_plain(note)}"
    if report.comparison.notes:
        yield ""
    sources = sources_sentence(report)
    if sources:
        yield f"{_plain(sources)}\n"
    trade_off = trade_off_sheet(report)
    if trade_off is not None:
        yield f"### Score against cost\n\n{_plain(trade_off_sentence(report))}\n\n{_table(trade_off)}\n"
    yield from _section("### Size and cost", facts_sheet(report))


def _benchmark(report: Report, name: str, score: BenchmarkScore) -> Iterator[str]:
    details = report.details[name]
    yield f"## {details.title}\n\n{sentence(score)}\n\n{_plain(details.metric)}; {_plain(details.dataset)}.\n"
    yield f"{_table(conditions_sheet(score))}\n\n{_table(types_sheet(score))}\n"
    yield from _section("### Sub-scores", sub_scores_sheet(score))
    if details.mistakes:
        yield f"Most frequent mistakes; wrong answers: {details.wrong:,}.\n"
        yield f"{_table(mistakes_sheet(report, name))}\n"
    if details.unread:
        yield f"### Not understood\n\n{_table(unread_sheet(report, name))}\n"
    for title, examples in (("Worst", details.worst), ("Best", details.best)):
        if examples:
            text = f"{examples_sentence(report, name)}\n\n" if title == "Worst" else ""
            yield f"### {title} images\n\n{text}{_table(_examples(examples))}\n"


def _examples(examples: list[Example]) -> Sheet:
    conditions = [name for name in CONDITION_TITLES if any(name in answer.answers for answer in examples[0].answers)]
    rows: list[list[str | Text]] = []
    for example in examples:
        for answer in example.answers:
            rows.append(
                [
                    example.item.partition("#")[0],
                    answer.question,
                    answer.reference,
                    *(
                        f"{answer.answers[name] or NOTHING} {verdict(answer.scores[name])}"
                        if name in answer.answers
                        else ""
                        for name in conditions
                    ),
                ]
            )
        if example.left_out:
            rows.append(
                [example.item.partition("#")[0], f"and {example.left_out:,} more", *[""] * (1 + len(conditions))]
            )
    return Sheet(("image", "question", "right", *(CONDITION_TITLES[name] for name in conditions)), rows)


def _reproduction(report: Report) -> Iterator[str]:
    found = report.reproduction
    yield f"## To get these figures again\n\n{_code(found.command)}"
    if found.started_as:
        yield f"It was started as:\n\n{_code(found.started_as)}"
    yield f"{_table(machines_sheet(report))}\n"
    for details in report.details.values():
        whole = "" if details.prompt_is_whole else ", between the turns of the tokenizer's own chat template"
        yield f"{details.title}: all that the model reads for the first question{whole}\n\n{_code(details.prompt)}"
    yield f"{_table(settings_sheet(report))}\n"
    if found.recipe:
        yield f"recipe.yaml:\n\n{_code(found.recipe)}"


def _section(title: str, sheet: Sheet | None) -> Iterator[str]:
    if sheet is not None:
        yield f"{title}\n\n{_table(sheet)}\n"


def _code(text: str) -> str:
    # Indented, so that nothing in the text can end it.
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines()) + "\n"


def _table(sheet: Sheet) -> str:
    return markdown_table(sheet.header, [[_content(value) for value in row] for row in sheet.rows])


def _content(value: str | Text) -> str:
    text = value if isinstance(value, Text) else Text(value)
    notes = f" [{', '.join(map(str, text.notes))}]" if text.notes else ""
    detail = f" ({text.detail})" if text.detail else ""
    return _plain(f"{text.main}{notes}{detail}")


def _plain(text: str) -> str:
    """Text in which Markdown viewers see no HTML."""
    return text.replace("<", "&lt;")
