"""Scores answers that only a language model can judge, and says for how many it could not.

An item without a verdict is neither wrong nor left out in silence: there is no score until every item has one, or all
but the share that ``max_unjudged`` allows, and then the score says how many it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import (
    BenchmarkRow,
    Graded,
    Row,
    find_benchmark,
    llava_bench,
    mathvista_judge,
    mm_vet,
)
from manyeyes.evaluation.benchmarks.judging import Judging
from manyeyes.evaluation.judging.judge import Judge, JudgeUse, Verdict
from manyeyes.evaluation.score import (
    LISTED_IDS,
    ScoredItem,
    ScoreReport,
    as_missing,
    build_score_report,
    match_predictions,
)
from manyeyes.strict import StrictModel

T = TypeVar("T")

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
    judge: JudgeUse = Field(description="Who judged, and what it took.")


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
    _check_items(row, judging, answers, variant)

    def judge_one(item: tuple[Row, str]) -> Verdict[Graded]:
        reference, prediction = item
        messages = judging.ask(reference, prediction, variant)
        if messages is None:
            return Verdict((judging.direct or row.grade)(reference, prediction, variant))
        return judge.ask(
            messages,
            read=lambda text: judging.read(reference, prediction, text, variant),
            temperature=judging.temperature,
            max_tokens=judging.max_tokens,
        )

    return ask_all(judge_one, answers, judge)


def _check_items(row: BenchmarkRow, judging: Judging, answers: Sequence[tuple[Row, str]], variant: str) -> None:
    """Do all that is done with a verdict, on an invented one: a wrong column is found before anything is paid for."""
    graded = []
    for reference, prediction in answers:
        if judging.ask(reference, prediction, variant) is None:
            item: Graded | None = (judging.direct or row.grade)(reference, prediction, variant)
        else:
            item = judging.read(reference, prediction, judging.example, variant)
        if item is not None:
            graded.append(item)
    if graded:
        row.aggregate(graded, variant)


def ask_all(ask: Callable[[T], Verdict[Graded]], questions: Sequence[T], judge: Judge) -> list[Verdict[Graded]]:
    """Ask all questions, as many at a time as the judge takes; where one raises, the others are given up.

    Args:
        ask: Asks the judge one question.
        questions: In order.
        judge: Is asked.

    Returns:
        One verdict a question, in order.
    """
    with ThreadPoolExecutor(judge.spec.concurrency, thread_name_prefix="judge") as pool:
        futures = [pool.submit(ask, question) for question in questions]
        try:
            return [future.result() for future in futures]
        except BaseException:
            judge.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
