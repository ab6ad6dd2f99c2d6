"""POPE: 9,000 yes-or-no questions about objects that may not be there, 3,000 in each of three categories.

Source: Li et al., arXiv:2305.10355; hub copy by lmms-lab; images of COCO val2014.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from manyeyes.evaluation.benchmarks import rules as yes_no
from manyeyes.evaluation.benchmarks.benchmark import ID, IMAGE, TEXT, BenchmarkRow, Graded, Row, cluster_by
from manyeyes.evaluation.benchmarks.rules import PHRASE, outcome

_cluster = cluster_by("image_source")


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right one of yes and no; what was said stays in ``parsed``, as F1 needs it."""
    gold = yes_no.gold(row)
    parsed = _parse(prediction, variant)
    return outcome(
        row,
        parsed=parsed,
        right=parsed == gold,
        cluster=_cluster(row),
        facets={"category": row["category"], "reference": gold},
    )


def _parse(prediction: str, variant: str) -> str | None:
    if variant == "lmms":
        # lmms-eval has no parser: the whole text is the answer, and one that is neither yes nor no is kept as it is.
        return prediction.lower().strip()
    if variant == "vlmevalkit":
        return yes_no.vlmevalkit_yes_no(prediction)
    if variant == "cambrian":
        words = prediction.lower().split()
        answer = words[0].rstrip(".:,") if words else ""
        return answer if answer in ("yes", "no") else None
    return yes_no.pope_official(prediction)


_Counts = Counter[tuple[str, str | None, float]]
"""How many items there are of each reference, answer and score."""


def rates(counts: _Counts, variant: str) -> dict[str, float]:
    """F1, precision, recall, share of yes and accuracy, in percent.

    An answer that is neither yes nor no is no true positive; lmms-eval does not count it as a false negative either,
    and takes its share of yes from the references. A missing answer counts as the wrong one in official and lmms.
    """
    answers: Counter[tuple[str, str | None]] = Counter()
    for (reference, parsed, _), count in counts.items():
        missing = parsed is None and variant in ("official", "lmms")
        answers[reference, _other(reference) if missing else parsed] += count
    true_positives = answers["yes", "yes"]
    false_positives = answers["no", "yes"]
    positives = sum(count for (reference, _), count in answers.items() if reference == "yes")
    false_negatives = answers["yes", "no"] if variant == "lmms" else positives - true_positives
    precision = _ratio(true_positives, true_positives + false_positives)
    recall = _ratio(true_positives, true_positives + false_negatives)
    yes = positives if variant == "lmms" else true_positives + false_positives
    right = sum(score * count for (_, _, score), count in counts.items())
    return {
        "f1": 100 * _ratio(2 * precision * recall, precision + recall),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes ratio": 100 * _ratio(yes, counts.total()),
        "accuracy": 100 * _ratio(right, counts.total()),
    }


def _other(reference: str) -> str:
    return "no" if reference == "yes" else "yes"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """``score``: official the mean F1 of the categories, cambrian accuracy, else F1 over all; the rates of each."""
    # Counted once, as resampling asks for the score a thousand times.
    seen = Counter([(item.facets["category"], item.facets["reference"], item.parsed, item.score) for item in graded])
    parts: dict[str, _Counts] = {}
    for (category, reference, parsed, score), count in seen.items():
        parts.setdefault(category, Counter())[reference, parsed, score] = count
    pooled = rates(sum(parts.values(), _Counts()), variant)
    categories = {name: rates(counts, variant) for name, counts in sorted(parts.items())}
    mean_f1 = sum(part["f1"] for part in categories.values()) / len(categories)
    headline = {"official": mean_f1, "cambrian": pooled["accuracy"]}.get(variant, pooled["f1"])
    named = {f"{name} {rate}": value for name, part in categories.items() for rate, value in part.items()}
    return {"score": headline, "mean f1": mean_f1, **pooled, **named}


POPE = BenchmarkRow(
    name="pope",
    title="POPE",
    hub_id="lmms-lab/POPE",
    split="test",
    columns={
        "question_id": ID,
        "question": TEXT,
        "answer": TEXT,
        "image_source": TEXT,
        "image": IMAGE,
        "category": TEXT,
    },
    licence="MIT by its authors' repository (AoiDragon/POPE); images of COCO, Flickr terms",
    reported_by=("llava", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="LLaVA's figure is the mean F1 of the three categories",
    item_id=lambda row: f"{row['category']}/{row['question_id']}",
    cluster=_cluster,
    prompt=lambda row, style: row["question"].strip() + PHRASE,  # noqa: ARG005
    max_new_tokens=128,
    chance=lambda row: 0.5,  # noqa: ARG005
    grade=grade,
    aggregate=aggregate,
    options=lambda row: yes_no.OPTIONS,  # noqa: ARG005
    scorer="pope 1",
    metric="F1, percent",
    group=lambda row: str(row["category"]),
)
