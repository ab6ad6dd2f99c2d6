"""Score a model on a recipe's benchmarks, with the image and without it.

Each half of each benchmark is kept as soon as it is done, so an evaluation that was stopped goes on from there. With
the image, all questions on one image are asked together: the encoders see it once and the questions share its prefix.
Without the image, equal questions are the same input to a greedy model and are asked once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answerers import Answerer
from manyeyes.evaluation.benchmarks import Benchmark, Item, find_benchmark, load_benchmark
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, write_outcomes
from manyeyes.evaluation.output import write_file
from manyeyes.evaluation.report import render_html, render_markdown
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard, ScoredModel, TypeScore, write_scorecard
from manyeyes.evaluation.scoring import Estimate, clustered_mean, paired_difference
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Group

Half = Literal["image-on", "image-off"]
HALVES: tuple[Half, ...] = ("image-on", "image-off")

# Without an image a question is short: so many of them weigh about as much as one image with its questions.
_QUESTIONS_PER_IMAGE = 8


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is.

    Attributes:
        benchmark: Being answered.
        half: ``image-on`` or ``image-off``.
        done: Questions answered in this half.
        total: Questions of this half; without the image, distinct ones.
        score: Percent right so far in this half.
        questions_per_s: Since this half began.
        eta_s: Seconds that this half still takes.
    """

    benchmark: str
    half: Half
    done: int
    total: int
    score: float
    questions_per_s: float
    eta_s: float


class _Answered(BaseModel):
    """A finished half, as it is kept for an evaluation that goes on later."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(description="Digest over model, benchmark, prompts and answering code.")
    predictions: dict[str, str] = Field(description="Text by item id.")
    seconds: float


def evaluate(
    answerer: Answerer,
    recipe: Recipe,
    *,
    snapshot: Snapshot,
    out_dir: Path,
    code_digest: str,
    model_digest: str,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
    work_dir: Path | None = None,
) -> Scorecard:
    """Ask every question of the recipe's benchmarks, score the answers and write the results.

    Writes ``scorecard.json``, ``items.parquet``, ``report.html`` and ``report.md``.

    Args:
        answerer: The model.
        recipe: Says which benchmarks, how many items and how long answers may be.
        snapshot: Has the benchmarks' data sets.
        out_dir: Folder for the results.
        code_digest: Of the code that evaluates.
        model_digest: Of the checkpoint or the bundle behind ``answerer``.
        on_progress: Called after each batch.
        work_dir: Keeps finished halves while the evaluation runs; ``out_dir/unfinished`` when left out.

    Returns:
        What ``scorecard.json`` holds.

    Raises:
        EvaluationError: Unknown benchmark, or an answerer that returns another number of answers than questions.
        SnapshotError: A data set is missing or broken.
        StorageError: No space, or no permission.
    """
    work_dir = out_dir / "unfinished" if work_dir is None else work_dir
    rows = [find_benchmark(name) for name in recipe.evaluation.benchmarks]
    benchmarks = [load_benchmark(row, snapshot=snapshot, max_items=recipe.evaluation.max_items) for row in rows]
    scores: dict[str, BenchmarkScore] = {}
    outcomes: list[Outcome] = []
    kept: list[Path] = []
    for benchmark in benchmarks:
        halves: dict[Half, _Answered] = {}
        for half in HALVES:
            key = _half_key(benchmark, recipe, half, answerer.name, model_digest, code_digest)
            file = work_dir / f"{benchmark.row.name}-{half}-{key[:16]}.json"
            answered = _read_answered(file, key)
            if answered is None:
                answered = _answer_half(benchmark, answerer, recipe, half, key, on_progress)
                write_file(file, answered.model_dump_json().encode())
            kept.append(file)
            halves[half] = answered
        graded = _grade(benchmark, halves["image-on"].predictions, halves["image-off"].predictions)
        outcomes.extend(graded)
        scores[benchmark.row.name] = _score(
            benchmark,
            graded,
            prompt_digest=_prompt_digest(benchmark, recipe),
            seconds=(halves["image-on"].seconds, halves["image-off"].seconds),
        )
    scorecard = Scorecard(
        model=ScoredModel(digest=model_digest, kind=answerer.name),
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        data_md5=snapshot.md5,
        code_digest=code_digest,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        benchmarks=scores,
    )
    digests = {benchmark.row.name: benchmark.digest for benchmark in benchmarks}
    write_outcomes(OutcomeFile(model_digest, answerer.name, digests, outcomes), out_dir / "items.parquet")
    write_file(out_dir / "report.html", render_html(scorecard, outcomes, benchmarks).encode())
    write_file(out_dir / "report.md", render_markdown(scorecard, outcomes, benchmarks).encode())
    write_scorecard(scorecard, out_dir / "scorecard.json")
    for file in kept:
        file.unlink(missing_ok=True)
    if work_dir == out_dir / "unfinished":
        shutil.rmtree(work_dir, ignore_errors=True)
    return scorecard


def _answer_half(
    benchmark: Benchmark,
    answerer: Answerer,
    recipe: Recipe,
    half: Half,
    key: str,
    on_progress: Callable[[EvaluationProgress], None] | None,
) -> _Answered:
    plan = _with_image if half == "image-on" else _without_image
    total = len(benchmark.items) if half == "image-on" else len({item.prompt for item in benchmark.items})
    predictions: dict[str, str] = {}
    correct = 0.0
    done = 0
    seconds = 0.0
    for groups, items_by_question in plan(benchmark, recipe.evaluation.batch_size):
        started = time.perf_counter()
        answers = answerer.answer_groups(groups, max_new_tokens=recipe.evaluation.max_new_tokens)
        seconds += time.perf_counter() - started
        texts = [answer.text for group in answers for answer in group]
        if [len(group) for group in answers] != [len(group.questions) for group in groups]:
            raise EvaluationError(
                f"{answerer.name} returned {len(texts)} answers to {len(items_by_question)} questions",
                "one answer per question, in order",
                "Check the answerer.",
            )
        for text, items in zip(texts, items_by_question, strict=True):
            for item in items:
                predictions[item.id] = text
                correct += benchmark.row.grade(text, item.reference)[1]
        done += len(texts)
        if on_progress is not None:
            rate = done / max(seconds, 1e-9)
            on_progress(
                EvaluationProgress(
                    benchmark=benchmark.row.name,
                    half=half,
                    done=done,
                    total=total,
                    score=100 * correct / len(predictions),
                    questions_per_s=rate,
                    eta_s=(total - done) / rate,
                )
            )
    return _Answered(key=key, predictions=predictions, seconds=seconds)


_Plan = Iterator[tuple[list[Group], list[list[Item]]]]
"""Batches: the groups to ask, and for each of their questions in order the items that it answers."""


def _with_image(benchmark: Benchmark, batch_size: int) -> _Plan:
    by_record = [list(items) for _, items in groupby(benchmark.items, key=lambda item: item.record)]
    for start in range(0, len(by_record), batch_size):
        batch = by_record[start : start + batch_size]
        groups = [
            Group(
                images=tuple(image.data for image in benchmark.reader.read(items[0].record).images),
                questions=tuple(item.prompt for item in items),
            )
            for items in batch
        ]
        yield groups, [[item] for items in batch for item in items]


def _without_image(benchmark: Benchmark, batch_size: int) -> _Plan:
    by_prompt: dict[str, list[Item]] = {}
    for item in benchmark.items:
        by_prompt.setdefault(item.prompt, []).append(item)
    prompts = list(by_prompt)
    size = batch_size * _QUESTIONS_PER_IMAGE
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        yield [Group(images=(), questions=tuple(batch))], [by_prompt[prompt] for prompt in batch]


def _grade(benchmark: Benchmark, image_on: dict[str, str], image_off: dict[str, str]) -> list[Outcome]:
    outcomes = []
    for item in benchmark.items:
        parsed, correct = benchmark.row.grade(image_on[item.id], item.reference)
        parsed_off, correct_off = benchmark.row.grade(image_off[item.id], item.reference)
        outcomes.append(
            Outcome(
                benchmark=benchmark.row.name,
                id=item.id,
                image_sha256=item.image_sha256s[0] if item.image_sha256s else "",
                question=item.question,
                answer_type=item.answer_type,
                reference=item.reference,
                prediction=image_on[item.id],
                parsed=parsed,
                correct=correct,
                prediction_image_off=image_off[item.id],
                parsed_image_off=parsed_off,
                correct_image_off=correct_off,
            )
        )
    return outcomes


def _score(
    benchmark: Benchmark, outcomes: Sequence[Outcome], *, prompt_digest: str, seconds: tuple[float, float]
) -> BenchmarkScore:
    row = benchmark.row
    with_image, without_image, added = _estimates(outcomes)
    by_type = {}
    for answer_type in row.answer_types:
        part = [outcome for outcome in outcomes if outcome.answer_type == answer_type]
        if not part:
            continue
        score, image_off, _ = _estimates(part)
        by_type[answer_type] = TypeScore(
            n=len(part),
            score=_rounded(score.mean),
            ci95=_interval(score),
            image_off=_rounded(image_off.mean),
            image_off_ci95=_interval(image_off),
            chance=_rounded(row.chance[answer_type]),
        )
    return BenchmarkScore(
        n=len(outcomes),
        n_total=benchmark.n_total,
        images=with_image.clusters,
        score=_rounded(with_image.mean),
        ci95=_interval(with_image),
        image_off=_rounded(without_image.mean),
        image_off_ci95=_interval(without_image),
        image_adds=_rounded(added.mean),
        image_adds_ci95=_interval(added),
        question_only_ceiling=_rounded(benchmark.question_only_ceiling),
        chance=_rounded(sum(part.n * row.chance[name] for name, part in by_type.items()) / len(outcomes)),
        parse_failures=sum(outcome.parsed is None for outcome in outcomes),
        parse_failures_image_off=sum(outcome.parsed_image_off is None for outcome in outcomes),
        by_type=by_type,
        benchmark_digest=benchmark.digest,
        prompt_digest=prompt_digest,
        seconds=round(sum(seconds), 3),
        questions_per_s=round(len(outcomes) / max(seconds[0], 1e-9), 3),
    )


def _estimates(outcomes: Sequence[Outcome]) -> tuple[Estimate, Estimate, Estimate]:
    correct = [outcome.correct for outcome in outcomes]
    correct_off = [outcome.correct_image_off for outcome in outcomes]
    clusters = [outcome.cluster for outcome in outcomes]
    return (
        clustered_mean(correct, clusters),
        clustered_mean(correct_off, clusters),
        paired_difference(correct, correct_off, clusters),
    )


def _rounded(percent: float) -> float:
    return round(percent, 4)


def _interval(estimate: Estimate) -> tuple[float, float]:
    return _rounded(estimate.low), _rounded(estimate.high)


def _prompt_digest(benchmark: Benchmark, recipe: Recipe) -> str:
    parts = {"prompt": benchmark.row.prompt, "chat": recipe.model.chat.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _half_key(benchmark: Benchmark, recipe: Recipe, half: Half, kind: str, model_digest: str, code_digest: str) -> str:
    parts = {
        "benchmark": benchmark.digest,
        "prompt": _prompt_digest(benchmark, recipe),
        "half": half,
        "kind": kind,
        "model": model_digest,
        "code": code_digest,
        "max_new_tokens": recipe.evaluation.max_new_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_answered(path: Path, key: str) -> _Answered | None:
    try:
        answered = _Answered.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except pydantic.ValidationError:
        # Files are written whole, so this one was touched by something else: the half is answered again.
        return None
    return answered if answered.key == key else None
