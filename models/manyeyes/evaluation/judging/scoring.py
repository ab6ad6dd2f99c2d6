"""Scores answers that only a language model can judge, and says for how many it could not.

An item without a verdict is neither wrong nor left out in silence: there is no score until every item has one, or all
but the share that ``max_unjudged`` allows, and then the score says how many it is of.

Two models' answers to ScienceQA can be made one, as LLaVA did with GPT-4's. ``complement``: the other model's option,
and ours where it names none. ``judge``: where both name an option and the options differ, the judge reads question and
both answers and decides; where one names none, the other's counts. ``upper_bound`` is what a judge that is always right
would get.

Source: LLaVA, arXiv:2304.08485, section 5.2 (``eval_science_qa_gpt4.py``, with GPT-4 as the other model and as the
judge). LLaVA's script draws a random option where an answer names none; here that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BenchmarkRow, Graded, Row, find_benchmark, llava_bench, mm_vet
from manyeyes.evaluation.benchmarks import mathvista as mathvista_judge
from manyeyes.evaluation.benchmarks.benchmark import Judging
from manyeyes.evaluation.benchmarks.scienceqa import options
from manyeyes.evaluation.judging.judge import Judge
from manyeyes.evaluation.score import (
    LISTED_IDS,
    ScoredItem,
    ScoreReport,
    as_missing,
    build_score_report,
    grade_predictions,
    match_predictions,
)
from manyeyes.strict import StrictModel
from manyeyes.web.chat_client import ServiceUse, Verdict, ask_each

JUDGINGS: dict[str, Judging] = {
    "llava-bench-coco": llava_bench.JUDGING,
    "llava-bench-wild": llava_bench.JUDGING,
    "mm-vet": mm_vet.JUDGING,
    "mathvista": mathvista_judge.JUDGING,
}


class JudgeReport(StrictModel):
    """What ``manyeyes judge --json`` prints."""

    benchmark: str = Field(description="Row of BENCHMARKS.")
    score: float | None = Field(description="That of scored; null where too many items have no verdict.")
    scored: ScoreReport | None = Field(description="Over the items that have a verdict; null where too few have.")
    judged: int = Field(ge=0, description="Items with a verdict.")
    unjudged: int = Field(ge=0, description="Items without one; in no figure.")
    unjudged_reasons: dict[str, str] = Field(max_length=LISTED_IDS, description="Why, by id; the first of them.")
    prompts: str = Field(description="Name and version of what the judge is asked.")
    judge: ServiceUse = Field(description="Who judged, and what it took.")


def judge_items(
    row: BenchmarkRow, answers: Sequence[tuple[Row, str]], judge: Judge, *, variant: str
) -> list[Verdict[Graded]]:
    """Ask the judge about each answer, several at a time.

    Args:
        row: The benchmark; one of ``JUDGINGS``.
        answers: Row (with ``id``) and what the model wrote.
        judge: Is asked.
        variant: Whose scoring.

    Returns:
        One verdict an answer, in order.

    Raises:
        EvaluationError: A column is missing or wrong, which is found before the judge is asked, or no judge knows the
            benchmark.
        JudgeError: The judge cannot be asked at all; what it answered so far is in its cache.
    """
    judging = find_judging(row.name)
    prepared = [_Judged.prepare(row, judging, reference, prediction, variant) for reference, prediction in answers]
    # All that is done with a verdict is done to an invented one: a wrong column is found before anything is paid for.
    graded = [item for each in prepared if (item := each.direct or each.invented) is not None]
    if graded:
        row.aggregate(graded, variant)

    def judge_one(item: _Judged) -> Verdict[Graded]:
        if item.messages is None:
            return Verdict(item.direct)
        return judge.ask(
            item.messages,
            read=lambda text: judging.read(item.reference, item.prediction, text, variant),
            temperature=judging.temperature,
            max_tokens=judging.max_tokens,
        )

    return list(ask_each(judge_one, prepared, judge))


@dataclass(frozen=True)
class _Judged:
    """One answer: what the judge is asked about it, or what it gets without a judge.

    Attributes:
        reference: The item's row.
        prediction: What the model wrote.
        messages: For the judge; None where rules decide.
        direct: What rules say, where they decide.
        invented: What the judge's example would give, where it decides.
    """

    reference: Row
    prediction: str
    messages: Sequence[Mapping[str, str]] | None
    direct: Graded | None = None
    invented: Graded | None = None

    @classmethod
    def prepare(cls, row: BenchmarkRow, judging: Judging, reference: Row, prediction: str, variant: str) -> _Judged:
        messages = judging.ask(reference, prediction, variant)
        if messages is None:
            direct = (judging.direct or row.grade)(reference, prediction, variant)
            return cls(reference, prediction, None, direct=direct)
        invented = judging.read(reference, prediction, judging.example, variant)
        return cls(reference, prediction, messages, invented=invented)


def find_judging(name: str) -> Judging:
    """How a judge is asked about a benchmark.

    Raises:
        EvaluationError: Its answers need no judge.
    """
    if name not in JUDGINGS:
        raise EvaluationError(
            f"{name} needs no judge",
            f"one that does: {', '.join(JUDGINGS)}",
            f"Score it with: manyeyes score {name}",
        )
    return JUDGINGS[name]


def judge_predictions(
    name: str,
    references: Sequence[Row],
    predictions: Sequence[Mapping[str, Any]],
    judge: Judge,
    *,
    variant: str | None = None,
    out: Path | None = None,
) -> JudgeReport:
    """Have predictions judged against references.

    A missing prediction is judged as an empty answer and scores 0, whatever the judge says.

    Args:
        name: Row of ``BENCHMARKS``.
        references: ``id`` and the benchmark's columns; images may be left out.
        predictions: ``id`` and ``prediction``, in any order.
        judge: Is asked.
        variant: Whose scoring; the row's default for ``None``.
        out: Folder for ``score.json`` and ``items.jsonl``; nothing is written for ``None``.

    Raises:
        EvaluationError: Unknown benchmark or variant, one that needs no judge, or rows that do not fit.
        JudgeError: The judge cannot be asked at all.
        StorageError: No space, or no permission.
    """
    row = find_benchmark(name)
    judging = find_judging(name)
    variant = row.check_variant(variant)
    matched = match_predictions(row, references, predictions)
    answers = [(reference, matched.answers.get(item_id, "")) for item_id, reference in matched.known.items()]
    verdicts = judge_items(row, answers, judge, variant=variant)
    items: list[ScoredItem] = []
    reasons: dict[str, str] = {}
    for (item_id, _), verdict in zip(matched.known.items(), verdicts, strict=True):
        prediction = matched.answers.get(item_id)
        if verdict.value is None:
            reasons[item_id] = verdict.reason
        else:
            items.append(ScoredItem(as_missing(verdict.value) if prediction is None else verdict.value, prediction))
    scored = None
    if items and enough_judged(len(reasons), len(verdicts), judge):
        scored = build_score_report(row, variant, matched, items, out=out, judge=name_judge(judge, judging))
    return JudgeReport(
        benchmark=name,
        score=None if scored is None else scored.score,
        scored=scored,
        judged=len(items),
        unjudged=len(reasons),
        unjudged_reasons=dict(list(reasons.items())[:LISTED_IDS]),
        prompts=judging.prompts,
        judge=judge.use,
    )


def name_judge(judge: Judge, judging: Judging) -> str:
    """Who judged and what it was asked: figures compare only where it is equal."""
    temperature = judging.temperature if judge.spec.temperature is None else judge.spec.temperature
    return f"{judge.spec.model}, {judging.prompts}, temperature {temperature}"


def enough_judged(unjudged: int, total: int, judge: Judge) -> bool:
    """Whether so few items lack a verdict that the others may be scored."""
    return unjudged <= judge.spec.max_unjudged * total


Scheme = Literal["complement", "judge"]

BENCHMARK = "scienceqa"
_MAX_TOKENS = 512
_TASK = (
    "Two assistants answered the question above and named different options. Weigh both answers, then decide yourself; "
    'end with one sentence of the form "The answer is X.", where X is the letter of an option.'
)


class EnsembleReport(StrictModel):
    """What ``manyeyes judge scienceqa --other FILE --json`` prints."""

    benchmark: str = Field(description="Row of BENCHMARKS.")
    scheme: Scheme = Field(description="How two answers were made one.")
    score: float | None = Field(description="Of the ensemble; percent. null where too many items have no verdict.")
    ensemble: ScoreReport | None = Field(description="Of the ensemble, over items that are decided.")
    ours: ScoreReport = Field(description="Of the first model alone.")
    other: ScoreReport = Field(description="Of the other model alone.")
    upper_bound: float = Field(ge=0, le=100, description="Percent of all items that at least one model gets right.")
    agreed: int = Field(ge=0, description="Items on which both name the same option.")
    differed: int = Field(ge=0, description="Items on which both name an option, and not the same.")
    only_one: int = Field(ge=0, description="Items on which one model names none; the other's counts.")
    neither: int = Field(ge=0, description="Items on which no model names an option; wrong.")
    unjudged: int = Field(ge=0, description="Items on which they differ and the judge gave no verdict; in no figure.")
    unjudged_reasons: dict[str, str] = Field(max_length=LISTED_IDS, description="Why, by id; the first of them.")
    judge: ServiceUse | None = Field(description="Who judged, and what it took; null for complement.")


@dataclass(frozen=True)
class _Pair:
    """One item, answered by both."""

    row: Row
    ours: Graded
    other: Graded
    texts: tuple[str, str]

    @property
    def differ(self) -> bool:
        named = self.ours.parsed is not None and self.other.parsed is not None
        return named and self.ours.parsed != self.other.parsed


def score_ensemble(
    references: Sequence[Row],
    predictions: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    *,
    scheme: Scheme,
    judge: Judge | None = None,
    variant: str | None = None,
    out: Path | None = None,
) -> EnsembleReport:
    """Score two models' answers to ScienceQA, and the two made one.

    Args:
        references: ``id`` and ScienceQA's columns; images may be left out.
        predictions: Our model's ``id`` and ``prediction``.
        other: The other model's.
        scheme: How two answers become one.
        judge: Decides where they differ; needed for ``judge``.
        variant: Whose reading of the letters; the row's default for ``None``.
        out: Folder for the ensemble's ``score.json`` and ``items.jsonl``; nothing is written for ``None``.

    Raises:
        EvaluationError: No judge, or rows that do not fit.
        JudgeError: The judge cannot be asked at all.
        StorageError: No space, or no permission.
    """
    row = find_benchmark(BENCHMARK)
    variant = row.check_variant(variant)
    matched = [match_predictions(row, references, answers) for answers in (predictions, other)]
    items = [grade_predictions(row, part, variant) for part in matched]
    pairs = [
        _Pair(reference, ours.graded, theirs.graded, (ours.prediction or "", theirs.prediction or ""))
        for reference, ours, theirs in zip(matched[0].known.values(), *items, strict=True)
    ]
    # Before anybody is asked: what is wrong with the rows shows here.
    alone = [
        build_score_report(row, variant, part, graded, out=None) for part, graded in zip(matched, items, strict=True)
    ]
    differing = [pair for pair in pairs if pair.differ]
    verdicts: list[Verdict[Graded]] = []
    if scheme == "judge":
        if judge is None:
            raise EvaluationError(
                "no judge", "one that decides where the models differ", "Give --endpoint and --model."
            )
        verdicts = _decide(row, differing, judge, variant=variant)
    decided = {pair.ours.id: verdict for pair, verdict in zip(differing, verdicts, strict=False)}
    reasons = {item_id: verdict.reason for item_id, verdict in decided.items() if verdict.value is None}
    final = [
        ScoredItem(_final(pair, decided.get(pair.ours.id)), _text(pair, decided.get(pair.ours.id)))
        for pair in pairs
        if pair.ours.id not in reasons
    ]
    ensemble = None
    if final and (judge is None or enough_judged(len(reasons), len(pairs), judge)):
        ensemble = build_score_report(row, variant, matched[0], final, out=out)
    named = [(pair.ours.parsed is not None) + (pair.other.parsed is not None) for pair in pairs]
    return EnsembleReport(
        benchmark=BENCHMARK,
        scheme=scheme,
        score=None if ensemble is None else ensemble.score,
        ensemble=ensemble,
        ours=alone[0],
        other=alone[1],
        upper_bound=100 * sum(max(pair.ours.score, pair.other.score) for pair in pairs) / len(pairs),
        agreed=named.count(2) - len(differing),
        differed=len(differing),
        only_one=named.count(1),
        neither=named.count(0),
        unjudged=len(reasons),
        unjudged_reasons=dict(list(reasons.items())[:LISTED_IDS]),
        judge=None if scheme == "complement" or judge is None else judge.use,
    )


def _decide(row: BenchmarkRow, pairs: Sequence[_Pair], judge: Judge, *, variant: str) -> list[Verdict[Graded]]:
    def read(pair: _Pair, text: str) -> Graded | None:
        graded = row.grade(pair.row, text, variant)
        return None if graded.parsed is None else graded

    def ask(question: tuple[_Pair, list[dict[str, str]]]) -> Verdict[Graded]:
        pair, messages = question
        return judge.ask(messages, read=partial(read, pair), temperature=0.0, max_tokens=_MAX_TOKENS)

    return list(ask_each(ask, [(pair, _messages(pair)) for pair in pairs], judge))


def _messages(pair: _Pair) -> list[dict[str, str]]:
    choices = " ".join(f"({letter}) {text}" for letter, text in options(pair.row).items())
    hint = pair.row.get("hint") or "N/A"
    text = (
        f"Question: {pair.row['question']}\nContext: {hint}\nOptions: {choices}\n\n"
        f"[Assistant 1]\n{pair.texts[1]}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{pair.texts[0]}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{_TASK}"
    )
    return [{"role": "user", "content": text}]


def _final(pair: _Pair, verdict: Verdict[Graded] | None) -> Graded:
    if verdict is not None and verdict.value is not None:
        return verdict.value
    return pair.ours if pair.other.parsed is None else pair.other


def _text(pair: _Pair, verdict: Verdict[Graded] | None) -> str:
    if verdict is not None and verdict.value is not None:
        return verdict.text
    return pair.texts[0] if pair.other.parsed is None else pair.texts[1]
