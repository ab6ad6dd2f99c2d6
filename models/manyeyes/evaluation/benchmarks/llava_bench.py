"""LLaVA-Bench: 90 questions on 30 COCO images, 60 on 24 images in the wild; a judge compares with a reference answer.

Source: LLaVA, arXiv:2304.08485 and arXiv:2310.03744 (``eval_gpt_review_bench.py``). The judge reads a description of
the image, the question, the reference answer (Assistant 1, by GPT-4 from the description) and the model's (Assistant
2), and marks both from 1 to 10 in its first line. ``score`` is 100 times the mean mark of the model over that of the
reference. The parts of the prompt and their order are LLaVA's, its sentences are ours; LLaVA's judge, gpt-4-0314, is
gone in any case. Figures compare only under one judge.

LLaVA and lmms-eval count a verdict that cannot be read as (-1, -1) in both means, so that a judge that always fails
gives 100%. Here it is no verdict: the judge is asked again, and without one there is no score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    TEXT,
    TEXT_OR_TEXTS,
    BenchmarkRow,
    Graded,
    Judging,
    Row,
    needs_judge,
)

CATEGORIES = ("conv", "detail", "complex")
BEST_MARK = 10.0

_SYSTEM = "You check the quality of answers, helpfully and with precision."
_TASK = (
    "Please assess how two AI assistants answered the question above, which a user asked about an image. You do not "
    "see the image; the context describes it in a few sentences.\n"
    "Mark the helpfulness, relevance, accuracy and level of detail of each answer with one number from 1 to 10; more "
    "is better.\n"
    "In the first line write only the two marks, that of Assistant 1 and that of Assistant 2, with a space between "
    "them.\n"
    "From the second line on explain the marks. Be fair: the order in which the answers stand must not matter."
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def ask(row: Row, prediction: str, variant: str) -> Sequence[Mapping[str, str]]:  # noqa: ARG001
    """The conversation that asks for two marks."""
    text = (
        f"[Context]\n{_description(row)}\n\n"
        f"[Question]\n{row['question']}\n\n"
        f"[Assistant 1]\n{_reference(row)}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{prediction}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{_TASK}\n\n"
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]


def read_marks(verdict: str, variant: str) -> tuple[float, float] | None:
    """The marks of the reference and of the model in a verdict's first line, or ``None``.

    ``official`` wants two numbers apart by one space or comma and nothing else; ``lmms`` takes the first two numbers.
    """
    line = verdict.split("\n")[0]
    parts = _NUMBER.findall(line)[:2] if variant == "lmms" else line.replace(",", " ").split(" ")
    if len(parts) != 2:
        return None
    try:
        reference, model = (float(part) for part in parts)
    except ValueError:
        return None
    # Without a mark for the reference nothing is relative to it.
    if not (0 < reference <= BEST_MARK and 0 <= model <= BEST_MARK):
        return None
    return reference, model


def read(row: Row, prediction: str, verdict: str, variant: str) -> Graded | None:
    """The model's mark as a share of 10; the reference's is the facet ``reference_mark``."""
    marks = read_marks(verdict, variant)
    if marks is None:
        return None
    reference, model = marks
    return Graded(
        id=row["id"],
        cluster=_image(row),
        parsed=prediction,
        score=model / BEST_MARK,
        facets={"category": str(row["category"]), "reference_mark": repr(reference)},
    )


def relative_score(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """100 times the model's mean mark over the reference's, for all and by category; both means in marks."""
    scores = {"score": _relative(graded)}
    for category in sorted({item.facets["category"] for item in graded}):
        scores[category] = _relative([item for item in graded if item.facets["category"] == category])
    scores["model_mark"] = _means(graded)[0]
    scores["reference_mark"] = _means(graded)[1]
    return scores


def _means(graded: Sequence[Graded]) -> tuple[float, float]:
    model = sum(item.score * BEST_MARK for item in graded) / len(graded)
    reference = sum(float(item.facets["reference_mark"]) for item in graded) / len(graded)
    return model, reference


def _relative(graded: Sequence[Graded]) -> float:
    model, reference = _means(graded)
    return 100 * model / reference


def _description(row: Row) -> str:
    caption = row["caption"]
    return caption if isinstance(caption, str) else "\n".join(str(sentence) for sentence in caption)


def _reference(row: Row) -> str:
    return str(row["gpt_answer"] if "gpt_answer" in row else row["answer"])


def _image(row: Row) -> str:
    return str(row["image_id"])


def _prompt(row: Row, style: str) -> str:  # noqa: ARG001
    return str(row["question"])


def _group(row: Row) -> str:
    return str(row["category"])


def _row(name: str, title: str, hub_id: str, answer: str, max_new_tokens: int, licence: str) -> BenchmarkRow:
    return BenchmarkRow(
        name=name,
        title=title,
        hub_id=hub_id,
        split="train",
        columns={
            "question_id": ID,
            "question": TEXT,
            "image": IMAGE,
            "image_id": ID,
            "category": TEXT,
            "caption": TEXT_OR_TEXTS,
            answer: TEXT,
        },
        licence=licence,
        reported_by=("llava",),
        variants=("official", "lmms"),
        default_variant="official",
        default_reason="LLaVA's own reading of the marks",
        item_id=lambda row: str(row["question_id"]),
        cluster=_image,
        prompt=_prompt,
        max_new_tokens=max_new_tokens,
        grade=needs_judge,
        aggregate=relative_score,
        judged=True,
        scorer=f"{name} relative score 1",
        unit="relative",
        metric="the judge's marks, percent of the reference's",
        reference=_reference,
        group=_group,
    )


LLAVA_BENCH_COCO = _row(
    "llava-bench-coco",
    "LLaVA-Bench (COCO)",
    "lmms-lab/llava-bench-coco",
    "answer",
    1024,
    "unknown: the hub's card names none; images of COCO, Flickr terms",
)
LLAVA_BENCH_WILD = _row(
    "llava-bench-wild",
    "LLaVA-Bench (in the wild)",
    "lmms-lab/llava-bench-in-the-wild",
    "gpt_answer",
    4096,
    "Apache-2.0 by its authors' card (liuhaotian/llava-bench-in-the-wild); images from the web",
)
JUDGING = Judging(ask=ask, read=read, temperature=0.2, max_tokens=1024, prompts="llava-bench 1", example="5 5")
