"""TextVQA validation: 5,000 questions about text in Open Images photographs, ten answers each.

Paper: Singh et al., arXiv:1904.08920. CC BY 4.0. The styles ``llava``, ``cambrian`` and ``mini-gemini`` put the hub's
OCR tokens into the prompt, which is worth about 12 points to LLaVA-1.5 (58.2 against about 46); ``default`` and
``eagle`` do not. Say which.
"""

from __future__ import annotations

from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    TEXT,
    TEXTS,
    BenchmarkRow,
    Graded,
    Row,
    cluster_by,
)
from manyeyes.evaluation.benchmarks.rules import PHRASE, grade_vqa
from manyeyes.evaluation.benchmarks.vizwiz import commonest


def prompt(row: Row, style: str) -> str:
    """The question, with the OCR tokens in the styles whose papers have them."""
    question, tokens = str(row["question"]), ", ".join(row["ocr_tokens"])
    match style:
        case "llava" | "mini-gemini":
            return f"{question}\nReference OCR token: {tokens}{PHRASE}"
        case "cambrian":
            listed = f" {tokens}" if tokens else ""
            return f"{question}\nReference OCR tokens:{listed}{PHRASE}"
        case _:
            return question.capitalize() + PHRASE


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """VQA accuracy."""
    return grade_vqa(row, prediction, variant, cluster=_cluster(row))


_cluster = cluster_by("image_id")

TEXTVQA = BenchmarkRow(
    name="textvqa",
    title="TextVQA validation",
    hub_id="lmms-lab/textvqa",
    split="validation",
    hidden_splits=("test",),
    columns={
        "question_id": ID,
        "image_id": ID,
        "question": TEXT,
        "answers": TEXTS,
        "ocr_tokens": TEXTS,
        "image": IMAGE,
    },
    licence="CC BY 4.0 by its authors' card (facebook/textvqa)",
    cambrian_group="ocr-chart",
    reported_by=("llava", "eagle", "cambrian", "mini-gemini"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="M4C's evaluator, which LLaVA and Cambrian-1 run",
    item_id=lambda row: str(row["question_id"]),
    cluster=_cluster,
    prompt=prompt,
    max_new_tokens=16,
    grade=grade,
    scorer="textvqa vqa accuracy 1",
    metric="VQA accuracy, percent",
    reference=commonest,
)
