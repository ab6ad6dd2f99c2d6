"""easy-VQA: 1,000 test images of one coloured shape, 9,673 questions with one-word answers.

Source: PyPI ``easy-vqa`` (Victor Zhou), MIT licence. Exact match, as its author scores it (a classifier over the 13
answers); here the model writes text, which has to be one of the 13 after case, spaces and a final full stop are gone.
A snapshot has all questions of an image in one record (``manyeyes.data.records``).
"""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.chat import without_placeholders
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGES,
    RECORDS,
    TEXT,
    BenchmarkRow,
    Graded,
    Row,
    image_bytes,
    mean_percent_by,
)

YES_NO = ("yes", "no")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

_KINDS = {"yes/no": YES_NO, "colour": COLOURS, "shape": SHAPES}
_ANSWER_TYPES = {answer: kind for kind, answers in _KINDS.items() for answer in answers}


def unfold(record: Row) -> list[Row]:
    """Every question of a record: ``id`` ends with ``#`` and its number; ``question``, ``answer``, the record's id."""
    texts = [without_placeholders(turn["value"]).strip() for turn in record["conversations"]]
    pairs = zip(texts[0::2], texts[1::2], strict=True)
    return [
        {**record, "record": record["id"], "id": f"{record['id']}#{number}", "question": question, "answer": answer}
        for number, (question, answer) in enumerate(pairs)
    ]


def answer_type(row: Row) -> str:
    """Which kind of answer the question has.

    Raises:
        EvaluationError: The reference is none of the 13 answers.
    """
    kind = _ANSWER_TYPES.get(row["answer"])
    if kind is None:
        raise EvaluationError(
            f'"{row["id"]}" has the answer "{row["answer"]}"',
            f"easy-vqa knows {', '.join(_ANSWER_TYPES)}",
            "Check that the snapshot has the data set that the benchmark was written for.",
        )
    return kind


def parse(text: str) -> str | None:
    """One of the 13 answers, or ``None``."""
    answer = text.strip().lower().removesuffix(".").rstrip()
    return answer if answer in _ANSWER_TYPES else None


def grade(row: Row, prediction: str, variant: str) -> Graded:  # noqa: ARG001
    """1 for the reference itself, else 0."""
    parsed = parse(prediction)
    return Graded(
        id=row["id"],
        cluster=_image(row),
        parsed=parsed,
        score=float(parsed == row["answer"]),
        facets={"type": answer_type(row)},
    )


def _image(row: Row) -> str:
    return str(row["id"]).rpartition("#")[0]


def _images(row: Row) -> Sequence[bytes]:
    return image_bytes(row, "images")


EASY_VQA = BenchmarkRow(
    name="easy-vqa",
    title="easy-VQA test",
    hub_id="",
    split="test",
    columns={"id": TEXT, "images": IMAGES, "conversations": RECORDS},
    licence="MIT",
    variants=("official",),
    default_variant="official",
    default_reason="there is one way to score it",
    item_id=lambda row: str(row["id"]),
    cluster=_image,
    prompt=lambda row, style: str(row["question"]),  # noqa: ARG005
    images=_images,
    max_new_tokens=16,
    chance=lambda row: 1 / len(_KINDS[answer_type(row)]),
    grade=grade,
    aggregate=mean_percent_by("type"),
    mean_scale=100,
    # Its author's classifier chooses among the same 13, whatever the question.
    options=lambda row: tuple(_ANSWER_TYPES),  # noqa: ARG005
    scorer="easy-vqa exact match 1",
    metric="exact match, percent",
    single_answer=True,
    group=answer_type,
    unfold=unfold,
)
