"""ChartQA test: 2,500 questions on charts, half written by people, half made from captions.

Paper: Masry et al., arXiv:2203.10244. GPL-3.0.
"""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    TEXT,
    BenchmarkRow,
    Graded,
    Row,
    by_item,
    facet_of,
    mean_percent,
    position,
    read_from,
)
from manyeyes.evaluation.benchmarks.rules import PHRASE, relaxed_match

_HUMAN = "human_test"


def prompt(row: Row, style: str) -> str:
    """The question; lmms-eval, and so Eagle, asks for a word, Cambrian-1 for a number or phrase."""
    suffix = {
        "default": "\nAnswer the question with a single word.",
        "eagle": "\nAnswer the question with a single word.",
        "cambrian": "\nAnswer the question using a single number or phrase.",
    }.get(style, PHRASE)
    return str(row["question"]) + suffix


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """Relaxed accuracy.

    ``official`` takes the text as it is; ``lmms`` and ``vlmevalkit`` strip it first. ``cambrian`` knows no per cent and
    has a rule of its own for a reference of 0, which only 0 meets ("0.0" does, too).
    """
    gold = str(row["answer"])
    answer = prediction.strip() if variant in ("lmms", "vlmevalkit") else prediction
    right = _cambrian_match(answer, gold) if variant == "cambrian" else relaxed_match(answer, gold)
    return Graded(
        id=row["id"],
        cluster=by_item(row),
        parsed=read_from(prediction, answer),
        score=float(right),
        facets={"type": facet_of(row, "type")},
    )


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """The mean over all, and over each half: ``human``, ``augmented``."""
    scores = mean_percent(graded, variant)
    for name, is_human in (("human", True), ("augmented", False)):
        half = [item for item in graded if item.facets.get("type") and (item.facets["type"] == _HUMAN) is is_human]
        if half:
            scores[name] = mean_percent(half, variant)["score"]
    return scores


def _cambrian_match(answer: str, gold: str) -> bool:
    answer, gold = answer.lower(), gold.lower()
    try:
        found, target = float(answer), float(gold)
    except ValueError:
        return answer == gold
    return abs(found - target) <= abs(target) * 0.05


CHARTQA = BenchmarkRow(
    name="chartqa",
    title="ChartQA test",
    hub_id="lmms-lab/ChartQA",
    split="test",
    columns={"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
    licence="GPL-3.0 by its authors' card (ahmed-masry/ChartQA)",
    cambrian_group="ocr-chart",
    reported_by=("eagle", "cambrian"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="the rule of the paper, as Pix2Struct and Qwen-VL wrote it down and all toolkits run it",
    item_id=position,
    cluster=by_item,
    prompt=prompt,
    max_new_tokens=16,
    grade=grade,
    aggregate=aggregate,
    mean_scale=100,
    scorer="chartqa relaxed accuracy 1",
    metric="relaxed accuracy, percent",
    group=lambda row: str(row["type"]),
)
