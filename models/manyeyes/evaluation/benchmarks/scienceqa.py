"""ScienceQA: 4,241 multiple-choice test questions from school books, 2,017 of them with an image (ScienceQA-IMG).

``score`` is the part with images, which is what papers report as SQA-I. References without the column ``image`` all
count as having one, as in the configuration ScienceQA-IMG.

Source: Lu et al., arXiv:2209.09513; hub copy by lmms-lab.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    TEXT,
    TEXT_OR_NOTHING,
    TEXTS,
    WHOLE,
    BenchmarkRow,
    Graded,
    Row,
    by_item,
)
from manyeyes.evaluation.benchmarks.option_letters import (
    Options,
    cambrian_tail,
    lettered,
    llava_scienceqa,
    vlmevalkit,
)
from manyeyes.evaluation.benchmarks.rules import by_facet, choice_prompt, outcome, percent, percents

CAMBRIAN_SUFFIX = "Please answer directly with only the letter of the correct option and nothing else."
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def options(row: Row) -> Options:
    """The options under their letters."""
    return lettered(row["choices"])


def answer_letter(row: Row) -> str:
    """The letter of the right option.

    Raises:
        EvaluationError: The column's index is none of an option.
    """
    letters = list(options(row))
    index = int(row["answer"])
    if not 0 <= index < len(letters):
        raise EvaluationError(
            f'scienceqa: "answer" is {index}', f"an index below {len(letters)}", "Give it as the hub has it."
        )
    return letters[index]


def prompt(row: Row, style: str) -> str:
    """The hint as context where there is one, question, options and the sentence that asks for a letter.

    Cambrian puts the hint in front without a word, and here no "Options:" behind the question.
    """
    hint, question = row["hint"], row["question"]
    if style == "cambrian":
        asked = f"{hint} {question}" if hint else question
        return choice_prompt(asked, options(row), "default", suffix=CAMBRIAN_SUFFIX)
    return choice_prompt(f"Context: {hint}\n{question}" if hint else question, options(row), style)


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right option."""
    gold = answer_letter(row)
    parsed = _parse(row, prediction, variant)
    facets = {
        "part": "text" if "image" in row and row["image"] is None else "image",
        "subject": row.get("subject") or "",
        "grades": _grades(row.get("grade") or ""),
    }
    return outcome(row, parsed=parsed, right=parsed == gold, cluster=by_item(row), facets=facets)


def _parse(row: Row, prediction: str, variant: str) -> str | None:
    choices = options(row)
    if variant == "vlmevalkit":
        return vlmevalkit(prediction, choices)
    if variant == "cambrian":
        return _cambrian(prediction, choices, answer_letter(row))
    if variant == "lmms":
        text = prediction.strip()
        letter = text[0] if text[:1].isupper() and text[1:2] == "." else text.upper()
    else:
        letter = llava_scienceqa(prediction) or ""
    return letter if letter in choices else None


def _cambrian(prediction: str, choices: Options, gold: str) -> str | None:
    """The right option's text without punctuation and case, or the letter before the first full stop."""
    text = cambrian_tail(prediction).rstrip(".")
    if _plain(text) == _plain(choices[gold]):
        return gold
    letter = text.split(".")[0].upper()
    return letter if letter in choices else None


def _plain(text: str) -> str:
    return text.translate(_WITHOUT_PUNCTUATION).lower().strip()


def _grades(grade_name: str) -> str:
    number = grade_name.removeprefix("grade")
    if number in ("1", "2", "3", "4", "5", "6"):
        return "grades 1-6"
    return "grades 7-12" if number.isdecimal() else ""


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """``score`` over questions with an image (over all where none has one); ``all``; by subject and grades."""
    parts = by_facet(graded, "part")
    main = parts.get("image", graded)
    return {"score": percent(main), "all": percent(graded), **percents(main, "subject", "grades")}


SCIENCEQA = BenchmarkRow(
    name="scienceqa",
    title="ScienceQA test, questions with an image",
    hub_id="lmms-lab/ScienceQA",
    config="ScienceQA-IMG",
    split="test",
    columns={
        "image": IMAGE,
        "question": TEXT,
        "choices": TEXTS,
        "answer": WHOLE,
        "hint": TEXT_OR_NOTHING,
        "subject": TEXT,
        "grade": TEXT,
    },
    licence="CC BY-NC-SA 4.0 by its authors' repository (lupantech/ScienceQA)",
    cambrian_group="knowledge",
    reported_by=("llava", "cambrian", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="LLaVA's script, which the papers' SQA-I comes from",
    cluster=by_item,
    prompt=prompt,
    max_new_tokens=16,
    chance=lambda row: 1 / len(row["choices"]),
    grade=grade,
    aggregate=aggregate,
    options=lambda row: tuple(options(row)),
    scorer="scienceqa option letter 2",
    metric="percent right of the questions with an image",
    reference=answer_letter,
)
