"""Score a model on a recipe's benchmarks, with the image and with what may take its place (``conditions``).

Each answer is kept as soon as it is there (``answer_cache``), so an evaluation that was stopped goes on from there, and
inputs that are equal in several benchmarks or conditions are asked once. All questions on one image are asked together:
the encoders see it once and the questions share its prefix.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.answering.answer_cache import AnswerKeys, open_answers
from manyeyes.evaluation.answering.answerers import Answerer
from manyeyes.evaluation.answering.asking import Answered, EvaluationProgress, ask_benchmark
from manyeyes.evaluation.answering.conditions import CONDITIONS, Condition, is_possible
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.evaluation.benchmarks import Benchmark, Graded, Item, load_benchmarks
from manyeyes.evaluation.judging.judge import Judge
from manyeyes.evaluation.judging.scoring import JUDGINGS, enough_judged, judge_items, name_judge
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, average_groups, write_outcomes
from manyeyes.evaluation.report.writing import NO_CHAMPION, Champion, build_report, write_report
from manyeyes.evaluation.scorecard import (
    BenchmarkScore,
    ConditionScore,
    ImageCacheUse,
    Scorecard,
    ScoredModel,
    TypeScore,
    write_scorecard,
)
from manyeyes.evaluation.statistics.intervals import Estimate, clustered_mean, sub_score_intervals
from manyeyes.evaluation.statistics.significance import added_interval, score_interval
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle_contents import ModelFacts

__all__ = ["UNFINISHED", "EvaluationProgress", "evaluate"]

UNJUDGED = "it needs a judge: give evaluation.judge in the recipe"


@dataclass(frozen=True)
class GradedAnswers:
    """A benchmark's graded items.

    Attributes:
        benchmark: With the judge's name, and without the items that lack a verdict.
        graded: By condition, in the order of ``benchmark.items``.
        unjudged: Items that lack a verdict under some condition, and are left out.
    """

    benchmark: Benchmark
    graded: Mapping[Condition, list[Graded]]
    unjudged: int


def grade_answers(
    benchmark: Benchmark, answers: Mapping[Condition, Answered], judge: Judge | None
) -> GradedAnswers | str:
    """Grade the answers under every condition.

    Args:
        benchmark: Its items.
        answers: By condition; where rules can score them they are graded already.
        judge: Used where the benchmark's answers are judged; ``None`` for a benchmark that rules can score.

    Returns:
        The graded items, or why there is no score: too few verdicts.

    Raises:
        JudgeError: The judge cannot be asked at all.
    """
    row, variant = benchmark.row, benchmark.variant
    if judge is None or row.name not in JUDGINGS:
        by_rules = {
            condition: [answered.graded[item.id] for item in benchmark.items] for condition, answered in answers.items()
        }
        return GradedAnswers(benchmark, by_rules, unjudged=0)
    verdicts = {
        condition: judge_items(
            row, [(item.row, answered.predictions[item.id]) for item in benchmark.items], judge, variant=variant
        )
        for condition, answered in answers.items()
    }
    named = name_judge(judge, JUDGINGS[row.name])
    reasons = [
        next((part[place].reason for part in verdicts.values() if part[place].value is None), "")
        for place in range(len(benchmark.items))
    ]
    places = [place for place, reason in enumerate(reasons) if not reason]
    unjudged = len(reasons) - len(places)
    if not places or not enough_judged(unjudged, len(reasons), judge):
        first = next(place for place, reason in enumerate(reasons) if reason)
        return (
            f"the judge gave no verdict on {unjudged:,} of {len(reasons):,} items, for instance on "
            f'"{benchmark.items[first].id}": {reasons[first]}'
        )
    graded: dict[Condition, list[Graded]] = {
        condition: [value for place in places if (value := part[place].value) is not None]
        for condition, part in verdicts.items()
    }
    items = tuple(benchmark.items[place] for place in places)
    return GradedAnswers(replace(benchmark, items=items, judge=named), graded, unjudged=unjudged)


UNFINISHED = "scorecard-unfinished.json"
"""What is scored so far, for a reader; it goes when the evaluation is done."""


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
    facts: ModelFacts | None = None,
    benchmarks: Sequence[Benchmark] | None = None,
    champion: Champion = NO_CHAMPION,
) -> Scorecard:
    """Ask every question of the recipe's benchmarks, score the answers and write the results.

    Writes ``scorecard.json``, ``items.parquet``, and ``report`` as ``html``, ``md`` and ``json``.

    Args:
        answerer: The model.
        recipe: Says which benchmarks, how many items and how long answers may be.
        snapshot: Has the benchmarks' data sets.
        out_dir: Folder for the results.
        code_digest: Of the code that evaluates.
        model_digest: Of the checkpoint or the bundle behind ``answerer``.
        on_progress: Called after each batch.
        work_dir: Keeps answers, for this evaluation and others (``work_dir/answers``); when left out,
            ``out_dir/unfinished`` keeps them until this one is done.
        judge: Judges free answers; the recipe's own when left out. Without any, benchmarks that need one are skipped.
        facts: Size and cost of the model, for the report.
        benchmarks: The recipe's, where they are loaded already.
        champion: What the report compares with.

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
    if benchmarks is None:
        benchmarks = load_benchmarks(recipe.evaluation, snapshot=snapshot)
    keys = AnswerKeys(
        kind=answerer.name,
        model_digest=model_digest,
        code_digest=code_digest,
        data_md5=snapshot.md5,
        chat=recipe.model.chat.model_dump(mode="json"),
    )
    scores: dict[str, BenchmarkScore] = {}
    outcomes: list[Outcome] = []
    skipped: dict[str, str] = {}
    scored: list[Benchmark] = []

    def scorecard(to_come: Sequence[Benchmark] = ()) -> Scorecard:
        return Scorecard(
            model=ScoredModel(digest=model_digest, kind=answerer.name, facts=facts),
            recipe=recipe.name,
            recipe_digest=recipe.digest,
            data_md5=snapshot.md5,
            code_digest=code_digest,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            benchmarks=scores,
            skipped=skipped,
            judge=None if judge is None else judge.use,
            groups={} if to_come else average_groups(scores, outcomes),
            unfinished=[benchmark.row.name for benchmark in to_come],
        )

    with open_answers(work_dir / "answers", model_digest=model_digest, kind=answerer.name) as known:
        for place, benchmark in enumerate(benchmarks):
            to_come = benchmarks[place + 1 :]
            if benchmark.row.judged and judge is None:
                skipped[benchmark.row.name] = UNJUDGED
                continue
            # Other tasks ask the same model at the same time.
            known.refresh()
            images = answerer.image_counts
            answers = {
                condition: ask_benchmark(
                    benchmark,
                    condition,
                    answerer,
                    known=known,
                    keys=keys,
                    batch_size=recipe.evaluation.batch_size,
                    max_new_tokens=_max_new_tokens(benchmark, recipe),
                    on_progress=on_progress,
                )
                for condition in CONDITIONS
                if condition in ("image-on", "image-off", *recipe.evaluation.conditions)
                and is_possible(benchmark, condition)
            }
            predictions = {condition: answered.predictions for condition, answered in answers.items()}
            verdicts = grade_answers(benchmark, answers, judge)
            if not isinstance(verdicts, GradedAnswers):
                # The answers stay where they are, so that the next call asks the judge alone.
                skipped[benchmark.row.name] = verdicts
                continue
            benchmark, graded = verdicts.benchmark, verdicts.graded
            scored.append(benchmark)
            outcomes.extend(_outcomes(benchmark, predictions, graded))
            scores[benchmark.row.name] = _score(
                benchmark,
                graded,
                unjudged=verdicts.unjudged,
                prompt_digest=_prompt_digest(benchmark, recipe),
                max_new_tokens=_max_new_tokens(benchmark, recipe),
                answers=answers,
                images=answerer.image_counts - images,
            )
            if to_come:
                write_scorecard(scorecard(to_come), out_dir / UNFINISHED)
    card = scorecard()
    digests = {benchmark.row.name: benchmark.digest for benchmark in scored}
    write_outcomes(OutcomeFile(model_digest, answerer.name, digests, outcomes), out_dir / "items.parquet")
    write_report(out_dir, build_report(card, outcomes, scored, recipe=recipe, champion=champion), scored)
    write_scorecard(card, out_dir / "scorecard.json")
    (out_dir / UNFINISHED).unlink(missing_ok=True)
    if work_dir == out_dir / "unfinished" and all(reason == UNJUDGED for reason in skipped.values()):
        shutil.rmtree(work_dir, ignore_errors=True)
    return card


def _outcomes(
    benchmark: Benchmark,
    predictions: Mapping[Condition, Mapping[str, str]],
    graded: Mapping[Condition, Sequence[Graded]],
) -> list[Outcome]:
    def said(condition: Condition, item: Item, place: int) -> tuple[str, float] | tuple[None, None]:
        if condition not in predictions:
            return None, None
        return predictions[condition][item.id], graded[condition][place].score

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
                prediction=predictions["image-on"][item.id],
                parsed=with_image.parsed,
                correct=with_image.score,
                prediction_image_off=predictions["image-off"][item.id],
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
    answers: Mapping[Condition, Answered],
    images: ImageCounts,
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
        scores_ci95={name: _interval(*ends) for name, ends in sub_score_intervals(row, image_on, variant).items()},
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
        multiple_choice=benchmark.multiple_choice,
        chosen=sum(bool(item.options) for item in benchmark.items),
        max_new_tokens=max_new_tokens,
        prompt_digest=prompt_digest,
        from_cache=sum(answered.from_cache for answered in answers.values()),
        image_cache=None if images == ImageCounts() else ImageCacheUse(**asdict(images)),
        seconds=round(sum(answered.seconds for answered in answers.values()), 3),
        questions_per_s=_speed(answers["image-on"]),
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
    if benchmark.multiple_choice != "generate":
        parts["multiple_choice"] = benchmark.multiple_choice
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _speed(answered: Answered) -> float | None:
    return round(answered.asked / max(answered.seconds, 1e-9), 3) if answered.asked else None
