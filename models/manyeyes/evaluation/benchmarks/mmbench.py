"""MMBench EN dev with CircularEval: a question counts where its answer is right under every rotation of its options.

Rows below a million are the questions; row ``base + r * 1,000,000`` is rotation ``r`` of question ``base``. A missing
option is the text "nan" in the hub's copy, and stays an option for the parsers that see it there.

Source: Liu et al., arXiv:2307.06281; hub copy by lmms-lab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manyeyes.evaluation.benchmarks import option_letters
from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    INDEX,
    TEXT,
    TEXT_OR_NOTHING,
    BenchmarkRow,
    Graded,
    Row,
)
from manyeyes.evaluation.benchmarks.rules import LETTER_SUFFIX, outcome, percent, percent_by_value

ROTATION = 1_000_000
_LETTERS = "ABCD"
_ABSENT = "nan"


def written_options(row: Row) -> dict[str, str]:
    """The options as the columns have them, "nan" included."""
    return {letter: str(row[letter]) for letter in _LETTERS if row[letter] is not None}


def options(row: Row) -> dict[str, str]:
    """The options that there are."""
    return {letter: text for letter, text in written_options(row).items() if text != _ABSENT}


def prompt(row: Row, style: str) -> str:
    """Hint where there is one, question, options and the sentence that asks for a letter."""
    hint = row["hint"] if row["hint"] not in (None, "", _ABSENT) else ""
    lines = [f"{letter}. {text}" for letter, text in options(row).items()]
    if style == "cambrian":
        question = f"{hint}\n{row['question']}" if hint else row["question"]
        return "\n".join([f"{question} Options:", *lines, LETTER_SUFFIX])
    if style in ("llava", "mini-gemini"):
        question = f"{hint}\n{row['question']}" if hint else row["question"]
        return "\n".join([question, *lines, LETTER_SUFFIX])
    question = f"{hint} {row['question']}" if hint else row["question"]
    return "\n".join([f"{question} There are several options:", *lines, "", LETTER_SUFFIX])


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right letter of this rotation."""
    parsed = _parse(row, prediction, variant)
    index = int(row["index"])
    return outcome(
        row,
        parsed=parsed,
        right=parsed == row["answer"],
        cluster=_question_id(row),
        facets={
            "unit": _question_id(row),
            "rotation": str(index // ROTATION),
            "category": row["category"],
            "ability": _ability(row),
        },
    )


def _parse(row: Row, prediction: str, variant: str) -> str | None:
    if variant == "vlmevalkit":
        return option_letters.vlmevalkit(prediction, options(row))
    if variant == "cambrian":
        first = option_letters.cambrian_letter(prediction).upper()
        return first if first in options(row) else None
    text = prediction.strip()
    choices = written_options(row)
    letter = option_letters.mmbench(text, choices)
    if letter is None and variant == "lmms":
        return option_letters.ranked(text, list(choices))
    return letter


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """``score``: percent of questions right in every rotation; ``first pass``, ``rows``; by ability and category.

    A question without its first row counts in no variant but cambrian.
    """
    worst: dict[str, float] = {}
    facets: dict[str, Mapping[str, str]] = {}
    firsts: dict[str, Graded] = {}
    for item in graded:
        unit = item.facets["unit"]
        worst[unit] = min(worst.get(unit, 1.0), item.score)
        facets.setdefault(unit, item.facets)
        if item.facets["rotation"] == "0":
            firsts[unit] = item
    circular = [
        (score, firsts[unit].facets if unit in firsts else facets[unit])
        for unit, score in worst.items()
        if unit in firsts or variant == "cambrian"
    ]
    return {
        "score": 100 * sum(score for score, _ in circular) / len(circular) if circular else 0.0,
        "first pass": percent(list(firsts.values())),
        "rows": percent(graded),
        **percent_by_value([(values["ability"], score) for score, values in circular]),
        **percent_by_value([(values["category"], score) for score, values in circular]),
    }


def _question_id(row: Row) -> str:
    return str(int(row["index"]) % ROTATION)


def _ability(row: Mapping[str, object]) -> str:
    """The L2 category; the earlier hub copy writes its name small, and some exports leave it out."""
    return str(row.get("L2-category") or row.get("l2-category") or "")


def _chance(row: Row) -> float:
    """Guessing every rotation of a question right; it has as many as options."""
    count = len(options(row))
    return float(count**-count)


MMBENCH = BenchmarkRow(
    name="mmbench",
    title="MMBench EN dev, circular",
    hub_id="lmms-lab/MMBench",
    config="en",
    split="dev",
    hidden_splits=("test",),
    columns={
        "index": INDEX,
        "question": TEXT,
        "hint": TEXT_OR_NOTHING,
        "answer": TEXT,
        **dict.fromkeys(_LETTERS, TEXT_OR_NOTHING),
        "category": TEXT,
        "L2-category": TEXT,
        "image": IMAGE,
    },
    licence="CC BY 4.0 by its authors' card (opencompass/MMBench)",
    cambrian_group="general",
    reported_by=("llava", "mini-gemini", "cambrian", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="MMBench's own rules, an answer that they cannot read being wrong, as no judge is asked",
    item_id=lambda row: str(row["index"]),
    cluster=_question_id,
    prompt=prompt,
    max_new_tokens=1024,
    chance=_chance,
    grade=grade,
    aggregate=aggregate,
    options=lambda row: tuple(options(row)),
    scorer="mmbench circular 2",
    metric="percent of questions right in every rotation",
    group=lambda row: str(row["category"]),
)
