"""RealWorldQA: 765 photographs, one question each with a letter, a word or a number for an answer.

VLMEvalKit's file has options for every question, which the hub's rows lack; there is no such variant here.

Source: xAI, 2024; hub copy by lmms-lab.
"""

from __future__ import annotations

from manyeyes.evaluation.benchmarks.benchmark import IMAGE, TEXT, BenchmarkRow, Graded, Row, by_item
from manyeyes.evaluation.benchmarks.option_letters import cambrian_tail, ranked
from manyeyes.evaluation.benchmarks.rules import outcome, unless

_LETTERS = ("A", "B", "C", "D")
_WORD_CHANCE = 0.25


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right letter or, where the answer is none, the very word."""
    gold = row["answer"].strip()
    if variant == "cambrian":
        words = cambrian_tail(prediction).rstrip(".").split()
        parsed = words[0] if words else None
        return outcome(row, parsed=parsed, right=parsed == row["answer"].lower(), cluster=by_item(row))
    if gold.upper() in _LETTERS:
        parsed = ranked(prediction, _LETTERS)
        return outcome(row, parsed=parsed, right=parsed == gold.upper(), cluster=by_item(row))
    parsed = unless(prediction.lower().strip().rstrip("."))
    return outcome(row, parsed=parsed, right=parsed == gold.lower(), cluster=by_item(row))


def options(row: Row) -> tuple[str, ...]:
    """The letters of the options written in the question, one a line; empty where the answer is a word."""
    return tuple(line[0] for line in row["question"].split("\n") if line[:1] in _LETTERS and line[1:2] == ".")


def _chance(row: Row) -> float:
    """One of the options written in the question; the words of the others are mostly yes, no and small numbers."""
    letters = options(row)
    return 1 / len(letters) if letters else _WORD_CHANCE


REALWORLDQA = BenchmarkRow(
    name="realworldqa",
    title="RealWorldQA",
    hub_id="lmms-lab/RealWorldQA",
    split="test",
    columns={"image": IMAGE, "question": TEXT, "answer": TEXT},
    licence="CC BY-ND 4.0 by its authors' card (xai-org/RealworldQA)",
    cambrian_group="vision-centric",
    reported_by=("cambrian", "eagle"),
    variants=("lmms", "cambrian"),
    default_variant="cambrian",
    default_reason="lmms-eval changed its rule in 2026, after the papers",
    cluster=by_item,
    prompt=lambda row, style: str(row["question"]).strip(),  # noqa: ARG005
    max_new_tokens=16,
    chance=_chance,
    grade=grade,
    options=options,
    scorer="realworldqa 1",
)
