"""SEED-Bench: 17,990 multiple-choice questions, 14,233 on one image and the rest on frames of a video.

``score`` is the image part, as Cambrian and Eagle report it; LLaVA-1.5 reports both together.

Source: Li et al., arXiv:2307.16125; hub copy by lmms-lab.
"""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import option_letters
from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGES,
    TEXT,
    BenchmarkRow,
    Graded,
    Row,
    cluster_by,
)
from manyeyes.evaluation.benchmarks.rules import choice_prompt, outcome, percent, percents

TASKS = {
    "1": "Scene Understanding",
    "2": "Instance Identity",
    "3": "Instance Attribute",
    "4": "Instance Location",
    "5": "Instance Counting",
    "6": "Spatial Relation",
    "7": "Instance Interaction",
    "8": "Visual Reasoning",
    "9": "Text Recognition",
}

_cluster = cluster_by("data_id")


def options(row: Row) -> dict[str, str]:
    """The options under their letters."""
    return option_letters.lettered(row[f"choice_{letter}"] for letter in "abcd")


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right letter."""
    gold = row["answer"].strip().upper()
    if gold not in tuple("ABCD"):
        raise EvaluationError(f'seed: "answer" is {row["answer"][:60]!r}', "A to D", "Give it as the hub has it.")
    letter = _letter(row, prediction, variant)
    parsed = letter if letter in tuple("ABCD") else None
    return outcome(
        row,
        parsed=parsed,
        right=parsed == gold,
        cluster=_cluster(row),
        facets={"part": row["data_type"], "task": TASKS.get(str(row.get("question_type_id") or ""), "")},
    )


def _letter(row: Row, prediction: str, variant: str) -> str | None:
    if variant == "official":
        return prediction
    if variant == "vlmevalkit":
        return option_letters.vlmevalkit(prediction, options(row))
    if variant == "cambrian":
        return option_letters.cambrian_letter(prediction, trailing=".").upper()
    return prediction.strip()[:1].upper()


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """``score``: percent right of the image part (of all where there is none); ``image``, ``video``, ``all``; tasks."""
    named = percents(graded, "part", "task")
    everything = percent(graded)
    return {"score": named.get("image", everything), "all": everything, **named}


SEED = BenchmarkRow(
    name="seed",
    title="SEED-Bench, image part",
    hub_id="lmms-lab/SEED-Bench",
    split="test",
    columns={
        "question_id": ID,
        "question": TEXT,
        "choice_a": TEXT,
        "choice_b": TEXT,
        "choice_c": TEXT,
        "choice_d": TEXT,
        "answer": TEXT,
        "data_id": ID,
        "data_type": TEXT,
        "question_type_id": ID,
        "image": IMAGES,
    },
    licence="CC BY-NC 4.0 by its authors' card (AILab-CVC/SEED-Bench); images of Conceptual Captions",
    cambrian_group="general",
    reported_by=("llava", "cambrian", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="lmms",
    default_reason="the papers take the answer's first letter; official wants the answer to be the letter",
    item_id=lambda row: str(row["question_id"]),
    cluster=_cluster,
    prompt=lambda row, style: choice_prompt(row["question"], options(row), style),
    max_new_tokens=128,
    chance=lambda row: 0.25,  # noqa: ARG005
    grade=grade,
    aggregate=aggregate,
    options=lambda row: tuple(options(row)),
    scorer="seed 2",
    metric="percent right of the image part",
    group=lambda row: TASKS.get(str(row["question_type_id"]), str(row["question_type_id"])),
)
