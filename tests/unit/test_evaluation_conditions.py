from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.conditions import (
    CONDITIONS,
    GREY,
    Condition,
    Question,
    grey_image,
    is_possible,
    other_images,
    plan_questions,
)
from manyeyes.evaluation.benchmarks import Benchmark, Item
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.evaluation.report.tables import by_image, looking_sentence, looking_table
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.runtime.bundle import Group
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


def _asked(groups: Sequence[Group], questions: Sequence[Question]) -> list[tuple[Group, Question]]:
    """Each question with the group that it is asked in."""
    homes = [(group, prompt) for group in groups for prompt in group.questions]
    assert [prompt for _, prompt in homes] == [question.prompt for question in questions]
    return [(group, question) for (group, _), question in zip(homes, questions, strict=True)]


IMAGES = [_png(16, 16, shade) for shade in range(5)] + [_png(24, 8, shade) for shade in range(2)]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_item_is_asked_once_with_its_own_prompt(condition: Condition, batch_size: int) -> None:
    benchmark = _benchmark([[image] for image in IMAGES], questions=11)
    asked: list[str] = []
    plan = plan_questions(benchmark, condition)
    batches = list(plan.batches(batch_size=batch_size))
    for groups, questions in batches:
        assert len(groups) <= batch_size
        for group, question in _asked(groups, questions):
            assert tuple(hashlib.sha256(image).hexdigest() for image in group.images) == question.images
            asked += [item.id for item in question.items]
    assert sorted(asked) == sorted(item.id for item in benchmark.items)
    assert sorted(asked) == sorted(item.id for question in plan.questions for item in question.items)
    assert len({(question.images, question.prompt) for question in plan.questions}) == len(plan.questions)


def test_questions_that_are_left_out_are_not_asked_and_their_images_not_read() -> None:
    benchmark = _benchmark([[image] for image in IMAGES])
    read: list[int] = []

    def read_images(record: int) -> tuple[bytes, ...]:
        read.append(record)
        return benchmark.read_images(record)

    plan = plan_questions(replace(benchmark, read_images=read_images), "image-on")
    first, last = plan.questions[0].images, plan.questions[-1]
    ((groups, questions),) = plan.batches(batch_size=100, leave_out=lambda q: q.images == first or q == last)
    assert {*plan.questions} - {*questions} == {plan.questions[0], plan.questions[1], last}
    assert sum(len(group.questions) for group in groups) == len(questions) == 2 * len(IMAGES) - 3
    assert read == list(range(1, len(IMAGES)))
    assert list(plan.batches(batch_size=100, leave_out=lambda _: True)) == []


def test_equal_questions_on_an_image_are_one_question_unless_their_options_differ() -> None:
    benchmark = _benchmark([[IMAGES[0]], [IMAGES[0]]], questions=1)
    (question,) = plan_questions(benchmark, "image-on").questions
    assert [item.id for item in question.items] == ["0#0", "1#0"]
    chosen = replace(benchmark, items=(benchmark.items[0], replace(benchmark.items[1], options=("yes", "no"))))
    plan = plan_questions(chosen, "image-on")
    assert [question.options for question in plan.questions] == [(), ("yes", "no")]
    ((groups, _),) = plan.batches(batch_size=1)
    assert [group.choices for group in groups] == [((), ("yes", "no"))]


def test_other_images_come_in_the_reverse_order_of_the_own_ones() -> None:
    # A cache that holds a part of the images then has those that are shown first.
    benchmark = _benchmark([[image] for image in IMAGES], questions=1)
    own = [question.images for question in plan_questions(benchmark, "image-on").questions]
    assert [question.images for question in plan_questions(benchmark, "other-image").questions] == own[::-1]


def test_grey_is_asked_once_for_each_size_and_question() -> None:
    benchmark = _benchmark([[image] for image in IMAGES])
    plan = plan_questions(benchmark, "grey")
    assert len(plan.questions) == 2 * 2
    ((groups, questions),) = plan.batches(batch_size=10)
    sizes = set()
    for group in groups:
        picture = Image.open(io.BytesIO(group.images[0]))
        assert picture.getcolors() == [(picture.width * picture.height, GREY)]
        sizes.add(picture.size)
    assert sizes == {(16, 16), (24, 8)}
    assert [len(question.items) for question in questions] == [5, 5, 2, 2]


def test_a_grey_image_has_the_size_of_the_item_s_own() -> None:
    assert Image.open(io.BytesIO(grey_image(_png(31, 7, 200)))).size == (31, 7)


def test_another_image_is_never_the_own_and_all_are_shown() -> None:
    benchmark = _benchmark([[image] for image in [*IMAGES, IMAGES[0]]])  # two records show the same image
    others = other_images(benchmark)
    assert all(mine != theirs for mine, theirs in others.items())
    assert set(others) == set(others.values()) == {item.image_sha256s for item in benchmark.items}
    assert others == other_images(benchmark)
    shown = {
        item.image_sha256s[0]: hashlib.sha256(group.images[0]).hexdigest()
        for groups, questions in plan_questions(benchmark, "other-image").batches(batch_size=100)
        for group, question in _asked(groups, questions)
        for item in question.items
    }
    assert len(shown) == len(IMAGES)
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
        for groups, questions in plan_questions(benchmark, condition).batches(batch_size=100):
            for group, question in _asked(groups, questions):
                with_images = condition != "image-off" and all(item.record for item in question.items)
                assert bool(group.images) == with_images


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
    # 18 images with their questions; four questions without, four on grey. Every image has the same four questions, so
    # what is asked of another item's image was asked of it before.
    assert (answerer.images, answerer.questions) == (18 + 1, 72 + 4 + 4)
    score = card.benchmarks["easy-vqa"]
    assert score.from_cache == 72
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
    assert "Does it look?" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{other.score:.2f}" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


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
    assert "reaches 0): vqav2." in looking_sentence(both)
    assert "not asked" in looking_table(both, titles=True).markdown()
    assert "On every benchmark" in looking_sentence(card)
