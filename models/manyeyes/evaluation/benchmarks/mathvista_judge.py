"""MathVista's extraction by a judge: the short answer in a long response, before it is compared.

Source: Lu et al., arXiv:2310.02255 (``extract_answer.py``). Asked is where the response is no option's text and no
number as it stands; an empty one is an empty answer. Instruction, five examples, question, response, "Extracted
answer: " follow each other as there; sentences and examples are ours. ``vlmevalkit`` asks where its own rules read
nothing; ``cambrian`` never does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manyeyes.evaluation.benchmarks.benchmark import Graded, Row
from manyeyes.evaluation.benchmarks.judging import Judging
from manyeyes.evaluation.benchmarks.mathvista import choices, grade, grade_extraction, has_options

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
