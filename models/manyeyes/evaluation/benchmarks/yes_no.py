"""Reading yes or no out of a model's words: one function for each way that evaluators do it."""

from __future__ import annotations

import re

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import Row

OPTIONS = ("Yes", "No", "yes", "no")
"""What may be answered; prompts leave the case to the model."""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS_REMOVED = 32
"""VQA's normaliser passes ``re.UNICODE`` where ``re.sub`` takes a count, so only so many full stops go."""


def gold(row: Row) -> str:
    """``yes`` or ``no`` out of the column ``answer``, whatever its case.

    Raises:
        EvaluationError: It is neither.
    """
    answer = str(row["answer"]).lower().strip().rstrip(".")
    if answer not in ("yes", "no"):
        raise EvaluationError(f'"answer" is {row["answer"][:60]!r}', "yes or no", "Give it as the hub has it.")
    return answer


def pope_official(response: str) -> str:
    """POPE's own rule: "no" where the first sentence has the word No, not or no; anything else, even nothing, is "yes".

    Source:
        LLaVA, llava/eval/eval_pope.py (POPE, evaluate.py).
    """
    words = response.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_official(response: str) -> str | None:
    """MME's own rule: yes or no among the first four characters, yes first; nothing is stripped.

    Source:
        MME, eval_tool/calculation.py.
    """
    return _within_four(response.lower())


def mme_lmms(response: str) -> str | None:
    """MME's rule on the text without spaces at its ends and without any full stop; ``y`` and ``n`` alone count too.

    Source:
        lmms-eval, tasks/mme/utils.py, parse_pred_ans.
    """
    text = response.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) if len(text) == 1 else _within_four(text)


def _within_four(text: str) -> str | None:
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def vlmevalkit_yes_no(response: str) -> str | None:
    """VLMEvalKit's rule: the word yes or the word no anywhere, but not both; a judge would be asked about the rest.

    Source:
        VLMEvalKit, vlmeval/dataset/utils/yorn.py, YOrN_Extraction.
    """
    words = _without_marks(response.lower()).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "yes" if yes else "no"


def _without_marks(text: str) -> str:
    """VLMEvalKit's ``process_punctuation``: a mark with a space on either side goes, any other becomes a space."""
    comma_between_digits = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or comma_between_digits else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=_PERIODS_REMOVED)
