from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError, RecordError
from manyeyes.evaluation.benchmarks import BENCHMARKS, Graded, Row, find_benchmark, load_benchmark
from manyeyes.evaluation.evaluate import EvaluationProgress, evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.runtime.bundle import GeneratedAnswer
from tests.evaluation_fakes import RuleAnswerer, make_image, make_recipe, make_snapshot, rule_with_errors

IMAGES = 18
EASY_VQA = BENCHMARKS["easy-vqa"]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def run(answerer: RuleAnswerer, snapshot: Snapshot, out: Path, **options: object):
    recipe = options.pop("recipe", make_recipe())
    return evaluate(answerer, recipe, snapshot=snapshot, out_dir=out, code_digest="c", model_digest="m", **options)


def test_figures_equal_the_hand_computed_ones(snapshot: Snapshot, tmp_path: Path) -> None:
    # Of 18 images (4 questions each) two get nonsense. Without the image "no" is right for "is there a red shape?" on
    # the 12 images that are not red and for "is there not a circle?" on the 6 circles: 18 of 72.
    answerer = RuleAnswerer(rule_with_errors(IMAGES, wrong_images=[3, 8]))
    score = run(answerer, snapshot, tmp_path).benchmarks["easy-vqa"]
    assert (score.n, score.n_total, score.images) == (72, 72, 18)
    assert score.score == pytest.approx(100 * 64 / 72, abs=1e-3)
    assert score.image_off == pytest.approx(25)
    assert score.image_adds == pytest.approx(100 * 64 / 72 - 25, abs=1e-3)
    assert (score.parse_failures, score.parse_failures_image_off) == (8, 0)
    assert {name: part.n for name, part in score.by_type.items()} == {"yes/no": 36, "colour": 18, "shape": 18}
    assert score.by_type["colour"].image_off == 0
    assert score.by_type["shape"].score == pytest.approx(100 * 16 / 18, abs=1e-3)
    # Per question text the commonest answer: a third of colours, a third of shapes, two thirds of each yes/no.
    assert score.question_only_ceiling == pytest.approx(50)
    assert score.chance == pytest.approx((50 * 36 + 12.5 * 18 + 100 / 3 * 18) / 72, abs=1e-3)


def test_an_image_is_shown_once_and_equal_questions_without_one_are_asked_once(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    answerer = RuleAnswerer(rule_with_errors(IMAGES))
    run(answerer, snapshot, tmp_path)
    assert answerer.images == IMAGES
    assert answerer.questions == 72 + 4


def test_an_answer_is_graded_once(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded: list[str] = []

    def grade(row: Row, prediction: str, variant: str) -> Graded:
        graded.append(row["id"])
        return EASY_VQA.grade(row, prediction, variant)

    monkeypatch.setitem(BENCHMARKS, "easy-vqa", replace(EASY_VQA, grade=grade))
    shown: list[float] = []
    answerer = RuleAnswerer(rule_with_errors(IMAGES, [3]))
    card = run(answerer, snapshot, tmp_path, on_progress=lambda progress: shown.append(progress.score))
    # 72 items with the image and 72 without, of which progress was shown all along.
    assert sorted(graded) == sorted(2 * [outcome.id for outcome in read_outcomes(tmp_path / "items.parquet").outcomes])
    assert shown[-1] == pytest.approx(card.benchmarks["easy-vqa"].image_off)


def test_files_say_what_the_scorecard_says(snapshot: Snapshot, tmp_path: Path) -> None:
    scorecard = run(RuleAnswerer(rule_with_errors(IMAGES, [3])), snapshot, tmp_path)
    assert read_scorecard(tmp_path / "scorecard.json") == scorecard
    contents = read_outcomes(tmp_path / "items.parquet")
    assert len(contents.of("easy-vqa")) == 72
    assert 100 * sum(item.correct for item in contents.outcomes) / 72 == pytest.approx(
        scorecard.benchmarks["easy-vqa"].score, abs=1e-3
    )
    assert contents.benchmark_digests == {"easy-vqa": scorecard.benchmarks["easy-vqa"].benchmark_digest}
    table = pq.read_table(tmp_path / "items.parquet")
    nonsense = [row for row in table.to_pylist() if row["prediction"] == "a horse"]
    assert {row["image_sha256"] for row in nonsense} == {make_image(3).sha256}
    assert all(row["parsed"] is None and row["correct"] == 0 for row in nonsense)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "items.parquet",
        "report.html",
        "report.json",
        "report.md",
        "scorecard.json",
    ]


def test_the_report_is_one_file_that_shows_the_worst_image(snapshot: Snapshot, tmp_path: Path) -> None:
    run(RuleAnswerer(rule_with_errors(IMAGES, [3])), snapshot, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Nothing is fetched: every reference is data inside the file, and there is no script.
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    assert "<script" not in html
    assert "url(" not in html
    assert html.index('alt="easy-vqa/test/3"') < html.index("Best images")
    assert "94.44%" in html
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| colour | 18 | 94.44 |" in markdown


def test_answers_cannot_inject_html(snapshot: Snapshot, tmp_path: Path) -> None:
    run(RuleAnswerer(lambda *_: "<script>alert(1)</script>|x"), snapshot, tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\\|x" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_stopped_evaluation_goes_on_with_the_next_half(snapshot: Snapshot, tmp_path: Path) -> None:
    rule = rule_with_errors(IMAGES, [3])

    class KilledError(Exception):
        pass

    def stops(image: bytes | None, question: str) -> str:
        if image is None:
            raise KilledError
        return rule(image, question)

    with pytest.raises(KilledError):
        run(RuleAnswerer(stops), snapshot, tmp_path / "a", work_dir=tmp_path / "work")
    assert not (tmp_path / "a" / "scorecard.json").exists()
    second = RuleAnswerer(rule)
    resumed = run(second, snapshot, tmp_path / "a", work_dir=tmp_path / "work")
    assert (second.images, second.questions) == (0, 4)
    whole = run(RuleAnswerer(rule), snapshot, tmp_path / "b")
    assert (resumed.benchmarks["easy-vqa"].from_cache, whole.benchmarks["easy-vqa"].from_cache) == (72, 0)
    timeless = {"seconds": 0, "questions_per_s": None, "from_cache": 0}
    assert resumed.benchmarks["easy-vqa"].model_copy(update=timeless) == whole.benchmarks["easy-vqa"].model_copy(
        update=timeless
    )
    assert (tmp_path / "a" / "items.parquet").read_bytes() == (tmp_path / "b" / "items.parquet").read_bytes()


def test_a_half_of_another_model_is_not_used(snapshot: Snapshot, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def stops(image: bytes | None, question: str) -> str:
        if image is None:
            raise KilledError
        return "yes"

    with pytest.raises(KilledError):
        run(RuleAnswerer(stops), snapshot, tmp_path / "a", work_dir=tmp_path / "work")
    other = RuleAnswerer(rule_with_errors(IMAGES))
    card = evaluate(
        other,
        make_recipe(),
        snapshot=snapshot,
        out_dir=tmp_path / "b",
        work_dir=tmp_path / "work",
        code_digest="c",
        model_digest="another",
    )
    assert other.images == IMAGES
    assert card.benchmarks["easy-vqa"].score == 100


def test_a_cut_benchmark_says_so_and_has_another_digest(snapshot: Snapshot, tmp_path: Path) -> None:
    whole = run(RuleAnswerer(rule_with_errors(IMAGES)), snapshot, tmp_path / "whole")
    cut = run(
        RuleAnswerer(rule_with_errors(IMAGES)),
        snapshot,
        tmp_path / "cut",
        recipe=make_recipe(evaluation__max_items=10),
    )
    score = cut.benchmarks["easy-vqa"]
    assert (score.n, score.n_total, score.images) == (10, 72, 3)
    assert score.benchmark_digest != whole.benchmarks["easy-vqa"].benchmark_digest
    assert "only the first 10 of 72 questions" in (tmp_path / "cut" / "report.md").read_text(encoding="utf-8")


def test_the_digest_names_the_questions_and_nothing_else(snapshot: Snapshot, tmp_path: Path) -> None:
    digest = load_benchmark(EASY_VQA, snapshot=snapshot).digest
    again = load_benchmark(EASY_VQA, snapshot=make_snapshot(tmp_path / "same", images=IMAGES)).digest
    fewer = load_benchmark(EASY_VQA, snapshot=make_snapshot(tmp_path / "fewer", images=IMAGES - 1)).digest
    assert digest == again
    assert digest != fewer


def test_progress_ends_at_the_total_with_the_score(snapshot: Snapshot, tmp_path: Path) -> None:
    seen: list[EvaluationProgress] = []
    run(
        RuleAnswerer(rule_with_errors(IMAGES, [3])),
        snapshot,
        tmp_path,
        on_progress=seen.append,
        recipe=make_recipe(evaluation__batch_size=4),
    )
    on = [progress for progress in seen if progress.condition == "image-on"]
    assert [progress.done for progress in on] == [16, 32, 48, 64, 72]
    assert on[-1].score == pytest.approx(100 * 68 / 72)
    assert seen[-1].condition == "image-off"
    assert seen[-1].done == seen[-1].total == 4


def test_too_few_answers_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    class Forgetful(RuleAnswerer):
        def answer_groups(self, groups, **_):
            return [[GeneratedAnswer("yes", ())] for _ in groups]

    with pytest.raises(EvaluationError, match="18 answers to 72 questions"):
        run(Forgetful(lambda *_: "yes"), snapshot, tmp_path)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("yes", "yes"),
        (" Yes. ", "yes"),
        ("RED", "red"),
        ("triangle\n", "triangle"),
        ("yes yes", None),
        ("a triangle", None),
        ("", None),
        (".", None),
    ],
)
def test_easy_vqa_reads_the_thirteen_answers_and_no_other(text: str, parsed: str | None) -> None:
    graded = EASY_VQA.grade({"id": "easy-vqa/test/0#0", "question": "is it?", "answer": "yes"}, text, "official")
    assert (graded.parsed, graded.score) == (parsed, float(parsed == "yes"))


def test_an_unknown_benchmark_offers_the_nearest() -> None:
    with pytest.raises(EvaluationError, match='Did you mean "easy-vqa"'):
        find_benchmark("easyvqa")


def test_a_wrong_scorecard_says_which_field(tmp_path: Path, snapshot: Snapshot) -> None:
    run(RuleAnswerer(rule_with_errors(IMAGES)), snapshot, tmp_path)
    content = json.loads((tmp_path / "scorecard.json").read_text(encoding="utf-8"))
    content["benchmarks"]["easy-vqa"]["score"] = 140
    (tmp_path / "scorecard.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"benchmarks\.easy-vqa: .*score 140.0 is above the maximum"):
        read_scorecard(tmp_path / "scorecard.json")


def test_items_that_are_not_items_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="not Parquet"):
        read_outcomes(tmp_path / "items.parquet")
    with pytest.raises(EvaluationError, match="no file"):
        read_outcomes(tmp_path / "other.parquet")


def test_a_record_that_cannot_be_used_is_looked_for_among_the_items_of_its_batch(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    def rule(_image: bytes | None, _question: str) -> str:
        raise RecordError("image cannot be decoded", "a whole image", "Replace the file.")

    with pytest.raises(RecordError, match=r"^easy-vqa-test, among the items .*test/.* more: image cannot be decoded"):
        evaluate(
            RuleAnswerer(rule),
            make_recipe(),
            snapshot=snapshot,
            out_dir=tmp_path,
            code_digest="c",
            model_digest="m",
        )
