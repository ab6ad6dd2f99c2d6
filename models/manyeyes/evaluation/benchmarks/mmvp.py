"""MMVP: 150 pairs of images that CLIP takes for the same, one question on both; a pair counts where both are right.

The hub copy by lmms-lab-eval has four labels corrected (99, 100, 279, 280), worth 1.3 points at most. The paper had
GPT-4 read free answers; here the answers are letters.

Source: Tong et al., arXiv:2401.06209.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import option_letters
from manyeyes.evaluation.benchmarks.benchmark import IMAGE, TEXT, WHOLE, BenchmarkRow, Graded, Row
from manyeyes.evaluation.benchmarks.rules import by_facet, choice_prompt, outcome, percent

_OPTION = re.compile(r"\([a-z]\)\s*([^(]+?)(?=\s*\([a-z]\)|$)", re.IGNORECASE)


def options(row: Row) -> dict[str, str]:
    """The options out of "(a) ... (b) ...", under A and B."""
    return option_letters.lettered(text.strip() for text in _OPTION.findall(row["Options"]))


def answer_letter(row: Row) -> str:
    """The letter of the right option.

    Raises:
        EvaluationError: The column is neither (a) nor (b).
    """
    answer = row["Correct Answer"].strip().lower()
    for letter in ("a", "b"):
        if f"({letter})" in answer or answer == letter:
            return letter.upper()
    raise EvaluationError(
        f'mmvp: "Correct Answer" is "{row["Correct Answer"]}"', "(a) or (b)", "Give it as the hub has it."
    )


def grade(row: Row, prediction: str, variant: str) -> Graded:
    """1 for the right option."""
    gold = answer_letter(row)
    parsed = _parse(row, prediction, variant, gold)
    pair = _pair(row)
    return outcome(row, parsed=parsed, right=parsed == gold, cluster=pair, facets={"unit": pair})


def _parse(row: Row, prediction: str, variant: str, gold: str) -> str | None:
    if variant == "vlmevalkit":
        return option_letters.vlmevalkit(prediction, options(row))
    if variant == "cambrian":
        answer = option_letters.cambrian_choice(prediction)
        texts = [part.partition(")")[2].partition(")")[0].strip().lower() for part in row["Options"].split("(")[1:]]
        if answer == gold.lower() or answer == option_letters.lettered(texts).get(gold):
            return gold
        return answer.upper() if answer in ("a", "b") else None
    return option_letters.mmvp_lmms(prediction)


def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """``score`` and ``pairs``: percent of whole pairs with both right; ``single``: percent of questions right."""
    pairs = [pair for pair in by_facet(graded, "unit").values() if len(pair) == 2]
    both = sum(all(item.score == 1 for item in pair) for pair in pairs)
    share = 100 * both / len(pairs) if pairs else 0.0
    return {"score": share, "pairs": share, "single": percent(graded)}


def _pair(row: Row) -> str:
    return str(max(row["Index"] - 1, 0) // 2)


MMVP = BenchmarkRow(
    name="mmvp",
    title="MMVP, pairs",
    hub_id="lmms-lab-eval/MMVP",
    split="train",
    columns={"Index": WHOLE, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT, "image": IMAGE},
    licence="MIT by its authors' repository (tsb0601/MMVP)",
    cambrian_group="vision-centric",
    reported_by=("cambrian", "eagle"),
    variants=("lmms", "vlmevalkit", "cambrian"),
    default_variant="cambrian",
    default_reason="Cambrian made it one of its 16 benchmarks with letters for answers; MMVP's own script asks GPT-4",
    item_id=lambda row: str(row["Index"]),
    cluster=_pair,
    prompt=lambda row, style: choice_prompt(row["Question"], options(row), style),
    max_new_tokens=16,
    # Both questions of a pair.
    chance=lambda row: 0.25,  # noqa: ARG005
    grade=grade,
    aggregate=aggregate,
    options=lambda row: tuple(options(row)),
    scorer="mmvp pairs 3",
    metric="percent of pairs with both right",
    question=lambda row: str(row["Question"]),
    reference=answer_letter,
)
