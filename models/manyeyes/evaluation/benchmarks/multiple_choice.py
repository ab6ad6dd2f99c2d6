"""What benchmarks with lettered options share: the prompt, and an item that is right or wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from manyeyes.evaluation.benchmarks.benchmark import Graded, Row
from manyeyes.evaluation.benchmarks.option_letters import Options

LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."


def choice_prompt(question: str, options: Options, style: str, *, suffix: str = LETTER_SUFFIX) -> str:
    """Question, one ``A. text`` a line, and the suffix; Cambrian writes "Options:" behind the question."""
    heading = f"{question} Options:" if style == "cambrian" else question
    return "\n".join([heading, *(f"{letter}. {text}" for letter, text in options.items()), suffix])


def outcome(
    row: Row, *, parsed: str | None, right: bool, cluster: str, facets: Mapping[str, str] | None = None
) -> Graded:
    """An item that is right or wrong."""
    return Graded(id=str(row["id"]), cluster=cluster, parsed=parsed, score=float(right), facets=facets or {})


def percent(items: Sequence[Graded]) -> float:
    """Mean score times 100; 0 without items."""
    return 100 * sum(item.score for item in items) / len(items) if items else 0.0


def by_facet(items: Sequence[Graded], facet: str) -> dict[str, list[Graded]]:
    """The items by a facet's value, values sorted; items without the facet, or with an empty one, are left out."""
    groups: dict[str, list[Graded]] = {}
    for item in items:
        value = item.facets.get(facet)
        if value:
            groups.setdefault(value, []).append(item)
    return dict(sorted(groups.items()))


def percents(items: Sequence[Graded], *facets: str) -> dict[str, float]:
    """Percent right for each value of each facet, under the value's name."""
    named: dict[str, float] = {}
    for facet in facets:
        named |= percent_by_value([(item.facets.get(facet), item.score) for item in items])
    return named


def percent_by_value(scored: Sequence[tuple[str | None, float]]) -> dict[str, float]:
    """Mean score times 100 for each value, sorted; empty values are left out.

    Equal pairs are counted before anything else, as resampling asks for the figures a thousand times.
    """
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for (value, score), count in Counter(scored).items():
        if value:
            totals[value] = totals.get(value, 0.0) + score * count
            counts[value] = counts.get(value, 0) + count
    return {value: 100 * totals[value] / counts[value] for value in sorted(totals)}


def unless(empty: str) -> str | None:
    """The text, or ``None`` where it is empty."""
    return empty or None
