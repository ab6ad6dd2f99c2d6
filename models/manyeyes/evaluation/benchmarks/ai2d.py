"""AI2D: 3,088 multiple-choice questions on science diagrams (test), labels masked by boxes.

Source: Kembhavi et al., arXiv:1603.07396, in the hub's copy by lmms-lab. VLMEvalKit's file without masks is another
benchmark, several points apart.
"""

from __future__ import annotations

import re
import string

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import IMAGE, TEXT, TEXTS, BenchmarkRow, Graded, Row, by_item
from manyeyes.evaluation.benchmarks.option_letters import Options, cambrian_letter, lettered, vlmevalkit
from manyeyes.evaluation.benchmarks.rules import choice_prompt, outcome

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def options(row: Row) -> Options:
    """The options under their letters."""
    return lettered(row["options"])


def answer_letter(row: Row) -> str:
    """The letter of the right option; the column holds its index as text.

    Raises:
        EvaluationError: It is not the index of an option.
    """
    letters = list(options(row))
    index = str(row["answer"]).strip()
    # Compared as text: there is no telling what else int() reads.
    if index not in [str(number) for number in range(len(letters))]:
        raise EvaluationError(
            f'ai2d: "answer" is "{row["answer"]}"', f"an index below {len(letters)}", "Give it as the hub has it."
        )
    return letters[int(index)]


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right letter."""
    parsed = _parse(row, prediction, variant)
    return outcome(row, parsed=parsed, right=parsed == answer_letter(row), cluster=by_item(row))


def _parse(row: Row, prediction: str, variant: str) -> str | None:
    choices = options(row)
    if variant == "vlmevalkit":
        return vlmevalkit(prediction, choices)
    if variant == "cambrian":
        # Cambrian turns a to d into 0 to 3 and compares with the index, so that the index itself is right, too.
        first = cambrian_letter(prediction)
        index = {"a": "0", "b": "1", "c": "2", "d": "3"}.get(first, first)
        letters = list(choices)
        # Compared as text: digits of other scripts, which int() reads, are none here.
        is_index = index.isascii() and index.isdecimal()
        return letters[int(index)] if is_index and int(index) < len(letters) else None
    return lmms_letter(prediction, choices)


def lmms_letter(prediction: str, choices: Options) -> str | None:
    """lmms-eval's rule: ``X.`` at the start, else the whole text without punctuation, whatever the case."""
    start = re.match(r"\s*([A-Z])\.", prediction)
    text = start.group(1) if start else prediction.strip()
    letter = text.translate(_WITHOUT_PUNCTUATION).upper()
    return letter if letter in choices else None


AI2D = BenchmarkRow(
    name="ai2d",
    title="AI2D test",
    hub_id="lmms-lab/ai2d",
    split="test",
    columns={"question": TEXT, "options": TEXTS, "answer": TEXT, "image": IMAGE},
    licence="unknown: the hub's card names none, and no word of the authors was found",
    cambrian_group="knowledge",
    reported_by=("cambrian", "eagle"),
    variants=("lmms", "vlmevalkit", "cambrian"),
    default_variant="lmms",
    default_reason="Eagle scores with lmms-eval, and AI2D has no script of its own for models that write",
    cluster=by_item,
    # Cambrian's script has no "Options:" behind the question here; all styles are alike.
    prompt=lambda row, style: choice_prompt(row["question"], options(row), "default"),  # noqa: ARG005
    max_new_tokens=16,
    chance=lambda row: 1 / len(row["options"]),
    grade=grade,
    options=lambda row: tuple(options(row)),
    scorer="ai2d option letter 3",
    reference=answer_letter,
)
