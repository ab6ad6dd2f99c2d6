"""easy-VQA: 1,000 test images of one coloured shape, 9,673 questions with one-word answers.

Source: PyPI ``easy-vqa`` (Victor Zhou), MIT licence. Exact match, as its author scores it (a classifier over the 13
answers); here the model writes text, which has to be one of the 13 after case, spaces and a final full stop are gone.
"""

from __future__ import annotations

from manyeyes.data.records import Record
from manyeyes.evaluation.benchmarks.benchmark import Asked, BenchmarkRow, question_answer_pairs

YES_NO = ("yes", "no")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

_ANSWER_TYPES = {
    **dict.fromkeys(YES_NO, "yes/no"),
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
}


def ask(record: Record) -> list[Asked]:
    """Every question of the image; an answer that is none of the 13 gets the type ``unknown``, which is refused."""
    return [
        Asked(question=question, reference=answer, answer_type=_ANSWER_TYPES.get(answer, "unknown"))
        for question, answer in question_answer_pairs(record)
    ]


def parse(text: str) -> str | None:
    """One of the 13 answers, or ``None``."""
    answer = text.strip().lower().removesuffix(".").rstrip()
    return answer if answer in _ANSWER_TYPES else None


def score(parsed: str, reference: str) -> float:
    """1 for the reference itself, else 0."""
    return float(parsed == reference)


EASY_VQA = BenchmarkRow(
    name="easy-vqa",
    title="easy-VQA test",
    dataset="easy-vqa-test",
    prompt="{question}",
    ask=ask,
    parse=parse,
    score=score,
    scorer="easy-vqa exact match 1",
    chance={
        "yes/no": 100 / len(YES_NO),
        "colour": 100 / len(COLOURS),
        "shape": 100 / len(SHAPES),
    },
    source="PyPI easy-vqa, MIT",
    metric="exact match, percent",
)
