"""Reading the chosen option out of a model's words: one function for each way that evaluators do it.

They disagree on purpose or by accident, and papers' figures hang on it, so each is followed to the letter, oddities
included. ``options`` maps letters to option texts, in order. ``None`` means that nothing can be read. None of them
strips its input first; lmms-eval strips a response before it scores it, which is the caller's business.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence

LETTERS = string.ascii_uppercase

Options = Mapping[str, str]

_ANSWER_KEYWORDS = ("answer is", "answer is:", "answer:")
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER_FROM_API = "Failed to obtain answer via API"
_REFUSED = "Z"
_VLMEVALKIT_SAID = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)


def lettered(texts: Iterable[str]) -> dict[str, str]:
    """Option texts under A, B, C, ..."""
    return dict(zip(LETTERS, texts, strict=False))


def mmmu_official(response: str, options: Options) -> str | None:
    """MMMU's own parser without its random fallback.

    ``(X)`` anywhere; else `` X `` with spaces around; else, beyond five words, an option's text. Of several the last.

    Source:
        MMMU, eval/eval_utils.py, parse_multi_choice_response.
    """
    return _mmmu(response, options, bare_patterns=(" {} ",))


def mmmu_lmms(response: str, options: Options) -> str | None:
    """lmms-eval's copy of MMMU's parser: a letter needs no space before it (``DNA strand`` is A), and ``X.`` counts.

    Source:
        lmms-eval, tasks/_task_utils/mmmu_mcq_utils.py, parse_mmmu_multi_choice_response.
    """
    return _mmmu(response, options, bare_patterns=("{} ", "{}."))


def _mmmu(response: str, options: Options, *, bare_patterns: Sequence[str]) -> str | None:
    for character in ",.!?;:'":
        response = response.strip(character)
    response = f" {response} "
    bracketed = [letter for letter in options if f"({letter})" in response]
    if bracketed:
        return _last(bracketed, lambda letter: response.rfind(f"({letter})"))
    for pattern in bare_patterns:
        bare = [letter for letter in options if pattern.format(letter) in response]
        if bare:
            return _last(bare, lambda letter: response.rfind(f" {letter} "))
    if len(response.split()) <= 5:
        return None
    lowered = response.lower()
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return _last(named, lambda letter: lowered.rfind(options[letter].lower())) if named else None


def _last(letters: Sequence[str], position: Callable[[str], int]) -> str:
    """The letter that stands last; the first of the letters where none has a place."""
    return max(letters, key=position)


def vlmevalkit(response: str, options: Options) -> str | None:
    """VLMEvalKit's ``can_infer`` without a judge; a refusal is ``Z``, which no option has.

    Exactly one option letter among the words, within the last four of them; else A to D after the first "answer is",
    whatever the case, so that "the answer is a dog" is A; else the only option whose text occurs, unless the response
    is more than twice as long as all options together.

    Source:
        VLMEvalKit since June 17, 2026, vlmeval/utils/matching_util.py.
    """
    return _vlmevalkit_letter(response, options) or _vlmevalkit_text(response, options)


def _vlmevalkit_letter(response: str, options: Options) -> str | None:
    if _NO_ANSWER_FROM_API in response:
        return None
    if any(refusal in response for refusal in _REFUSALS):
        return _REFUSED
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", response).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - 5:
        return present[0]
    if not present and _REFUSED in words:
        return _REFUSED
    said = _VLMEVALKIT_SAID.search(response)
    letter = said.group(1).upper() if said else None
    return letter if letter in options else None


def _vlmevalkit_text(response: str, options: Options) -> str | None:
    # Upstream measures the response in lower case, where one letter may become two.
    if len(response.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    return _only_text(response, options)


def _only_text(response: str, options: Options) -> str | None:
    """The letter of the one option whose text occurs in the response, whatever the case."""
    lowered = response.lower()
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return named[0] if len(named) == 1 else None


def mmbench(response: str, options: Options) -> str | None:
    """MMBench's own rules before a judge is asked, as lmms-eval keeps them.

    Exactly one of A to E as a word of its own (given up where "A" is among more than three words, as it may be an
    article); else exactly one in a dressed form, tried in order; else the only option whose text occurs.

    Source:
        lmms-eval, tasks/mmbench/mmbench_evals.py, can_infer (from OpenCompass).
    """
    return _mmbench_letter(response) or _only_text(response, options)


_MMBENCH_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def _mmbench_letter(response: str) -> str | None:
    if _NO_ANSWER_FROM_API in response:
        return None
    words = response.split()
    bare = [letter for letter in "ABCDE" if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for form in _MMBENCH_FORMS:
        dressed = [letter for letter in "ABCDE" if form.format(letter) in words]
        if len(dressed) == 1:
            return dressed[0]
    return None


_PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is",
    "the choice is", "choice is", "the correct choice is", "correct choice is",
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def ranked(response: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's ``extract_mcq_answer``: every trace of a letter, the strongest wins, of equals the last.

    From strong to weak: starts the text, ends it, follows a phrase such as "the answer is" anywhere, ``(X)``, ``X.``,
    ``X:``, ``X)``, ``X `` and, where there is none of these, the letter anywhere. Upper case only.

    Source:
        lmms-eval 0.7.3, tasks/_task_utils/mcq_extract.py.
    """
    text = response.strip()
    if not text:
        return None
    for character in ",.!?;:'\"":
        text = text.strip(character)
    text = f" {text} "
    found: list[tuple[int, int, str]] = []
    for strength, pattern in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        for letter in letters:
            place = text.rfind(pattern.format(letter))
            if place >= 0:
                found.append((strength, place, letter))
    found += _after_phrases(text, letters)
    stripped = text.strip()
    for letter in letters:
        if stripped.startswith(letter) and not stripped[1:2].isalpha():
            found.append((10, 0, letter))
        if stripped.endswith(letter) and not stripped[:-1][-1:].isalpha():
            found.append((9, len(text) - 1, letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


def _after_phrases(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    lowered = text.lower()
    found = []
    for phrase in _PHRASES:
        start = lowered.find(phrase)
        if start < 0:
            continue
        for letter in letters:
            place = text.find(letter, start + len(phrase))
            if place >= 0:
                found.append((7, place, letter))
    return found


def cambrian_tail(response: str) -> str:
    """What follows the last "answer is" or "answer:", in lower case, spaces stripped.

    Source:
        Cambrian, eval/eval/*/*_test.py, extract_single_answer before its last line.
    """
    text = response.lower().strip()
    for keyword in _ANSWER_KEYWORDS:
        if keyword in text:
            text = text.split(keyword)[-1]
    return text.strip()


def cambrian_letter(response: str, *, trailing: str = ".:,") -> str:
    """Cambrian's first character, in lower case; empty where there is none.

    Args:
        response: What the model said.
        trailing: Marks that are stripped from the end first.

    Source:
        Cambrian, eval/eval/*/*_test.py, extract_mcq_answer.
    """
    return cambrian_choice(response, trailing=trailing)[:1]


def cambrian_choice(response: str, *, trailing: str = ".:,") -> str:
    """Cambrian's answer before it is cut to one character, as MMVP takes it."""
    return cambrian_tail(response).rstrip(trailing).lstrip("(").rstrip(")")


def llava_scienceqa(response: str) -> str | None:
    """LLaVA's ScienceQA rule: a letter A to E alone, or ``X. ...``, or one single "The answer is X.".

    Any character does for the last full stop, but there has to be one.

    Source:
        LLaVA, llava/eval/eval_science_qa.py.
    """
    if response in tuple("ABCDE"):
        return response
    if len(response) >= 3 and response[0] in "ABCDE" and response[1:3] == ". ":
        return response[0]
    found = re.findall(r"The answer is ([A-Z]).", response)
    return str(found[0]) if len(found) == 1 else None


def cv_bench_lmms(response: str) -> str | None:
    """The first letter of the text after brackets and spaces, whatever the word ("The answer is C." is T).

    Source:
        lmms-eval, tasks/cv_bench/cv_bench_utils.py.
    """
    match = re.match(r"[\(\s]*([A-Z])", response.strip(), flags=re.IGNORECASE)
    return match.group(1).upper() if match else None


_MMVP_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\s*\(?([AB])\)?\.?\s*$",
        r"^\s*\(?([AB])\)?[\.\s]",
        r"answer\s+is\s+\(?([AB])\)?",
        r"option\s+\(?([AB])\)?",
        r"\(?([AB])\)?(?:\s|$)",
    )
)


def mmvp_lmms(response: str) -> str | None:
    """A or B: alone, at the start, after "answer is" or "option", before a space or the end, or as first character.

    Source:
        lmms-eval, tasks/mmvp/utils.py.
    """
    text = response.strip()
    for pattern in _MMVP_PATTERNS:
        match = pattern.search(text)
        if match:
            return match.group(1).upper()
    first = text[:1].upper()
    return first if first in ("A", "B") else None
