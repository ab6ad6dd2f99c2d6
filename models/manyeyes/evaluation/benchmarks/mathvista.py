"""MathVista testmini: 1,000 mathematical questions on images, 540 with options and 460 free.

The benchmark has a language model extract the answer from what was said. This is the part that rules can do: an answer
that already is one. The rest is unread, wrong and counted here; a judge's extraction goes to ``grade_extraction``.

A judge extracts the short answer from a long response, before it is compared. It is asked where the response is no
option's text and no number as it stands; an empty one is an empty answer. Instruction, five examples, question,
response, "Extracted answer: " follow each other as there; sentences and examples are ours. ``vlmevalkit`` asks where
its own rules read nothing; ``cambrian`` never does.

Source: Lu et al., arXiv:2310.02255 (``extract_answer.py``); AI4Math/MathVista.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import option_letters
from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    NUMBER_OR_NOTHING,
    RECORD,
    TEXT,
    TEXTS,
    BenchmarkRow,
    Graded,
    Judging,
    Row,
    cluster_by,
    image_bytes,
)
from manyeyes.evaluation.benchmarks.rules import PHRASE, by_facet, levenshtein, outcome, percent, percents, unless

CAMBRIAN_SUFFIX = "First show your reasoning process and then give the final answer."
_RELAXED = 0.05
_cluster = cluster_by("image")


def has_options(row: Row) -> bool:
    """Whether it is a question with options."""
    return bool(row["question_type"] == "multi_choice")


def choices(row: Row) -> list[str]:
    """The options' texts; empty for a free question.

    Raises:
        EvaluationError: A question with options has none.
    """
    found = list(row["choices"] or ())
    if not found and has_options(row):
        raise EvaluationError('mathvista: "choices" is empty', "an option at least", "Give it as the hub has it.")
    return found


def prompt(row: Row, style: str) -> str:
    """The benchmark's own query; Cambrian adds a sentence."""
    query = str(row["query"])
    if style != "cambrian":
        return query
    return f"{query}\n{CAMBRIAN_SUFFIX}" if has_options(row) else query + PHRASE


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right answer, where rules can read it."""
    if variant == "cambrian":
        parsed, right = _grade_cambrian(row, prediction)
    elif variant == "vlmevalkit":
        parsed, right = _grade_vlmevalkit(row, prediction)
    else:
        extraction = extract(row, prediction.strip() if variant == "lmms" else prediction)
        if extraction is not None:
            return grade_extraction(row, extraction, variant)
        parsed, right = None, False
    return outcome(row, parsed=parsed, right=right, cluster=_cluster(row), facets=_facets(row))


def extract(row: Row, response: str) -> str | None:
    """The answer in a response without a judge, or ``None`` where MathVista would ask one.

    MathVista's own steps (an option's text, a whole number, a decimal number; ``The answer is "..."``) and what its
    normalisation can do with the response as it stands: a lone letter, ``(X)``, a number of another form, a list.

    Source:
        MathVista, evaluation/extract_answer.py and calculate_score.py.
    """
    text = response.strip()
    if has_options(row):
        if not response:
            # Upstream takes nothing for the extraction, and then the option that is nearest to nothing: the shortest.
            return ""
        letters = list(option_letters.lettered(choices(row)))
        if response in choices(row) or text in letters or re.search(r"\([a-zA-Z]\)", text):
            return response
    elif row["answer_type"] in ("integer", "float"):
        if _decimal(text) is not None:
            return text
    elif row["answer_type"] == "list" and text.startswith("[") and text.endswith("]"):
        return text
    quoted = re.search(r'The answer is "(.*)"\.', response)
    return quoted.group(1) if quoted else None


def grade_extraction(row: Row, extraction: str, variant: str) -> Graded:
    """1 where a rule's or a judge's extraction, made the answer's type, is the answer; official and lmms only.

    An extraction that is no option becomes the nearest one, by Levenshtein distance, as MathVista does it.
    """
    answer = row["answer"]
    parsed = _normalise(row, extraction, variant)
    right = parsed is not None and (parsed.strip() == answer.strip() if variant == "lmms" else parsed == answer)
    return outcome(row, parsed=parsed, right=right, cluster=_cluster(row), facets=_facets(row))


def _normalise(row: Row, extraction: str, variant: str) -> str | None:
    if has_options(row):
        texts = choices(row)
        bracketed = re.findall(r"\(([a-zA-Z])\)", extraction)
        chosen = bracketed[0].upper() if bracketed else extraction.strip()
        by_letter = option_letters.lettered(texts)
        return by_letter[chosen] if chosen in by_letter else min(texts, key=lambda text: levenshtein(chosen, text))
    if row["answer_type"] == "integer":
        number = _decimal(extraction)
        whole = None if number is None else _whole(number)
        return None if whole is None else str(whole)
    if row["answer_type"] == "float":
        number = _decimal(extraction)
        precision = row["precision"]
        if number is None or precision is None or (variant == "lmms" and not isinstance(precision, int)):
            # The hub's precision is 1.0, not 1, on which lmms-eval's round() fails: no decimal answer is ever right.
            return None
        return str(round(number, int(precision)))
    return extraction


def _decimal(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(value: str | float) -> int | None:
    try:
        return int(value)
    except (ValueError, OverflowError):
        return None


def _grade_vlmevalkit(row: Row, prediction: str) -> tuple[str | None, bool]:
    """A letter of VLMEvalKit's parser, or a number as Python reads it; no nearest option."""
    if has_options(row):
        by_letter = option_letters.lettered(choices(row))
        parsed = option_letters.vlmevalkit(prediction, by_letter)
        return parsed, parsed in by_letter and by_letter[parsed] == row["answer"]
    if row["answer_type"] == "integer":
        return _compare(_whole(prediction), _whole(row["answer"]))
    if row["answer_type"] == "float":
        return _compare(_decimal(prediction), _decimal(row["answer"]))
    return None, False


def _compare(number: float | None, gold: float | None) -> tuple[str | None, bool]:
    return (None, False) if number is None else (str(number), number == gold)


def _grade_cambrian(row: Row, prediction: str) -> tuple[str | None, bool]:
    """The whole answer is the letter or the text, or a number within 5% of it (of what was answered, to be exact).

    The script would cut at the first full stop where the type is "multiple-choice", which MathVista never says.
    """
    answer = prediction.lower().strip()
    gold = row["answer"]
    if has_options(row):
        gold = {text: letter for letter, text in option_letters.lettered(choices(row)).items()}.get(gold, gold)
    gold = gold.lower()
    number, target = _decimal(answer), _decimal(gold)
    near = number is not None and target is not None and abs(target - number) <= abs(number) * _RELAXED
    return unless(answer), answer == gold or near


def _facets(row: Row) -> dict[str, str]:
    metadata = row.get("metadata") or {}
    skills = metadata.get("skills")
    return {
        "kind": row["question_type"],
        "answer type": row["answer_type"],
        "task": str(metadata.get("task") or ""),
        "skills": "|".join(map(str, skills)) if isinstance(skills, list | tuple) else str(skills or ""),
    }


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """``score`` over all questions; by kind of question and answer, task and skill."""
    skills: dict[str, list[Graded]] = {}
    for joined, items in by_facet(graded, "skills").items():
        for skill in joined.split("|"):
            skills.setdefault(skill, []).extend(items)
    by_skill = {skill: percent(items) for skill, items in sorted(skills.items())}
    return {"score": percent(graded), **percents(graded, "kind", "answer type", "task"), **by_skill}


MATHVISTA = BenchmarkRow(
    name="mathvista",
    title="MathVista testmini, rules only",
    hub_id="AI4Math/MathVista",
    split="testmini",
    hidden_splits=("test",),
    columns={
        "pid": TEXT,
        "question": TEXT,
        "query": TEXT,
        "choices": f"{TEXTS} or nothing",
        "precision": NUMBER_OR_NOTHING,
        "answer": TEXT,
        "question_type": TEXT,
        "answer_type": TEXT,
        "image": TEXT,
        "decoded_image": IMAGE,
        "metadata": RECORD,
    },
    licence="CC BY-SA 4.0 by its authors' card; its images come from many data sets",
    cambrian_group="knowledge",
    reported_by=("mini-gemini", "cambrian", "eagle"),
    variants=("official", "lmms", "vlmevalkit", "cambrian"),
    default_variant="official",
    default_reason="MathVista's own steps; what it asks a judge for is unread without one",
    item_id=lambda row: str(row["pid"]),
    cluster=_cluster,
    prompt=prompt,
    images=lambda row: image_bytes(row, "decoded_image"),
    max_new_tokens=1024,
    chance=lambda row: 1 / len(choices(row)) if has_options(row) else 0.0,
    grade=grade,
    aggregate=aggregate,
    mean_scale=100.0,
    options=lambda row: tuple(option_letters.lettered(choices(row))) if has_options(row) else (),
    scorer="mathvista rules 3",
    group=lambda row: str(row["question_type"]),
)


_TASK = (
    "Each example below has a question with a hint on the form of its answer, a model's response, and the answer taken "
    "from the response in that form. Read them, then take the answer from the last response and write it after "
    '"Extracted answer:", with nothing else.'
)
_EXAMPLES = (
    (
        "an integer, e.g., 1, 2, 3",
        "How many of the coins show their head?",
        "Counting along the top row I see three heads, and one more below. That makes 4 heads.",
        "4",
    ),
    (
        "a floating-point number with one decimal place, e.g., 1.2, 1.3, 1.4",
        "How long is the side that is marked with x, in metres?",
        "By similar triangles the side is 6.0 / 4.0 times 1.8, so x is 2.7 metres.",
        "2.7",
    ),
    (
        "a floating-point number with two decimal places, e.g., 1.23, 1.34, 1.45",
        "What share of the tickets was sold in May?",
        "The bar for May is not labelled, so the share cannot be read from the chart.",
        "None",
    ),
    (
        "a Python list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]",
        "Which two years lie between the marks?",
        "The marks stand at 2004 and 2007, with 2005 and 2006 between them.",
        "[2005, 2006]",
    ),
    (
        "the letter of the right option, e.g., A, B, C, D, at the end",
        "Which line is steeper?\nChoices:\n(A) the red one\n(B) the blue one",
        "The blue line climbs by three squares where the red one climbs by two, so the blue one is steeper.",
        "B",
    ),
)


def ask(row: Row, prediction: str, variant: str) -> Sequence[Mapping[str, str]] | None:
    """Instruction, examples, question and response; ``None`` where the rules do."""
    needless = variant == "cambrian" or (
        grade(row, prediction, variant).parsed is not None if variant == "vlmevalkit" else _is_answer(row, prediction)
    )
    if needless:
        return None
    parts = [_TASK]
    for form, question, response, answer in _EXAMPLES:
        parts.append(
            f"Hint: Please answer the question with {form}.\nQuestion: {question}\n\n"
            f"Model response: {response}\n\nExtracted answer: {answer}"
        )
    parts.append(f"{row['question']}\n\n{prediction}\n\nExtracted answer: ")
    return [{"role": "user", "content": "\n\n".join(parts)}]


def read(row: Row, prediction: str, verdict: str, variant: str) -> Graded | None:  # noqa: ARG001
    """The extraction, compared; ``None`` for an empty one."""
    extraction = verdict.strip()
    if not extraction:
        return None
    return grade(row, extraction, variant) if variant == "vlmevalkit" else grade_extraction(row, extraction, variant)


def grade_directly(row: Row, prediction: str, variant: str) -> Graded:
    """The item where no judge is asked: the response itself is the extraction."""
    return (
        grade(row, prediction, variant)
        if variant in ("vlmevalkit", "cambrian")
        else grade_extraction(row, prediction, variant)
    )


def _is_answer(row: Row, response: str) -> bool:
    if not response:
        return True
    if has_options(row) and response in choices(row):
        return True
    kinds = {"integer": int, "float": float}
    kind = kinds.get(row["answer_type"])
    if kind is None:
        return False
    try:
        kind(response)
    except ValueError:
        return False
    return True


JUDGING = Judging(
    ask=ask,
    read=read,
    direct=grade_directly,
    temperature=0.0,
    max_tokens=256,
    prompts="mathvista extraction 1",
    example="1",
)
