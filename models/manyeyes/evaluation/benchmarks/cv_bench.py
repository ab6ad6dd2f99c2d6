"""CV-Bench: 2,638 questions on counting, relations, depth and distance, 2D from ADE20K and COCO, 3D from Omni3D.

Source: Tong et al. (Cambrian-1), arXiv:2406.16860; nyu-visionx/CV-Bench.
"""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import option_letters
from manyeyes.evaluation.benchmarks.benchmark import IMAGE, TEXT, TEXTS, WHOLE, BenchmarkRow, Graded, Row, by_item
from manyeyes.evaluation.benchmarks.rules import (
    LETTER_SUFFIX,
    by_facet,
    choice_prompt,
    outcome,
    percent,
    percents,
)


def options(row: Row) -> dict[str, str]:
    """The options under their letters."""
    return option_letters.lettered(row["choices"])


def prompt(row: Row, style: str) -> str:
    """The benchmark's ``prompt``, with Cambrian's sentence below it or lmms-eval's note above; LLaVA's letters."""
    if style == "cambrian":
        return f"{row['prompt']}\n{LETTER_SUFFIX}"
    if style in ("llava", "mini-gemini"):
        return choice_prompt(row["question"], options(row), style, suffix=LETTER_SUFFIX)
    letters = ", ".join(options(row))
    note = f"Note: You only need to respond with {letters} without providing any additional information.\n"
    return f"{note}\n{row['prompt']}"


def answer_letter(row: Row) -> str:
    """The letter of the right option, without its brackets.

    Raises:
        EvaluationError: The column is no option's letter.
    """
    letter: str = row["answer"].strip("()")
    if letter not in options(row):
        raise EvaluationError(
            f'cv-bench: "answer" is "{row["answer"]}"',
            f"one of {', '.join(options(row))}",
            "Give it as the hub has it.",
        )
    return letter


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right option."""
    gold = answer_letter(row)
    parsed = _parse(row, prediction, variant, gold)
    facets = {"type": row["type"], "source": row["source"], "task": row.get("task") or ""}
    return outcome(row, parsed=parsed, right=parsed == gold, cluster=by_item(row), facets=facets)


def _parse(row: Row, prediction: str, variant: str, gold: str) -> str | None:
    choices = options(row)
    if variant == "lmms":
        return option_letters.cv_bench_lmms(prediction)
    if variant == "vlmevalkit":
        return option_letters.vlmevalkit(prediction, choices)
    first = option_letters.cambrian_letter(prediction)
    # The right option's text counts as well, which takes one character: "3" for "(C) 3".
    if first == gold.lower() or first == choices.get(gold):
        return gold
    return first.upper() if first.upper() in choices else None


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """``score``: the mean of 2D, itself the mean of its sources, and 3D; in lmms percent of all questions right."""
    parts = {
        kind: _mean([percent(part) for part in by_facet(items, "source").values()])
        for kind, items in by_facet(graded, "type").items()
    }
    both = _mean(list(parts.values()))
    score = percent(graded) if variant == "lmms" else both
    return {"score": score, **parts, "2D and 3D": both, "all": percent(graded), **percents(graded, "source", "task")}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


CV_BENCH = BenchmarkRow(
    name="cv-bench",
    title="CV-Bench, 2D and 3D",
    hub_id="nyu-visionx/CV-Bench",
    split="test",
    columns={
        "idx": WHOLE,
        "type": TEXT,
        "task": TEXT,
        "image": IMAGE,
        "question": TEXT,
        "choices": TEXTS,
        "answer": TEXT,
        "prompt": TEXT,
        "source": TEXT,
    },
    licence="Apache-2.0 by its authors' card",
    cambrian_group="vision-centric",
    reported_by=("cambrian",),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="Cambrian made it; official and cambrian are the same rule",
    item_id=lambda row: str(row["idx"]),
    cluster=by_item,
    prompt=prompt,
    max_new_tokens=1024,
    chance=lambda row: 1 / len(row["choices"]),
    grade=grade,
    aggregate=aggregate,
    options=lambda row: tuple(options(row)),
    scorer="cv-bench 2",
    metric="mean of 2D and 3D, percent",
    reference=answer_letter,
    group=lambda row: str(row["type"]),
)
