"""Chosen answers in an evaluation: where they are asked for, what is reported, and that nothing mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.conditions import plan_questions
from manyeyes.evaluation.benchmarks import Benchmark, Item
from manyeyes.evaluation.compare import compare_results, read_results
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from tests.benchmark_toys import make_row
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors

IMAGES = 9


class Chooser(RuleAnswerer):
    """Says the rule's answer where it is an option or the answer is free, else the first option."""

    def __init__(self) -> None:
        # On the first image the rule says "a horse", which is no option.
        super().__init__(rule_with_errors(IMAGES, wrong_images=[0]))
        self.asked: list[Group] = []

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        self.asked += groups
        written = super().answer_groups(groups, max_new_tokens=max_new_tokens)
        return [
            [
                answer
                if not group.options(place) or answer.text in group.options(place)
                else GeneratedAnswer(group.options(place)[0], ())
                for place, answer in enumerate(answers)
            ]
            for group, answers in zip(groups, written, strict=True)
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefill")


def run(folder: Path, mode: str) -> tuple[Scorecard, Chooser]:
    snapshot = make_snapshot(folder / f"snapshot-{mode}", images=IMAGES)
    recipe = make_recipe(evaluation__multiple_choice=mode)
    answerer = Chooser()
    card = evaluate(answerer, recipe, snapshot=snapshot, out_dir=folder / mode, code_digest="c", model_digest="m")
    return card, answerer


def test_answers_are_written_unless_the_recipe_says_otherwise(folder: Path) -> None:
    card, answerer = run(folder, "generate")
    assert make_recipe().evaluation.multiple_choice == "generate"
    assert not any(group.choices for group in answerer.asked)
    score = card.benchmarks["easy-vqa"]
    assert (score.multiple_choice, score.chosen, score.parse_failures) == ("generate", 0, 4)
    assert "chosen from options" not in (folder / "generate" / "report.md").read_text(encoding="utf-8")


def test_a_choice_is_reported_leaves_nothing_unread_and_is_not_compared_with_written_answers(folder: Path) -> None:
    card, answerer = run(folder, "prefill")
    assert all(len(options) == 13 for group in answerer.asked for options in group.choices)
    assert sum(len(group.choices) for group in answerer.asked) == sum(len(group.questions) for group in answerer.asked)
    score = card.benchmarks["easy-vqa"]
    assert (score.n, score.multiple_choice, score.chosen, score.parse_failures) == (36, "prefill", 36, 0)
    for page in ("report.md", "report.html"):
        assert "36 answers were chosen from options after one prefill" in (folder / "prefill" / page).read_text(
            encoding="utf-8"
        )
    if not (folder / "generate").is_dir():
        run(folder, "generate")
    written, chosen = (read_results(folder / mode) for mode in ("generate", "prefill"))
    theirs = read_scorecard(folder / "generate" / "scorecard.json").benchmarks["easy-vqa"]
    assert score.prompt_digest != theirs.prompt_digest
    assert score.benchmark_digest != theirs.benchmark_digest
    with pytest.raises(EvaluationError, match="easy-vqa: answers are written and chosen after one prefill"):
        compare_results(written, chosen)
    assert compare_results(chosen, chosen).benchmarks["easy-vqa"].difference == 0


def test_equal_prompts_with_other_options_are_two_questions() -> None:
    # Without images they would be the same input if they were written.
    first = Item("1", 0, "1", (), "a?", "a?", "A", "all", 0.5, {}, options=("A", "B"))
    others = [("2", ("A", "B")), ("3", ("A", "B", "C")), ("4", ())]
    items = (first, *(replace(first, id=name, options=options) for name, options in others))
    benchmark = Benchmark(make_row(), "official", "default", items, 4, no_images)
    plan = plan_questions(benchmark, "image-off")
    assert [[item.id for item in question.items] for question in plan.questions] == [["1", "2"], ["3"], ["4"]]
    groups = [group for groups, _ in plan.batches(batch_size=4) for group in groups]
    assert [group.choices for group in groups] == [(("A", "B"), ("A", "B", "C"), ())]


def no_images(record: int) -> tuple[bytes, ...]:
    raise AssertionError(f"record {record} has no images")
