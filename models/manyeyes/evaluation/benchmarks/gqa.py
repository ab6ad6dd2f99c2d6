"""GQA testdev (balanced): 12,578 questions on Visual Genome photographs, one answer of a word or a few.

Paper: Hudson and Manning, arXiv:1902.09506. CC BY 4.0. The hub keeps images in a configuration of their own
(``testdev_balanced_images``); ``manyeyes data build gqa`` joins them to the questions by ``imageId``.
"""

from __future__ import annotations

import string

from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    TEXT,
    BenchmarkRow,
    Graded,
    Row,
    cluster_by,
    read_from,
)
from manyeyes.evaluation.benchmarks.rules import ask_for_phrase

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 where the answers are equal, after what the variant takes away.

    ``official``: nothing, as GQA's script compares. ``cambrian``: case and final full stops, as LLaVA too prepares
    answers for that script; a leading space is kept. ``vlmevalkit``: case and surrounding space, so "yes." is wrong.
    ``lmms``: case, surrounding space and all punctuation.
    """
    gold = str(row["answer"])
    match variant:
        case "official":
            answer = prediction
        case "cambrian":
            answer, gold = prediction.lower().rstrip("."), gold.lower()
        case "vlmevalkit":
            answer, gold = prediction.strip().lower(), gold.strip().lower()
        case _:
            answer = prediction.strip().lower().translate(_NO_PUNCTUATION)
            gold = gold.lower().translate(_NO_PUNCTUATION)
    return Graded(
        id=row["id"], cluster=_cluster(row), parsed=read_from(prediction, answer), score=float(answer == gold)
    )


_cluster = cluster_by("imageId")

GQA = BenchmarkRow(
    name="gqa",
    title="GQA testdev",
    hub_id="lmms-lab/GQA",
    config="testdev_balanced_instructions",
    split="testdev",
    hidden_splits=("test", "challenge", "submission"),
    columns={"id": ID, "imageId": ID, "question": TEXT, "answer": TEXT, "image": IMAGE},
    licence="unknown: MIT by the hub's card, CC BY 4.0 by Graphcore's of the same data; no word of the authors found",
    cambrian_group="general",
    reported_by=("llava", "eagle", "cambrian"),
    images_config="testdev_balanced_images",
    images_key="imageId",
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="cambrian",
    default_reason="LLaVA-1.5 and Cambrian-1 take away case and final full stops before GQA's script compares",
    item_id=lambda row: str(row["id"]),
    cluster=_cluster,
    prompt=ask_for_phrase,
    max_new_tokens=16,
    grade=grade,
    single_answer=True,
    scorer="gqa exact match 1",
    metric="exact match, percent",
)
