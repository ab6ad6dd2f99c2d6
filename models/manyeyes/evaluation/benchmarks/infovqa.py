"""InfographicVQA validation: 2,801 questions on 500 infographics; see ``docvqa`` for the metric.

Paper: Mathew et al., arXiv:2104.12756. For research, under the terms of the Robust Reading Competition's site. Eagle
reports it; Cambrian-1 has a script for it but leaves it out of its 16.
"""

from __future__ import annotations

from dataclasses import replace

from manyeyes.evaluation.benchmarks.benchmark import ID, IMAGE, TEXT, TEXTS, cluster_by
from manyeyes.evaluation.benchmarks.docvqa import DOCVQA, grade_anls

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
