"""MME: 2,374 yes-or-no questions, two on each image, in ten categories of perception and four of cognition.

A category's score is the percentage of right questions plus the percentage of images with both right, 200 at most;
``score`` is the sum over perception, 2,000 at most.

Source: Fu et al., arXiv:2306.13394; hub copy by lmms-lab, where both questions of an image share ``question_id``.
"""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.evaluation.benchmarks import rules as yes_no
from manyeyes.evaluation.benchmarks.benchmark import IMAGE, TEXT, BenchmarkRow, Graded, Row, cluster_by
from manyeyes.evaluation.benchmarks.rules import PHRASE, by_facet, outcome, percent

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_HINT = " Please answer yes or no."


def prompt(row: Row, style: str) -> str:
    """The question without its own request for yes or no, which Cambrian leaves in, and the single-word sentence."""
    question: str = row["question"].strip()
    return (question if style == "cambrian" else question.replace(_HINT, "")) + PHRASE


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right one of yes and no."""
    gold = yes_no.gold(row)
    parsed = _parse(prediction, variant)
    return outcome(
        row,
        parsed=parsed,
        right=parsed == gold,
        cluster=_image(row),
        facets={"category": row["category"], "unit": row["question_id"]},
    )


def _parse(prediction: str, variant: str) -> str | None:
    if variant == "lmms":
        return yes_no.mme_lmms(prediction)
    if variant == "vlmevalkit":
        return yes_no.vlmevalkit_yes_no(prediction)
    if variant == "cambrian":
        answer = prediction.lower().rstrip(".")
        return answer if answer in ("yes", "no") else None
    return yes_no.mme_official(prediction)


def category_score(items: Sequence[Graded]) -> float:
    """Percent of questions right plus percent of images whose questions, two at least, are all right; 0 to 200."""
    images = by_facet(items, "unit").values()
    both = sum(len(image) >= 2 and all(item.score == 1 for item in image) for image in images)
    return percent(items) + 100 * both / len(images)


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """``score`` and ``perception``, ``cognition``, both together, percent right, and every category, in points."""
    categories = {name: category_score(items) for name, items in by_facet(graded, "category").items()}
    perception = sum(categories.get(name, 0.0) for name in PERCEPTION)
    cognition = sum(categories.get(name, 0.0) for name in COGNITION)
    return {
        "score": perception,
        "perception": perception,
        "cognition": cognition,
        "total": perception + cognition,
        "accuracy": percent(graded),
        **categories,
    }


def _image(row: Row) -> str:
    return str(row["question_id"])


MME = BenchmarkRow(
    name="mme",
    title="MME",
    hub_id="lmms-lab/MME",
    split="test",
    columns={"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT},
    licence="unknown: the hub's card names none, and the question about it there has no answer",
    cambrian_group="general",
    reported_by=("llava", "mini-gemini", "cambrian", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="LLaVA's and Mini-Gemini's figures come from MME's own script",
    cluster=cluster_by("question_id"),
    prompt=prompt,
    max_new_tokens=16,
    # A coin gives 50 + 25 of the 200 points of a category.
    chance=lambda row: 0.375,  # noqa: ARG005
    grade=grade,
    aggregate=aggregate,
    options=lambda row: yes_no.OPTIONS,  # noqa: ARG005
    scorer="mme 1",
    unit="points",
    maximum=2000.0,
    metric="points of perception, 2,000 at most",
    group=lambda row: str(row["category"]),
)
