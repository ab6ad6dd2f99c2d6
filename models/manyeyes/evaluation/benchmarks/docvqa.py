"""DocVQA and InfographicVQA.

DocVQA validation: 5,349 questions on scanned pages, one or more answers each.

Paper: Mathew et al., arXiv:2007.00398. For research, under the terms of the Robust Reading
Competition's site. Cambrian-1 reports the test split, whose answers only the server has; validation is scored here.

InfographicVQA validation: 2,801 questions on 500 infographics, with the same metric.

Paper: Mathew et al., arXiv:2104.12756. For research, under the terms of the Robust Reading Competition's site. Eagle
reports it; Cambrian-1 has a script for it but leaves it out of its 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    TEXT,
    TEXTS,
    BenchmarkRow,
    Graded,
    Row,
    cluster_by,
    read_from,
)
from manyeyes.evaluation.benchmarks.rules import anls, ask_document


def grade_anls(cluster: Callable[[Row], str]) -> Callable[[Row, str, str], Graded]:
    """ANLS; ``lmms`` strips the answer first, which counts because lengths are those of the text as written."""

    def grade(row: Row, prediction: str, variant: str) -> Graded:
        answer = prediction.strip() if variant == "lmms" else prediction
        return Graded(
            id=row["id"],
            cluster=cluster(row),
            parsed=read_from(prediction, answer),
            score=anls(answer, row["answers"]),
        )

    return grade


_document = cluster_by("docId")

DOCVQA = BenchmarkRow(
    name="docvqa",
    title="DocVQA validation",
    hub_id="lmms-lab/DocVQA",
    config="DocVQA",
    split="validation",
    hidden_splits=("test",),
    columns={"questionId": ID, "docId": ID, "question": TEXT, "answers": TEXTS, "image": IMAGE},
    licence="Apache-2.0 by the hub's card; the Robust Reading Competition's own terms were not found",
    cambrian_group="ocr-chart",
    reported_by=("eagle", "cambrian"),
    variants=("official", "lmms", "vlmevalkit"),
    default_variant="official",
    default_reason="the server's script, to which Cambrian-1 submits",
    item_id=lambda row: str(row["questionId"]),
    cluster=_document,
    prompt=ask_document,
    max_new_tokens=32,
    grade=grade_anls(_document),
    scorer="docvqa anls 1",
    metric="ANLS, percent",
    reference=lambda row: " | ".join(row["answers"]),
)


_image = cluster_by("image_url")

INFOVQA = replace(
    DOCVQA,
    name="infovqa",
    title="InfographicVQA validation",
    config="InfographicVQA",
    columns={"questionId": ID, "question": TEXT, "answers": TEXTS, "image_url": TEXT, "image": IMAGE},
    cambrian_group=None,
    reported_by=("eagle",),
    default_reason="the server's script",
    cluster=_image,
    grade=grade_anls(_image),
    scorer="infovqa anls 1",
    dataset="",
)
