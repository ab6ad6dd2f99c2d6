"""Score a model on a recipe's benchmarks, with the image and with what may take its place (``conditions``).

Each condition of each benchmark is kept as soon as it is done, so an evaluation that was stopped goes on from there.
With the image, all questions on one image are asked together: the encoders see it once and the questions share its
prefix. Without the image, equal questions are the same input to a greedy model and are asked once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answerers import Answerer
from manyeyes.evaluation.benchmarks import Benchmark, Graded, Item, load_benchmarks
from manyeyes.evaluation.conditions import CONDITIONS, Condition, count_questions, is_possible, plan_questions
from manyeyes.evaluation.grading import UNJUDGED, GradedAnswers, grade_answers
from manyeyes.evaluation.groups import average_groups
from manyeyes.evaluation.interval import added_interval, score_interval
from manyeyes.evaluation.judge import Judge
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, write_outcomes
from manyeyes.evaluation.output import write_file
from manyeyes.evaluation.report import render_html, render_markdown
from manyeyes.evaluation.scorecard import (
    BenchmarkScore,
    ConditionScore,
    Scorecard,
    ScoredModel,
    TypeScore,
    write_scorecard,
)
from manyeyes.evaluation.scoring import Estimate, clustered_mean
from manyeyes.recipe import Recipe


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is.

    Attributes:
        benchmark: Being answered.
        condition: What the model is shown.
        done: Questions answered under this condition.
        total: Questions of this condition; without the image, distinct ones.
        score: Percent right so far under this condition; 0 until a judge has judged.
        questions_per_s: Since this condition began.
        eta_s: Seconds that this condition still takes.
    """

    benchmark: str
    condition: Condition
    done: int
    total: int
    score: float
    questions_per_s: float
    eta_s: float


class _Answered(BaseModel):
    """A finished condition, as it is kept for an evaluation that goes on later."""

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
    judge: Judge | None = None,
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
        work_dir: Keeps finished conditions while the evaluation runs; ``out_dir/unfinished`` when left out.
        judge: Judges free answers; the recipe's own when left out. Without any, benchmarks that need one are skipped.

    Returns:
        What ``scorecard.json`` holds.

    Raises:
        EvaluationError: Unknown benchmark, or an answerer that returns another number of answers than questions.
        JudgeError: The judge cannot be asked; the same call later goes on from there.
        SnapshotError: A data set is missing or broken.
        StorageError: No space, or no permission.
    """
    work_dir = out_dir / "unfinished" if work_dir is None else work_dir
    if judge is None and recipe.evaluation.judge is not None:
        judge = Judge(recipe.evaluation.judge, cache=work_dir / "judge")
    benchmarks = load_benchmarks(recipe.evaluation, snapshot=snapshot)
    scores: dict[str, BenchmarkScore] = {}
    outcomes: list[Outcome] = []
    kept: list[Path] = []
    skipped: dict[str, str] = {}
    scored: list[Benchmark] = []
    for benchmark in benchmarks:
        if benchmark.row.judged and judge is None:
            skipped[benchmark.row.name] = UNJUDGED
            continue
        answers: dict[Condition, _Answered] = {}
        files: list[Path] = []
        for condition in CONDITIONS:
            asked = condition in ("image-on", "image-off") or condition in recipe.evaluation.conditions
            if not asked or not is_possible(benchmark, condition):
                continue
            key = _condition_key(benchmark, recipe, condition, answerer.name, model_digest, code_digest)
            file = work_dir / f"{benchmark.row.name}-{condition}-{key[:16]}.json"
            answered = _read_answered(file, key)
            if answered is None:
                answered = _answer(benchmark, answerer, recipe, condition, key, on_progress)
                write_file(file, answered.model_dump_json().encode())
            files.append(file)
            answers[condition] = answered
        predictions = {condition: answered.predictions for condition, answered in answers.items()}
        verdicts = grade_answers(benchmark, predictions, judge)
        if not isinstance(verdicts, GradedAnswers):
            # The answers stay where they are, so that the next call asks the judge alone.
            skipped[benchmark.row.name] = verdicts
            continue
        benchmark, graded = verdicts.benchmark, verdicts.graded
        scored.append(benchmark)
        kept += files
        outcomes.extend(_outcomes(benchmark, answers, graded))
        scores[benchmark.row.name] = _score(
            benchmark,
            graded,
            unjudged=verdicts.unjudged,
            prompt_digest=_prompt_digest(benchmark, recipe),
            max_new_tokens=_max_new_tokens(benchmark, recipe),
            seconds={condition: answered.seconds for condition, answered in answers.items()},
        )
    scorecard = Scorecard(
        model=ScoredModel(digest=model_digest, kind=answerer.name),
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        data_md5=snapshot.md5,
        code_digest=code_digest,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        benchmarks=scores,
        skipped=skipped,
        judge=None if judge is None else judge.use,
        groups=average_groups(scores, outcomes),
    )
    digests = {benchmark.row.name: benchmark.digest for benchmark in scored}
    write_outcomes(OutcomeFile(model_digest, answerer.name, digests, outcomes), out_dir / "items.parquet")
    write_file(out_dir / "report.html", render_html(scorecard, outcomes, scored).encode())
    write_file(out_dir / "report.md", render_markdown(scorecard, outcomes, scored).encode())
    write_scorecard(scorecard, out_dir / "scorecard.json")
    for file in kept:
        file.unlink(missing_ok=True)
    if work_dir == out_dir / "unfinished" and all(reason == UNJUDGED for reason in skipped.values()):
        shutil.rmtree(work_dir, ignore_errors=True)
    return scorecard


def _answer(
    benchmark: Benchmark,
    answerer: Answerer,
    recipe: Recipe,
    condition: Condition,
    key: str,
    on_progress: Callable[[EvaluationProgress], None] | None,
) -> _Answered:
    total = count_questions(benchmark, condition)
    predictions: dict[str, str] = {}
    correct = 0.0
    done = 0
    seconds = 0.0
    for groups, items_by_question in plan_questions(benchmark, condition, batch_size=recipe.evaluation.batch_size):
        started = time.perf_counter()
        answers = answerer.answer_groups(groups, max_new_tokens=_max_new_tokens(benchmark, recipe))
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
                if not benchmark.row.judged:
                    correct += benchmark.row.grade(item.row, text, benchmark.variant).score
        done += len(texts)
        if on_progress is not None:
            rate = done / max(seconds, 1e-9)
            on_progress(
                EvaluationProgress(
                    benchmark=benchmark.row.name,
                    condition=condition,
                    done=done,
                    total=total,
                    score=100 * correct / len(predictions),
                    questions_per_s=rate,
                    eta_s=(total - done) / rate,
                )
            )
    return _Answered(key=key, predictions=predictions, seconds=seconds)


def _outcomes(
    benchmark: Benchmark, answers: Mapping[Condition, _Answered], graded: Mapping[Condition, Sequence[Graded]]
) -> list[Outcome]:
    def said(condition: Condition, item: Item, place: int) -> tuple[str, float] | tuple[None, None]:
        if condition not in answers:
            return None, None
        return answers[condition].predictions[item.id], graded[condition][place].score

    outcomes = []
    for place, item in enumerate(benchmark.items):
        with_image, without = graded["image-on"][place], graded["image-off"][place]
        prediction_grey, correct_grey = said("grey", item, place)
        prediction_other, correct_other = said("other-image", item, place)
        outcomes.append(
            Outcome(
                benchmark=benchmark.row.name,
                id=item.id,
                image_sha256=item.image_sha256s[0] if item.image_sha256s else "",
                question=item.question,
                answer_type=item.answer_type,
                reference=item.reference,
                prediction=answers["image-on"].predictions[item.id],
                parsed=with_image.parsed,
                correct=with_image.score,
                prediction_image_off=answers["image-off"].predictions[item.id],
                parsed_image_off=without.parsed,
                correct_image_off=without.score,
                cluster_id=with_image.cluster,
                facets=json.dumps(dict(with_image.facets), sort_keys=True),
                prediction_grey=prediction_grey,
                correct_grey=correct_grey,
                prediction_other_image=prediction_other,
                correct_other_image=correct_other,
            )
        )
    return outcomes


def _score(
    benchmark: Benchmark,
    graded: Mapping[Condition, Sequence[Graded]],
    *,
    unjudged: int,
    prompt_digest: str,
    max_new_tokens: int,
    seconds: Mapping[Condition, float],
) -> BenchmarkScore:
    image_on, image_off = graded["image-on"], graded["image-off"]
    row, variant = benchmark.row, benchmark.variant
    by_type: dict[str, TypeScore] = {}
    # In the order of their first item.
    for answer_type in dict.fromkeys(item.answer_type for item in benchmark.items):
        places = [place for place, item in enumerate(benchmark.items) if item.answer_type == answer_type]
        score, off = (_mean([side[place] for place in places]) for side in (image_on, image_off))
        by_type[answer_type] = TypeScore(
            n=len(places),
            score=_rounded(score.mean),
            ci95=_interval(score.low, score.high),
            image_off=_rounded(off.mean),
            image_off_ci95=_interval(off.low, off.high),
            chance=_rounded(100 * sum(benchmark.items[place].chance for place in places) / len(places)),
        )
    scores, scores_off = row.aggregate(image_on, variant), row.aggregate(image_off, variant)
    added = scores["score"] - scores_off["score"]
    ceiling = benchmark.question_only_ceiling
    return BenchmarkScore(
        n=len(image_on),
        n_total=benchmark.n_total,
        unjudged=unjudged,
        judge=benchmark.judge,
        images=len({item.cluster for item in image_on}),
        variant=variant,
        unit=row.unit,
        maximum=row.maximum,
        score=_rounded(scores.pop("score")),
        ci95=_interval(*score_interval(row, image_on, variant)),
        scores={name: _rounded(value) for name, value in scores.items()},
        image_off=_rounded(scores_off.pop("score")),
        image_off_ci95=_interval(*score_interval(row, image_off, variant)),
        scores_image_off={name: _rounded(value) for name, value in scores_off.items()},
        image_adds=_rounded(added),
        image_adds_ci95=_interval(*added_interval(row, image_on, image_off, variant)),
        question_only_ceiling=None if ceiling is None else _rounded(ceiling),
        chance=_rounded(100 * sum(item.chance for item in benchmark.items) / len(benchmark.items)),
        parse_failures=sum(item.parsed is None for item in image_on),
        parse_failures_image_off=sum(item.parsed is None for item in image_off),
        conditions={
            condition: _condition_score(benchmark, image_on, shown)
            for condition, shown in graded.items()
            if condition not in ("image-on", "image-off")
        },
        by_type=by_type,
        benchmark_digest=benchmark.digest,
        max_new_tokens=max_new_tokens,
        prompt_digest=prompt_digest,
        seconds=round(sum(seconds.values()), 3),
        questions_per_s=round(len(image_on) / max(seconds["image-on"], 1e-9), 3),
    )


def _condition_score(benchmark: Benchmark, image_on: Sequence[Graded], shown: Sequence[Graded]) -> ConditionScore:
    row, variant = benchmark.row, benchmark.variant
    score = row.aggregate(shown, variant)["score"]
    return ConditionScore(
        score=_rounded(score),
        ci95=_interval(*score_interval(row, shown, variant)),
        image_adds=_rounded(row.aggregate(image_on, variant)["score"] - score),
        image_adds_ci95=_interval(*added_interval(row, image_on, shown, variant)),
        parse_failures=sum(item.parsed is None for item in shown),
    )


def _mean(graded: Sequence[Graded]) -> Estimate:
    return clustered_mean([item.score for item in graded], [item.cluster for item in graded])


def _max_new_tokens(benchmark: Benchmark, recipe: Recipe) -> int:
    return recipe.evaluation.max_new_tokens or benchmark.row.max_new_tokens


def _rounded(percent: float) -> float:
    return round(percent, 4)


def _interval(low: float, high: float) -> tuple[float, float]:
    return _rounded(low), _rounded(high)


def _prompt_digest(benchmark: Benchmark, recipe: Recipe) -> str:
    parts = {
        "scorer": benchmark.row.scorer,
        "prompts": benchmark.style,
        "chat": recipe.model.chat.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _condition_key(
    benchmark: Benchmark, recipe: Recipe, condition: Condition, kind: str, model_digest: str, code_digest: str
) -> str:
    parts = {
        "benchmark": benchmark.digest,
        "prompt": _prompt_digest(benchmark, recipe),
        "condition": condition,
        "kind": kind,
        "model": model_digest,
        "code": code_digest,
        "max_new_tokens": _max_new_tokens(benchmark, recipe),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_answered(path: Path, key: str) -> _Answered | None:
    try:
        answered = _Answered.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except pydantic.ValidationError:
        # Files are written whole, so this one was touched by something else: the condition is answered again.
        return None
    return answered if answered.key == key else None
