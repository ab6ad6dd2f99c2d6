"""MMMU's open questions: candidates out of a free answer, and whether one of them is the reference.

Source: MMMU, eval/eval_utils.py, parse_open_response and eval_open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
