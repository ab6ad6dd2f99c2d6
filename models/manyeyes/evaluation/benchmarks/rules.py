"""Published rules that several benchmarks share.

What the four systems' papers put around a question; lettered options; yes or no read out of a model's words, one
function for each way that evaluators do it; metrics of free-form answers: VQA accuracy with its normalisers, ANLS,
relaxed accuracy.

Each function says whose it is. Where published scripts differ, they differ on purpose here: scores are compared item by
item. Oddities of those scripts are kept and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import Graded, Row, read_from
from manyeyes.evaluation.benchmarks.option_letters import Options

PHRASE = "\nAnswer the question using a single word or phrase."
"""LLaVA-1.5, arXiv:2310.03744, section 3.3; Eagle (lmms-eval), Cambrian-1 and Mini-Gemini took it over."""

SHORT_ANSWER = "\nGive the short answer directly."
"""Cambrian-1's for OCRBench, DocVQA and InfographicVQA."""


def ask_for_phrase(row: Row, style: str) -> str:  # noqa: ARG001
    """The question as it is, and ``PHRASE``, in every style."""
    return str(row["question"]) + PHRASE


def ask_document(row: Row, style: str) -> str:
    """The question, with Cambrian's suffix in its style and ``PHRASE`` in the others."""
    return str(row["question"]) + (SHORT_ANSWER if style == "cambrian" else PHRASE)


LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."


def choice_prompt(question: str, options: Options, style: str, *, suffix: str = LETTER_SUFFIX) -> str:
    """Question, one ``A. text`` a line, and the suffix; Cambrian writes "Options:" behind the question."""
    heading = f"{question} Options:" if style == "cambrian" else question
    return "\n".join([heading, *(f"{letter}. {text}" for letter, text in options.items()), suffix])


def outcome(
    row: Row, *, parsed: str | None, right: bool, cluster: str, facets: Mapping[str, str] | None = None
) -> Graded:
    """An item that is right or wrong."""
    return Graded(id=str(row["id"]), cluster=cluster, parsed=parsed, score=float(right), facets=facets or {})


def percent(items: Sequence[Graded]) -> float:
    """Mean score times 100; 0 without items."""
    return 100 * sum(item.score for item in items) / len(items) if items else 0.0


def by_facet(items: Sequence[Graded], facet: str) -> dict[str, list[Graded]]:
    """The items by a facet's value, values sorted; items without the facet, or with an empty one, are left out."""
    groups: dict[str, list[Graded]] = {}
    for item in items:
        value = item.facets.get(facet)
        if value:
            groups.setdefault(value, []).append(item)
    return dict(sorted(groups.items()))


def percents(items: Sequence[Graded], *facets: str) -> dict[str, float]:
    """Percent right for each value of each facet, under the value's name."""
    named: dict[str, float] = {}
    for facet in facets:
        named |= percent_by_value([(item.facets.get(facet), item.score) for item in items])
    return named


def percent_by_value(scored: Sequence[tuple[str | None, float]]) -> dict[str, float]:
    """Mean score times 100 for each value, sorted; empty values are left out.

    Equal pairs are counted before anything else, as resampling asks for the figures a thousand times.
    """
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for (value, score), count in Counter(scored).items():
        if value:
            totals[value] = totals.get(value, 0.0) + score * count
            counts[value] = counts.get(value, 0) + count
    return {value: 100 * totals[value] / counts[value] for value in sorted(totals)}


def unless(empty: str) -> str | None:
    """The text, or ``None`` where it is empty."""
    return empty or None


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


_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've
somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll
y'all'd've you'd've
"""


def _with_one_apostrophe_less(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# "dont" becomes "don't"; of several apostrophes one may be missing. "somebody'd" is upstream's slip, kept. Upstream's
# "Im", "Ive" and "Id've" are left out: text is lower case by then, so they never match.
_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _with_one_apostrophe_less(word)} | {
    "somebody'd": "somebodyd"
}
_NUMBERS = {"none": "0", "zero": "0", "ten": "10"} | {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine".split(), start=1)  # noqa: SIM905
}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Upstream's pattern is (?!<=\d)(\.)(?!\d): the look-behind is mistyped and never refuses anything.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_OUTSIDE_NUMBERS = re.compile(r"(?<!\d)\.(?!\d)")
# re.UNICODE (32) is passed where the count belongs, so only the first 32 full stops go.
_MOST_PERIODS = 32
# People's answers repeat each other: ten to a question, and the same words to the next.
_MOST_REMEMBERED = 65_536
_COMMA = re.compile(r"\d,\d")
_COMMAS = re.compile(r"\d,+\d")


@lru_cache(maxsize=_MOST_REMEMBERED)
def normalise_evalai(text: str) -> str:
    """The normaliser of TextVQA and VizWiz in M4C, LLaVA, Cambrian-1 and lmms-eval.

    Source:
        ``EvalAIAnswerProcessor``; Pythia and MMF, arXiv:1904.08920.
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _digits_and_articles(_punctuation(_one_line(words), _COMMAS, _PERIOD))


@lru_cache(maxsize=_MOST_REMEMBERED)
def normalise_vqa(text: str) -> str:
    """The normaliser of VQAv2's official script, which keeps "it's" whole.

    Source:
        ``vqaEval.py``; VQA, arXiv:1505.00468.
    """
    return _digits_and_articles(_punctuation(_one_line(text), _COMMA, _PERIOD))


@lru_cache(maxsize=_MOST_REMEMBERED)
def normalise_vqa_lmms(text: str) -> str:
    """The normaliser of VQAv2 in lmms-eval: the official one, but several commas between digits count as one."""
    return _digits_and_articles(_punctuation(_one_line(text), _COMMAS, _PERIOD))


@lru_cache(maxsize=_MOST_REMEMBERED)
def normalise_vlmevalkit(text: str) -> str:
    """VLMEvalKit's normaliser: the official one, but a full stop after a digit stays ("3." is not "3")."""
    return _digits_and_articles(_punctuation(_one_line(text), _COMMA, _PERIOD_OUTSIDE_NUMBERS))


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Mean over the annotators of min(1, others who agree / 3), on text that is normalised already.

    Args:
        answer: The model's.
        golds: The annotators', ten as a rule; 0 where there are none.
    """
    if not golds:
        return 0.0
    matches = sum(gold == answer for gold in golds)
    agree = (matches - 1) if matches else 0
    return (matches * min(1.0, agree / 3) + (len(golds) - matches) * min(1.0, matches / 3)) / len(golds)


def grade_vqa(
    row: Row, prediction: str, variant: str, *, cluster: str, facets: Mapping[str, str] | None = None
) -> Graded:
    """VQA accuracy on normalised text; ``vlmevalkit`` has a normaliser of its own, the others agree."""
    normalise = normalise_vlmevalkit if variant == "vlmevalkit" else normalise_evalai
    answer = normalise(prediction)
    return Graded(
        id=row["id"],
        cluster=cluster,
        parsed=read_from(prediction, answer),
        score=vqa_accuracy(answer, [normalise(gold) for gold in row["answers"]]),
        facets=facets or {},
    )


def anls(answer: str, golds: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one item; below 0.5 counts as 0, 0.5 itself is kept.

    Distances are measured after case and repeated white space are gone, lengths before: stray spaces cost.

    Args:
        answer: The model's, as written.
        golds: The best counts.

    Source:
        ST-VQA, arXiv:1905.13648; the script of the Robust Reading Competition.
    """
    distances = []
    for gold in golds:
        ours, theirs = (" ".join(text.strip().lower().split()) for text in (answer, gold))
        # Upstream measures the length of the upper-cased text, where one letter may become two.
        longest = max(len(gold.upper()), len(answer.upper()))
        distances.append(levenshtein(ours, theirs) / longest if longest else 0.0)
    similarity = 1 - min(distances, default=1.0)
    return similarity if similarity >= 0.5 else 0.0


def levenshtein(first: str, second: str) -> int:
    """Least insertions, deletions and substitutions of letters that make one text the other."""
    if len(first) > len(second):
        first, second = second, first
    row = list(range(len(first) + 1))
    for number, letter in enumerate(second, start=1):
        above = row
        row = [number]
        for place, other in enumerate(first):
            row.append(above[place] if letter == other else 1 + min(above[place], above[place + 1], row[-1]))
    return row[-1]


def relaxed_match(answer: str, gold: str) -> bool:
    """Within 5% where both are numbers ("10%" is 0.1) and the reference is not 0, else equal but for case.

    Source:
        ChartQA, arXiv:2203.10244, section 5.1; the function of Pix2Struct, Qwen-VL, lmms-eval and VLMEvalKit.
    """
    found, target = _as_number(answer), _as_number(gold)
    if found is not None and target:
        return abs(found - target) / abs(target) <= 0.05
    return answer.lower() == gold.lower()


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str, comma: re.Pattern[str], period: re.Pattern[str]) -> str:
    """Drop a mark that stands beside a space anywhere in the text, else put a space in its place."""
    numbers = comma.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or numbers else " ")
    return period.sub("", out, count=_MOST_PERIODS)


def _digits_and_articles(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
