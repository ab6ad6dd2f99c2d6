"""MMMU val: 900 college questions of 30 subjects, 847 with options and 53 open, with one image or several.

Upstream answers at random where it reads no letter. Here such an answer is wrong and counted, unless a seed is given.

Source: Yue et al., arXiv:2311.16502; hub copy by lmms-lab, where options and some answers are lists written as text.

Source of the open questions' rule: MMMU, eval/eval_utils.py, parse_open_response and eval_open.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import option_letters
from manyeyes.evaluation.benchmarks.benchmark import IMAGE, TEXT, BenchmarkRow, Graded, Row, by_item, image_bytes
from manyeyes.evaluation.benchmarks.rules import (
    LETTER_SUFFIX,
    PHRASE,
    by_facet,
    choice_prompt,
    outcome,
    percent,
    percents,
    unless,
)

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
_MOST_IMAGES = 7
_RELAXED = 0.05


def has_options(row: Row) -> bool:
    """Whether it is a question with options."""
    return bool(row["question_type"] == "multiple-choice")


def options(row: Row) -> dict[str, str]:
    """The options under their letters; empty for an open question."""
    if not has_options(row):
        return {}
    found = option_letters.lettered(_read_list(row, "options"))
    if not found:
        raise EvaluationError(
            f'mmmu: "options" is {row["options"]!r}', "an option at least", "Give it as the hub has it."
        )
    return found


def prompt(row: Row, style: str) -> str:
    """Question, options and the sentence that asks for a letter or a phrase.

    Cambrian takes the tags ``<image 1>`` out and puts no empty line before the sentence.
    """
    question = row["question"]
    if style == "cambrian":
        text = choice_prompt(question, options(row), style) if has_options(row) else question + PHRASE
        return re.sub(r"<image \d+>", "", text).strip()
    if has_options(row):
        return choice_prompt(question, options(row), style, suffix=f"\n{LETTER_SUFFIX}")
    return f"{question}\n{PHRASE}"


def images(row: Row) -> Sequence[bytes]:
    """The images that question and options name, in the order of their columns; the first one where none is named."""
    named = set(re.findall(r"<image (\d+)>", row["question"] + row["options"]))
    columns = [f"image_{number}" for number in range(1, _MOST_IMAGES + 1) if str(number) in named]
    return [data for column in columns or ["image_1"] for data in image_bytes(row, column)]


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right option, or for an open answer that holds the reference; ``lmms`` strips what was said."""
    if variant == "lmms":
        prediction = prediction.strip()
    parsed, right = (
        _grade_choice(row, prediction, variant) if has_options(row) else _grade_open(row, prediction, variant)
    )
    subject = _subject(str(row["id"]))
    return outcome(
        row,
        parsed=parsed,
        right=right,
        cluster=by_item(row),
        facets={"kind": row["question_type"], "subject": subject, "domain": _DOMAIN_OF.get(subject, "")},
    )


def _grade_choice(row: Row, prediction: str, variant: str) -> tuple[str | None, bool]:
    choices = options(row)
    if variant == "cambrian":
        parsed = unless(option_letters.cambrian_letter(prediction).upper())
    elif variant == "vlmevalkit":
        parsed = option_letters.vlmevalkit(prediction, choices)
    elif variant == "lmms":
        parsed = option_letters.mmmu_lmms(prediction, choices)
    else:
        parsed = option_letters.mmmu_official(prediction, choices)
    return parsed, parsed == row["answer"]


def _grade_open(row: Row, prediction: str, variant: str) -> tuple[str | None, bool]:
    gold = row["answer"]
    if variant == "cambrian":
        answer = option_letters.cambrian_tail(prediction).rstrip(".")
        return unless(answer), answer == gold.lower() or _within_five_percent(answer, gold)
    if variant == "vlmevalkit":
        # VLMEvalKit makes it a choice between the reference and "Other Answers" once the model has answered.
        parsed = option_letters.vlmevalkit(prediction, {"A": gold, "B": "Other Answers"})
        return parsed, parsed == (gold if gold in tuple(option_letters.LETTERS) else "A")
    found = candidates(prediction)
    # lmms-eval takes a list of references, written as text, for one text; MMMU's own answer file has lists.
    golds = [gold] if variant == "lmms" else _golds(row)
    return unless(prediction.strip()) and str(found), is_right(found, golds)


def _within_five_percent(answer: str, gold: str) -> bool:
    try:
        return abs(float(gold) - float(answer)) <= abs(float(answer)) * _RELAXED
    except ValueError:
        return False


def _golds(row: Row) -> Sequence[str]:
    gold: str = row["answer"]
    return _read_list(row, "answer") if gold.startswith("[") and gold.endswith("]") else [gold]


def _read_list(row: Row, column: str) -> list[str]:
    try:
        values = ast.literal_eval(row[column])
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all of which it says of bad text
        values = None
    if not isinstance(values, list | tuple):
        raise EvaluationError(
            f'mmmu: "{column}" is {row[column][:60]!r}', "a list written as text", "Give it as the hub has it."
        )
    return [str(value) for value in values]


def guess(row: Row, draw: random.Random) -> str:
    """A random option's letter, as upstream draws it; nothing for an open question."""
    return f"({draw.choice(list(options(row)))})" if has_options(row) else ""


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """``score`` over all questions; by kind, domain and subject."""
    kinds = {kind: percent(items) for kind, items in by_facet(graded, "kind").items()}
    return {"score": percent(graded), **kinds, **percents(graded, "domain", "subject")}


def _subject(item_id: str) -> str:
    """``validation_Art_Theory_7`` is of Art_Theory; empty for ids of another form."""
    match = re.fullmatch(r"[^_]+_(.+?)_\d+", item_id)
    return match.group(1) if match else ""


MMMU = BenchmarkRow(
    name="mmmu",
    title="MMMU val",
    hub_id="lmms-lab/MMMU",
    split="validation",
    hidden_splits=("test",),
    columns={
        "id": TEXT,
        "question": TEXT,
        "options": TEXT,
        "answer": TEXT,
        "question_type": TEXT,
        **{f"image_{number}": IMAGE for number in range(1, _MOST_IMAGES + 1)},
    },
    licence="unknown: the hub's card names none; MMMU-Pro by the same authors is Apache-2.0",
    cambrian_group="knowledge",
    reported_by=("mini-gemini", "cambrian", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="MMMU's own parser, without its random answers unless a seed is given",
    item_id=lambda row: str(row["id"]),
    cluster=by_item,
    prompt=prompt,
    images=images,
    max_new_tokens=128,
    chance=lambda row: 1 / len(options(row)) if has_options(row) else 0.0,
    grade=grade,
    aggregate=aggregate,
    mean_scale=100.0,
    options=lambda row: tuple(options(row)),
    scorer="mmmu 2",
    group=lambda row: str(row["question_type"]),
    guess=guess,
)


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Candidate = str | float


def candidates(response: str) -> list[Candidate]:
    """Ends of the sentences that announce an answer (the whole response without one), and the numbers in them."""
    tails = _tails(response)
    texts = tails + [number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail)]
    return list(dict.fromkeys(part for text in texts for part in normalise(text)))


def is_right(found: Sequence[Candidate], golds: Sequence[str]) -> bool:
    """Whether a reference's text occurs in a candidate's, or a number of both is equal."""
    normalised = [part for gold in golds for part in normalise(gold)]
    for candidate in found:
        if isinstance(candidate, float):
            if candidate in normalised:
                return True
        elif any(isinstance(gold, str) and gold in candidate for gold in normalised):
            return True
    return False


def normalise(text: str) -> list[Candidate]:
    """A number to two decimals, or the text in lower case; one character becomes two texts, with a space on a side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _tails(response: str) -> list[str]:
    response = response.strip().strip(".").lower()
    # The lookahead never matches, as the text is in lower case by now: upstream's oversight, kept.
    sentences = re.split(r"\.\s(?=[A-Z])|\n", response)
    tails = []
    for number, sentence in enumerate(sentences, start=1):
        marks = (*_INDICATORS, "=") if number == len(sentences) else _INDICATORS
        shortest = ""
        for mark in marks:
            if mark in sentence:
                tail = sentence.split(mark)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    return tails or [response]
