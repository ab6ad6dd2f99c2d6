"""VizWiz-VQA validation: 4,319 questions that blind people asked about their own photographs, ten answers each.

Paper: Gurari et al., arXiv:1802.08218. CC BY 4.0. LLaVA-1.5 and Eagle report the server's test split, whose answers are
not public; validation, which Cambrian-1's script scores, is scored here. Do not mix the two.
"""

from __future__ import annotations

from collections import Counter

from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    TEXT,
    TEXTS,
    BenchmarkRow,
    Graded,
    Row,
    by_item,
    facet_of,
    mean_percent_by,
)
from manyeyes.evaluation.benchmarks.rules import PHRASE, grade_vqa

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def prompt(row: Row, style: str) -> str:
    """The question with the way out; lmms-eval, and so Eagle, makes the first letter large and all others small."""
    question = str(row["question"])
    return (question.capitalize() if style in ("default", "eagle") else question) + UNANSWERABLE + PHRASE


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """VQA accuracy."""
    return grade_vqa(row, prediction, variant, cluster=by_item(row), facets={"type": facet_of(row, "category")})


def commonest(row: Row) -> str:
    """The answer that most people gave."""
    answers: Counter[str] = Counter(row["answers"])
    return answers.most_common(1)[0][0]


VIZWIZ = BenchmarkRow(
    name="vizwiz",
    title="VizWiz-VQA validation",
    hub_id="lmms-lab/VizWiz-VQA",
    split="val",
    hidden_splits=("test",),
    columns={"question_id": ID, "question": TEXT, "answers": TEXTS, "category": TEXT, "image": IMAGE},
    licence="unknown: the hub's card names none, and no word of the authors was found",
    reported_by=("llava", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="VQA accuracy with the EvalAI normaliser, as LLaVA, lmms-eval and Cambrian-1 compute it",
    item_id=lambda row: str(row["question_id"]),
    # Every question has a photograph of its own.
    cluster=by_item,
    prompt=prompt,
    max_new_tokens=128,
    grade=grade,
    aggregate=mean_percent_by("type"),
    mean_scale=100,
    scorer="vizwiz vqa accuracy 1",
    metric="VQA accuracy, percent",
    reference=commonest,
    group=lambda row: str(row["category"]),
)
