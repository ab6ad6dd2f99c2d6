"""OCRBench: 1,000 questions in ten kinds, from reading a word to reading a formula.

Paper: Liu et al., arXiv:2305.07895. Collected from 29 data sets for research, each under its own terms. The score is
1000 times the share of right answers, which for the whole set is their count, as papers print it (Cambrian-1 and
Eagle's second table divide it by 10).
"""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    TEXT,
    TEXTS,
    BenchmarkRow,
    Graded,
    Row,
    by_item,
    facet_of,
    position,
    read_from,
)
from manyeyes.evaluation.benchmarks.rules import SHORT_ANSWER

FORMULAS = "Handwritten Mathematical Expression Recognition"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
# Full-width forms of ASCII, which lmms-eval folds: U+FF01 to U+FF5E.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def prompt(row: Row, style: str) -> str:
    """The question; Cambrian-1 asks for a short answer."""
    return str(row["question"]).strip() + (SHORT_ANSWER if style == "cambrian" else "")


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 where any reference is part of the answer.

    Formulas are compared without spaces and with case, all else without case. ``vlmevalkit`` and ``cambrian`` know
    formulas by the kind of question, the others by their data set: the same rows. ``lmms`` folds full-width letters.
    """
    if variant in ("vlmevalkit", "cambrian"):
        is_formula = row["question_type"] == FORMULAS
    else:
        is_formula = row["dataset"] == "HME100k"

    def normalise(text: str) -> str:
        if variant == "lmms":
            text = text.translate(_HALF_WIDTH)
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    answer = normalise(prediction)
    return Graded(
        id=row["id"],
        cluster=by_item(row),
        parsed=read_from(prediction, answer),
        score=float(any(normalise(gold) in answer for gold in row["answer"])),
        facets={"type": facet_of(row, "question_type")},
    )


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """Thousandths that are right: all, by kind of question, and the six kinds of recognition together."""
    worth = 1000 / len(graded)
    scores = {"score": worth * sum(item.score for item in graded)}
    for item in graded:
        kind = item.facets.get("type", "")
        names = (kind, "Text Recognition") if kind in RECOGNITION else (kind,)
        for name in names:
            if name:
                scores[name] = scores.get(name, 0.0) + worth * item.score
    return scores


OCRBENCH = BenchmarkRow(
    name="ocrbench",
    title="OCRBench",
    hub_id="echo840/OCRBench",
    split="test",
    columns={
        "dataset": TEXT,
        "question": TEXT,
        "question_type": TEXT,
        "answer": TEXTS,
        "image": IMAGE,
    },
    licence="unknown: neither the hub's card nor the authors' page names one; made of 29 data sets",
    cambrian_group="ocr-chart",
    reported_by=("eagle", "cambrian"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="papers print the official script's count",
    item_id=position,
    cluster=by_item,
    prompt=prompt,
    max_new_tokens=128,
    grade=grade,
    aggregate=aggregate,
    mean_scale=1000,
    scorer="ocrbench contains 1",
    unit="points",
    maximum=1000,
    metric="right answers of 1000",
    reference=lambda row: " | ".join(row["answer"]),
    group=lambda row: str(row["question_type"]),
)
