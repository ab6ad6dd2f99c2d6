"""Made-up evaluations, for tests of reports and for looking at them: figures are drawn, not measured."""

from __future__ import annotations

import random
from collections.abc import Sequence

from manyeyes.evaluation.benchmarks import BENCHMARKS, Benchmark, Item
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.scorecard import (
    BenchmarkScore,
    ConditionScore,
    GroupAverage,
    Interval,
    Scorecard,
    ScoredModel,
    TypeScore,
)
from manyeyes.runtime.bundle_contents import ModelFacts
from tests.evaluation_fakes import make_image

IMAGES = 9
QUESTIONS = 3
FACTS = ModelFacts(
    parameters=8_750_011_264,
    parts={"encoders.clip": 303_179_776, "encoders.convnext": 843_403_264, "language_model": 6_738_415_616},
    encoders=["clip", "convnext"],
    visual_tokens=1_023,
    flops_per_sample=28_349_950_111_744,
    text_tokens=128,
)


def make_benchmark(name: str, *, style: str = "llava") -> Benchmark:
    """A row of BENCHMARKS with a few questions on coloured squares."""
    row = BENCHMARKS[name]
    items = tuple(
        Item(
            id=f"{name}/{number}#{place}",
            record=number,
            cluster="",
            image_sha256s=(make_image(number).sha256,),
            question=f"Question {place} on picture {number}, of which there is a little more to say?",
            prompt=f"Question {place} on picture {number}?\nAnswer with a word.",
            reference=f"answer {place}",
            answer_type="all",
            chance=0.25,
            row={},
        )
        for number in range(IMAGES)
        for place in range(QUESTIONS)
    )
    return Benchmark(
        row=row,
        variant=row.default_variant,
        style=style,
        items=items,
        n_total=len(items),
        read_images=lambda record: (make_image(record).data,),
    )


def make_outcomes(benchmark: Benchmark, rng: random.Random, *, unread: bool = True) -> list[Outcome]:
    """An answer to each question: some wrong, some half right, and one that nothing can be read from."""
    outcomes = []
    for place, item in enumerate(benchmark.items):
        correct = rng.choice([0.0, 0.6, 1.0, 1.0]) if item.record < IMAGES - 3 else 1.0
        nothing = unread and place == 0
        outcomes.append(
            Outcome(
                benchmark=benchmark.row.name,
                id=item.id,
                image_sha256=item.image_sha256s[0],
                question=item.question,
                answer_type="all",
                reference=item.reference,
                prediction="<b>I cannot say</b> | what it is"
                if nothing
                else item.reference
                if correct == 1
                else "a horse",
                parsed=None if nothing else "a horse",
                correct=0.0 if nothing else correct,
                prediction_image_off="a guess",
                parsed_image_off="a guess",
                correct_image_off=0.0,
                prediction_grey="a grey guess",
                correct_grey=0.3,
                prediction_other_image="",
                correct_other_image=0.0,
            )
        )
    return outcomes


def make_score(benchmark: Benchmark, rng: random.Random) -> BenchmarkScore:
    """Figures that are all different, within what the benchmark admits."""
    row = benchmark.row
    scale = row.maximum / 100

    def around(middle: float) -> tuple[float, Interval]:
        score = rng.uniform(middle - 8, middle + 8)
        ends = (score - rng.uniform(1, 3), score + rng.uniform(1, 3))
        return round(score * scale, 4), (round(ends[0] * scale, 4), round(ends[1] * scale, 4))

    score, ci95 = around(65)
    off, off_ci95 = around(30)
    grey, grey_ci95 = around(28)
    other, other_ci95 = around(25)
    part, part_ci95 = (
        (round(value, 4) for value in (rng.uniform(50, 60), 0)),
        (
            round(rng.uniform(40, 49), 4),
            round(rng.uniform(61, 70), 4),
        ),
    )
    n = rng.randrange(1_000, 99_999)

    def condition(value: float, ends: Interval) -> ConditionScore:
        return ConditionScore(
            score=value,
            ci95=ends,
            image_adds=round(score - value, 4),
            image_adds_ci95=(round(score - ends[1], 4), round(score - ends[0], 4)),
            parse_failures=rng.randrange(1, 999),
        )

    return BenchmarkScore(
        n=n,
        n_total=n,
        images=rng.randrange(100, n),
        variant=benchmark.variant,
        unit=row.unit,
        maximum=row.maximum,
        score=score,
        ci95=ci95,
        scores={name: round(rng.uniform(1, 99), 4) for name in ("a part", "another part")},
        scores_image_off={"a part": round(rng.uniform(1, 99), 4)},
        image_off=off,
        image_off_ci95=off_ci95,
        image_adds=round(score - off, 4),
        image_adds_ci95=(round(score - off_ci95[1], 4), round(score - off_ci95[0], 4)),
        question_only_ceiling=round(rng.uniform(30, 40), 4) if row.single_answer else None,
        chance=round(rng.uniform(10, 25), 4),
        parse_failures=rng.randrange(21, 999),
        parse_failures_image_off=rng.randrange(1, 999),
        conditions={"grey": condition(grey, grey_ci95), "other-image": condition(other, other_ci95)},
        by_type={
            "all": TypeScore(
                n=n,
                score=next(part),
                ci95=part_ci95,
                image_off=round(rng.uniform(20, 30), 4),
                image_off_ci95=(round(rng.uniform(15, 19), 4), round(rng.uniform(31, 35), 4)),
                chance=round(rng.uniform(10, 25), 4),
            )
        },
        benchmark_digest=f"{rng.getrandbits(256):064x}",
        max_new_tokens=rng.randrange(16, 512),
        prompt_digest=f"{rng.getrandbits(256):064x}",
        seconds=round(rng.uniform(10, 9_999), 3),
        questions_per_s=round(rng.uniform(1, 999), 3),
    )


def make_evaluation(
    names: Sequence[str], *, seed: int = 0, digest: str = "m" * 64, kind: str = "torch", **changes: object
) -> tuple[Scorecard, list[Outcome], list[Benchmark]]:
    """A scorecard, its answers and its benchmarks."""
    rng = random.Random(seed)
    benchmarks = [make_benchmark(name) for name in names]
    outcomes = [outcome for benchmark in benchmarks for outcome in make_outcomes(benchmark, rng)]
    groups = {}
    if {"mme", "mmbench", "seed", "gqa"} <= set(names):
        parts = {name: round(rng.uniform(60, 80), 4) for name in ("mme", "mmbench", "seed", "gqa")}
        mean = round(sum(parts.values()) / 4, 4)
        groups["general"] = GroupAverage(score=mean, ci95=(mean - 1.2345, mean + 1.3579), parts=parts, missing=[])
    card = Scorecard(
        model=ScoredModel(digest=digest, kind=kind, facts=FACTS),
        recipe="made-up",
        recipe_digest="r" * 64,
        data_md5="d" * 32,
        code_digest="c" * 64,
        max_new_tokens=None,
        benchmarks={benchmark.row.name: make_score(benchmark, rng) for benchmark in benchmarks},
        groups=groups,
        **changes,
    )
    return card, outcomes, benchmarks
