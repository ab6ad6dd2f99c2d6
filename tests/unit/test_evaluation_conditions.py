from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import Benchmark, Item
from manyeyes.evaluation.conditions import (
    CONDITIONS,
    GREY,
    Condition,
    count_questions,
    grey_image,
    is_possible,
    other_images,
    plan_questions,
)
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.looking import by_image, looking_html, looking_markdown
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.evaluation.scorecard import read_scorecard
from tests.benchmark_toys import make_row
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors


def _png(width: int, height: int, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), shade).save(buffer, format="PNG")
    return buffer.getvalue()


def _benchmark(records: Sequence[Sequence[bytes]], *, questions: int = 2) -> Benchmark:
    """A record of these images each, with the same questions on all."""
    items = [
        Item(
            id=f"{record}#{number}",
            record=record,
            cluster=str(record),
            image_sha256s=tuple(hashlib.sha256(data).hexdigest() for data in images),
            question=f"question {number}",
            prompt=f"question {number}",
            reference="yes",
            answer_type="all",
            chance=0.5,
            row={"id": f"{record}#{number}"},
        )
        for record, images in enumerate(records)
        for number in range(questions)
    ]
    return Benchmark(
        row=make_row(),
        variant="official",
        style="default",
        items=tuple(items),
        n_total=len(items),
        read_images=lambda record: tuple(records[record]),
    )


IMAGES = [_png(16, 16, shade) for shade in range(5)] + [_png(24, 8, shade) for shade in range(2)]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_item_is_asked_once_with_its_own_prompt(condition: Condition, batch_size: int) -> None:
    benchmark = _benchmark([[image] for image in IMAGES], questions=11)
    asked: list[str] = []
    questions = 0
    for groups, items_by_question in plan_questions(benchmark, condition, batch_size=batch_size):
        assert len(groups) <= batch_size
        prompts = [question for group in groups for question in group.questions]
        questions += len(prompts)
        for prompt, items in zip(prompts, items_by_question, strict=True):
            assert {item.prompt for item in items} == {prompt}
            asked += [item.id for item in items]
    assert sorted(asked) == sorted(item.id for item in benchmark.items)
    assert questions == count_questions(benchmark, condition)


def test_grey_is_asked_once_for_each_size_and_question() -> None:
    benchmark = _benchmark([[image] for image in IMAGES])
    assert count_questions(benchmark, "grey") == 2 * 2
    ((groups, items),) = plan_questions(benchmark, "grey", batch_size=10)
    sizes = set()
    for group in groups:
        picture = Image.open(io.BytesIO(group.images[0]))
        assert picture.getcolors() == [(picture.width * picture.height, GREY)]
        sizes.add(picture.size)
    assert sizes == {(16, 16), (24, 8)}
    assert [len(answered) for answered in items] == [5, 5, 2, 2]


def test_a_grey_image_has_the_size_of_the_item_s_own() -> None:
    assert Image.open(io.BytesIO(grey_image(_png(31, 7, 200)))).size == (31, 7)


def test_another_image_is_never_the_own_and_all_are_shown() -> None:
    benchmark = _benchmark([[image] for image in [*IMAGES, IMAGES[0]]])  # two records show the same image
    others = other_images(benchmark)
    assert all(mine != theirs for mine, theirs in others.items())
    assert set(others) == set(others.values()) == {item.image_sha256s for item in benchmark.items}
    assert others == other_images(benchmark)
    shown = {
        answered[0].image_sha256s[0]: hashlib.sha256(group.images[0]).hexdigest()
        for groups, items in plan_questions(benchmark, "other-image", batch_size=100)
        for group, answered in zip(groups, items[::2], strict=False)
        if len(group.questions) == 2
    }
    assert all(mine != theirs for mine, theirs in shown.items())


def test_another_image_s_images_are_as_many_where_they_can_be() -> None:
    records = [[IMAGES[0]], [IMAGES[1], IMAGES[2]], [IMAGES[3]], [IMAGES[4], IMAGES[5]], []]
    others = other_images(_benchmark(records))
    assert len(others) == 4
    assert all(len(mine) == len(theirs) for mine, theirs in others.items())
    odd = other_images(_benchmark([[IMAGES[0]], [IMAGES[1]], [IMAGES[2], IMAGES[3]]]))
    assert sorted(len(theirs) for mine, theirs in odd.items() if len(mine) == 2) == [1]


def test_items_without_images_stay_without() -> None:
    benchmark = _benchmark([[], [IMAGES[0]], [IMAGES[1]]])
    for condition in CONDITIONS:
        for groups, items in plan_questions(benchmark, condition, batch_size=100):
            answered = iter(items)
            for group in groups:
                for _ in group.questions:
                    mine = next(answered)
                    assert bool(group.images) == (condition != "image-off" and all(item.record for item in mine))


def test_one_image_has_no_other() -> None:
    benchmark = _benchmark([[IMAGES[0]], [IMAGES[0]]])
    assert not is_possible(benchmark, "other-image")
    with pytest.raises(EvaluationError, match="every item of toy shows the same image"):
        other_images(benchmark)
    assert [condition for condition in CONDITIONS if is_possible(_benchmark([[]]), condition)] == [
        "image-on",
        "image-off",
    ]


def test_an_evaluation_scores_every_condition_and_the_report_sorts_by_what_the_image_adds(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "data", images=18)
    answerer = RuleAnswerer(rule_with_errors(18))
    card = evaluate(
        answerer,
        make_recipe(evaluation__conditions=["grey", "other-image"]),
        snapshot=snapshot,
        out_dir=tmp_path / "out",
        code_digest="c",
        model_digest="m",
    )
    # 18 images with their questions, the other images with theirs; four questions without, four on grey.
    assert (answerer.images, answerer.questions) == (18 + 18 + 1, 2 * 72 + 4 + 4)
    score = card.benchmarks["easy-vqa"]
    assert set(score.conditions) == {"grey", "other-image"}
    grey, other = score.conditions["grey"], score.conditions["other-image"]
    assert grey.score == score.image_off  # "no" to everything
    assert grey.image_adds == pytest.approx(score.image_adds)
    assert score.score > other.score > 0
    assert other.image_adds_ci95[0] < other.image_adds < other.image_adds_ci95[1]
    outcomes = read_outcomes(tmp_path / "out" / "items.parquet").of("easy-vqa")
    right = sum(outcome.correct_other_image or 0 for outcome in outcomes)
    assert 100 * right / 72 == pytest.approx(other.score, abs=1e-3)
    assert {outcome.prediction_grey for outcome in outcomes} == {"no"}
    assert read_scorecard(tmp_path / "out" / "scorecard.json") == card
    assert "Does it look?" in (tmp_path / "out" / "report.html").read_text()
    assert f"{other.score:.2f}" in (tmp_path / "out" / "report.md").read_text()


def test_benchmarks_stand_in_the_order_of_what_the_image_adds(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "data", images=6)
    card = evaluate(
        RuleAnswerer(rule_with_errors(6)),
        make_recipe(),
        snapshot=snapshot,
        out_dir=tmp_path / "out",
        code_digest="c",
        model_digest="m",
    )
    score = card.benchmarks["easy-vqa"]
    little = score.model_copy(update={"image_adds": 1.0, "image_adds_ci95": (-1.0, 3.0)})
    points = score.model_copy(update={"image_adds": 400.0, "maximum": 2000.0, "image_adds_ci95": (300.0, 500.0)})
    both = card.model_copy(update={"benchmarks": {"vqav2": little, "mme": points, "easy-vqa": score}})
    assert list(by_image(both)) == ["easy-vqa", "mme", "vqav2"]
    assert "reaches 0): vqav2." in looking_markdown(both)
    assert "not asked" in looking_html(both)
    assert "On every benchmark" in looking_markdown(card)
