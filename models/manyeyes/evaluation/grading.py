"""Grades a model's answers to a benchmark under each condition, by rules or by a judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from manyeyes.evaluation.answering.conditions import Condition
from manyeyes.evaluation.benchmarks import Benchmark, Graded
from manyeyes.evaluation.judging.judge import Judge
from manyeyes.evaluation.judging.scoring import JUDGINGS, enough_judged, judge_items, name_judge

UNJUDGED = "it needs a judge: give evaluation.judge in the recipe"


@dataclass(frozen=True)
class GradedAnswers:
    """A benchmark's graded items.

    Attributes:
        benchmark: With the judge's name, and without the items that lack a verdict.
        graded: By condition, in the order of ``benchmark.items``.
        unjudged: Items that lack a verdict under some condition, and are left out.
    """

    benchmark: Benchmark
    graded: Mapping[Condition, list[Graded]]
    unjudged: int


def grade_answers(
    benchmark: Benchmark, predictions: Mapping[Condition, Mapping[str, str]], judge: Judge | None
) -> GradedAnswers | str:
    """Grade the answers under every condition.

    Args:
        benchmark: Its items.
        predictions: Text by item id, by condition.
        judge: Used where the benchmark's answers are judged; ``None`` for a benchmark that rules can score.

    Returns:
        The graded items, or why there is no score: too few verdicts.

    Raises:
        JudgeError: The judge cannot be asked at all.
    """
    row, variant = benchmark.row, benchmark.variant
    if judge is None or row.name not in JUDGINGS:
        by_rules = {
            condition: [row.grade(item.row, texts[item.id], variant) for item in benchmark.items]
            for condition, texts in predictions.items()
        }
        return GradedAnswers(benchmark, by_rules, unjudged=0)
    verdicts = {
        condition: judge_items(row, [(item.row, texts[item.id]) for item in benchmark.items], judge, variant=variant)
        for condition, texts in predictions.items()
    }
    named = name_judge(judge, JUDGINGS[row.name])
    reasons = [
        next((part[place].reason for part in verdicts.values() if part[place].value is None), "")
        for place in range(len(benchmark.items))
    ]
    places = [place for place, reason in enumerate(reasons) if not reason]
    unjudged = len(reasons) - len(places)
    if not places or not enough_judged(unjudged, len(reasons), judge):
        first = next(place for place, reason in enumerate(reasons) if reason)
        return (
            f"the judge gave no verdict on {unjudged:,} of {len(reasons):,} items, for instance on "
            f'"{benchmark.items[first].id}": {reasons[first]}'
        )
    graded: dict[Condition, list[Graded]] = {
        condition: [value for place in places if (value := part[place].value) is not None]
        for condition, part in verdicts.items()
    }
    items = tuple(benchmark.items[place] for place in places)
    return GradedAnswers(replace(benchmark, items=items, judge=named), graded, unjudged=unjudged)
