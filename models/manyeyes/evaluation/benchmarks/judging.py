"""How a language model is asked about an answer, and how its verdict is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import Graded, Row


@dataclass(frozen=True)
class Judging:
    """What a judge is asked about one benchmark's answers.

    Attributes:
        ask: (row, prediction, variant) to the conversation, ``role`` and ``content`` of each turn; ``None`` where no
            judge is needed.
        read: (row, prediction, judge's text, variant) to the graded item; ``None`` where the text makes no sense.
        direct: (row, prediction, variant) to the graded item where no judge is needed.
        temperature: What the benchmark's authors used.
        max_tokens: Longest verdict.
        prompts: Name and version of the texts above; part of a report.
        example: A judge's text that makes sense, with which a row is tried out before anybody is asked.
    """

    ask: Callable[[Row, str, str], Sequence[Mapping[str, str]] | None]
    read: Callable[[Row, str, str, str], Graded | None]
    temperature: float
    max_tokens: int
    prompts: str
    example: str
    direct: Callable[[Row, str, str], Graded] | None = None


def needs_judge(row: Row, prediction: str, variant: str) -> Graded:  # noqa: ARG001
    """The ``grade`` of a benchmark that only a judge can grade.

    Raises:
        EvaluationError: Always.
    """
    raise EvaluationError(
        f'the answer to "{row["id"]}" is free text',
        "a language model that judges it",
        "Score it with: manyeyes judge; or give evaluation.judge in the recipe.",
    )
