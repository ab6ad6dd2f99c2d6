"""Evaluating a model on benchmarks that need a judge, with one, with a bad one and without; Cambrian's groups."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.benchmarks.build import build_benchmark
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.judging.judge import JudgeError
from manyeyes.evaluation.outcomes import GROUPS, Outcome, average_groups
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard, TypeScore, read_scorecard
from manyeyes.steps.merge_scorecards import merge
from tests.evaluation_fakes import RuleAnswerer, make_recipe
from tests.judge_server import Say, Trouble, in_turn, judge_server

ITEMS = 4


def mm_vet_row(number: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, format="PNG")
    return {
        "question_id": f"v1_{number}",
        "image": {"bytes": buffer.getvalue(), "path": f"{number}.png"},
        "question": f"Question {number}?",
        "answer": "red",
        "image_source": "web",
        "capability": "rec" if number % 2 else "ocr,math",
    }


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MANYEYES_JUDGE_KEY", raising=False)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    source = tmp_path / "hub" / "test.parquet"
    source.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([mm_vet_row(number) for number in range(ITEMS)]), source)
    build_benchmark(BENCHMARKS["mm-vet"], tmp_path / "mm-vet", parquet=source)
    return open_folder(tmp_path / "mm-vet")


class Counting(RuleAnswerer):
    """Says "red" with an image, and nothing of use without."""

    def __init__(self) -> None:
        super().__init__(lambda image, question: "blue" if image is None else f"red {question}")


def run(answerer: RuleAnswerer, snapshot: Snapshot, out: Path, **judge: Any) -> Scorecard:
    values: dict[str, Any] = {"evaluation__benchmarks": ["mm-vet"], "gate": [{"rule": "validation"}]}
    if judge:
        values["evaluation__judge"] = {"model": "judge", "attempts": 1, "concurrency": 1, **judge}
    return evaluate(answerer, make_recipe(**values), snapshot=snapshot, out_dir=out, code_digest="c", model_digest="m")


def verdicts(server_says: dict[str, str | Trouble]) -> Say:
    """By what the last row of MM-Vet's table holds."""

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        row = body["messages"][0]["content"].rsplit("\n", 1)[-1]
        return next(verdict for part, verdict in server_says.items() if part in row)

    return say


def test_without_a_judge_the_benchmark_is_skipped_by_name_and_nothing_is_asked(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    answerer = Counting()
    card = run(answerer, snapshot, tmp_path / "out")
    assert answerer.questions == 0
    assert card.benchmarks == {}
    assert list(card.skipped) == ["mm-vet"]
    assert "evaluation.judge" in card.skipped["mm-vet"]
    assert card.metrics() == {}
    assert read_scorecard(tmp_path / "out" / "scorecard.json") == card
    for name in ("report.md", "report.html"):
        report = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "mm-vet is not scored: it needs a judge" in report
        assert "the right image adds" not in report


def test_judge_scores_every_condition_and_is_part_of_the_digest(snapshot: Snapshot, tmp_path: Path) -> None:
    says = {"blue": "0.0", "red Question 1": "0.5", "red": "1.0"}
    with judge_server(verdicts(says)) as server:
        card = run(Counting(), snapshot, tmp_path / "out", endpoint=server.endpoint)
        other = run(Counting(), snapshot, tmp_path / "other", endpoint=server.endpoint, model="another")
    score = card.benchmarks["mm-vet"]
    assert (score.score, score.image_off, score.n, score.unjudged) == (87.5, 0, ITEMS, 0)
    assert score.scores == {"rec": 75, "ocr": 100, "math": 100, "ocr+math": 100, "rec only": 75}
    assert score.judge == "judge, mm-vet 1, temperature 0.0"
    assert other.benchmarks["mm-vet"].benchmark_digest != score.benchmark_digest
    assert card.judge is not None
    assert (card.judge.requests, card.judge.prompt_tokens, card.judge.cost) == (8, 800, None)
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "mm-vet: judge" in report
    assert "judge (judge-2024-01-01): 8 requests" in report


def test_too_few_verdicts_skip_the_benchmark_and_the_next_run_asks_only_the_judge(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    with judge_server(verdicts({"red Question 1": "nonsense", "red": "1.0", "blue": "0.0"})) as server:
        card = run(Counting(), snapshot, tmp_path / "out", endpoint=server.endpoint)
        assert card.benchmarks == {}
        assert card.skipped["mm-vet"].startswith(
            'the judge gave no verdict on 1 of 4 items, for instance on "v1_1": 3 answers made no sense'
        )
        lenient = run(Counting(), snapshot, tmp_path / "lenient", endpoint=server.endpoint, max_unjudged=0.25)
        score = lenient.benchmarks["mm-vet"]
        assert (score.score, score.n, score.n_total, score.unjudged) == (100, 3, 4, 1)
        assert "the judge gave no verdict on 1" in (tmp_path / "lenient" / "report.md").read_text(encoding="utf-8")
        asked = len(server.bodies)
        answerer = Counting()
        run(answerer, snapshot, tmp_path / "out", endpoint=server.endpoint)
        # Nonsense alone is asked again, three times; the model is not.
        assert (answerer.questions, len(server.bodies) - asked) == (0, 3)


def test_judge_that_is_away_ends_the_evaluation_which_then_goes_on(snapshot: Snapshot, tmp_path: Path) -> None:
    away = True

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        return Trouble(status=503) if away else "1.0"

    with judge_server(say) as server:
        with pytest.raises(JudgeError, match="in a row"):
            run(Counting(), snapshot, tmp_path / "out", endpoint=server.endpoint)
        away = False
        answerer = Counting()
        card = run(answerer, snapshot, tmp_path / "out", endpoint=server.endpoint)
    assert answerer.questions == 0
    assert card.benchmarks["mm-vet"].score == 100
    assert not (tmp_path / "out" / "unfinished").exists()


def test_scorecards_of_scored_and_skipped_benchmarks_merge(snapshot: Snapshot, tmp_path: Path) -> None:
    skipped = run(Counting(), snapshot, tmp_path / "skipped")
    with judge_server(in_turn("1.0")) as server:
        scored = run(Counting(), snapshot, tmp_path / "scored", endpoint=server.endpoint)
    scored = scored.model_copy(update={"benchmarks": {"other": scored.benchmarks["mm-vet"]}})
    card = merge([skipped, scored], names=["other", "mm-vet"], recipe="both", recipe_digest="d")
    assert (list(card.benchmarks), list(card.skipped)) == (["other"], ["mm-vet"])
    assert scored.judge is not None
    assert card.judge == scored.judge
    twice = merge(
        [scored, skipped.model_copy(update={"judge": scored.judge})],
        names=["other", "mm-vet"],
        recipe="b",
        recipe_digest="d",
    )
    assert twice.judge is not None
    assert (twice.judge.requests, twice.judge.served) == (2 * scored.judge.requests, scored.judge.served)
    with pytest.raises(EvaluationError, match="one of each of mm-vet"):
        merge([scored], names=["mm-vet"], recipe="both", recipe_digest="d")


def test_scorecard_of_nothing_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    card = run(Counting(), snapshot, tmp_path / "out")
    with pytest.raises(ValueError, match="no benchmark is scored"):
        Scorecard.model_validate(card.model_dump() | {"skipped": {}})


# --- groups --------------------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_rows() -> None:
    named = {row.name: row.cambrian_group for row in BENCHMARKS.values() if row.cambrian_group}
    assert named == {name: group for group, names in GROUPS.items() for name in names}


def scored(name: str, score: float) -> BenchmarkScore:
    row = BENCHMARKS[name]
    ends = (score, score)
    return BenchmarkScore(
        n=1, n_total=1, images=1, variant=row.default_variant, unit=row.unit, maximum=row.maximum, score=score,
        ci95=ends, image_off=0, image_off_ci95=(0, 0), image_adds=score, image_adds_ci95=ends,
        question_only_ceiling=None, chance=0, parse_failures=0, parse_failures_image_off=0,
        by_type={"all": TypeScore(n=1, score=0, ci95=(0, 0), image_off=0, image_off_ci95=(0, 0), chance=0)},
        benchmark_digest="b", prompt_digest="p", seconds=1, questions_per_s=1,
    )  # fmt: skip


def answered(name: str, number: int, facets: dict[str, str]) -> Outcome:
    right = float(number % 4 > 0)
    return Outcome(
        name, f"{number}", "", "", "all", "", "", "x", right, "", "x", right, f"{number}", json.dumps(facets)
    )


FACETS = {
    "mmvp": lambda number: {"unit": f"{number // 2}", "pair": f"{number // 2}"},
    "cv-bench": lambda number: {"type": ("2D", "3D")[number % 2], "source": "COCO", "task": "count"},
}


def test_group_averages_divide_mme_by_20_and_ocrbench_by_10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyeyes.evaluation.outcomes.average_interval", lambda parts: (float(len(parts)), 99.0))
    # Cambrian-1-8B as its paper prints it (arXiv:2406.16860); scores and averages are rounded to one place.
    scores = {
        **{"mme": 1547.1, "mmbench": 75.9, "seed": 74.7, "gqa": 64.6},
        **{"scienceqa": 80.4, "mmmu": 42.7, "mathvista": 49.0, "ai2d": 73.0},
        **{"chartqa": 73.3, "ocrbench": 624, "textvqa": 71.7, "docvqa": 77.8},
        **{"mmvp": 51.3, "realworldqa": 64.2, "cv-bench": (72.3 + 72.0) / 2},
    }
    published = {"general": 73.1, "knowledge": 61.3, "ocr-chart": 71.3, "vision-centric": 65.0}
    averages = average_groups({name: scored(name, score) for name, score in scores.items()}, [])
    assert {name: group.score for name, group in averages.items()} == pytest.approx(published, abs=0.06)
    assert averages["vision-centric"].parts["cv-bench"] == 72.15
    # Four parts an average, CV-Bench twice.
    assert {group.ci95 for group in averages.values()} == {(4.0, 99.0)}


def test_group_without_a_benchmark_has_no_average_and_names_it() -> None:
    averages = average_groups({name: scored(name, 60.0) for name in ("mme", "gqa", "chartqa", "easy-vqa")}, [])
    assert list(averages) == ["general"]
    group = averages["general"]
    assert (group.score, group.ci95, group.missing) == (None, None, ["mmbench", "seed"])
    assert group.parts == {"mme": 3.0, "gqa": 60.0}


def test_group_interval_holds_the_average_and_shrinks_with_items() -> None:
    def interval(items: int) -> tuple[float, float]:
        names = dict.fromkeys(GROUPS["vision-centric"])
        outcomes = [
            answered(name, number, FACETS[name](number) if name in FACETS else {})
            for name in names
            for number in range(items)
        ]
        by_name = {
            name: scored(
                name,
                BENCHMARKS[name].aggregate([o.graded for o in outcomes if o.benchmark == name], "official")["score"],
            )
            for name in names
        }
        group = average_groups(by_name, outcomes)["vision-centric"]
        assert group.score is not None
        assert group.ci95 is not None
        assert group.ci95[0] < group.score < group.ci95[1]
        return group.ci95

    small, large = interval(40), interval(240)
    assert (large[1] - large[0]) < 0.55 * (small[1] - small[0])
