"""VQAv2: 214,354 validation questions on COCO photographs, ten people's answers each.

Paper: Goyal et al., arXiv:1612.00837. Annotations CC BY 4.0; images of COCO under their owners' Flickr terms.
LLaVA-1.5 and Eagle report the server's test-dev, whose answers are not public; validation is scored here.
"""

from __future__ import annotations

from collections import Counter

from manyeyes.evaluation.benchmarks.benchmark import (
    ANSWERS,
    ID,
    IMAGE,
    TEXT,
    BenchmarkRow,
    Graded,
    Row,
    cluster_by,
    facet_of,
    mean_percent_by,
    read_from,
)
from manyeyes.evaluation.benchmarks.rules import ask_for_phrase, normalise_vqa, normalise_vqa_lmms, vqa_accuracy


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """VQA accuracy.

    ``official`` normalises only where the ten answers differ: against ten times "black", "Black." is wrong. ``lmms``
    (lmms-eval since August 2025) always does.
    """
    golds = [_one_line(answer["answer"]) for answer in row["answers"]]
    answer = _one_line(prediction)
    if variant == "lmms":
        golds, answer = [normalise_vqa_lmms(gold) for gold in golds], normalise_vqa_lmms(answer)
    elif len(set(golds)) > 1:
        golds, answer = [normalise_vqa(gold) for gold in golds], normalise_vqa(answer)
    return Graded(
        id=row["id"],
        cluster=_cluster(row),
        parsed=read_from(prediction, answer),
        score=vqa_accuracy(answer, golds),
        facets={"type": facet_of(row, "answer_type")},
    )


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _reference(row: Row) -> str:
    answers: Counter[str] = Counter(answer["answer"] for answer in row["answers"])
    return answers.most_common(1)[0][0]


_cluster = cluster_by("image_id")

VQAV2 = BenchmarkRow(
    name="vqav2",
    title="VQAv2 validation",
    hub_id="lmms-lab/VQAv2",
    split="validation",
    hidden_splits=("test", "testdev"),
    columns={
        "question_id": ID,
        "image_id": ID,
        "question": TEXT,
        "question_type": TEXT,
        "answer_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": ANSWERS,
        "image": IMAGE,
    },
    licence="CC BY 4.0 by the hub's card; images of COCO, Flickr terms",
    reported_by=("llava", "eagle"),
    variants=("official", "lmms"),
    default_variant="official",
    default_reason="the server that the papers submit to runs the official script",
    item_id=lambda row: str(row["question_id"]),
    cluster=_cluster,
    prompt=ask_for_phrase,
    max_new_tokens=16,
    grade=grade,
    aggregate=mean_percent_by("type"),
    mean_scale=100,
    scorer="vqav2 vqa accuracy 1",
    metric="VQA accuracy, percent",
    reference=_reference,
    group=lambda row: str(row["answer_type"]),
)
