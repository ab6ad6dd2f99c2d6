"""Benchmarks with options: prompts in each system's words, chance, columns."""

from __future__ import annotations

import pytest

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.score import score_predictions
from tests.benchmark_rows import DOT, FIXTURES

LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("ai2d", "options"),
        ("scienceqa", "choices"),
        ("mme", "category"),
        ("mmbench", "index"),
        ("seed", "data_type"),
        ("mathvista", "answer_type"),
        ("mmmu", "question_type"),
        ("pope", "category"),
        ("mmvp", "Correct Answer"),
        ("realworldqa", "answer"),
        ("cv-bench", "source"),
    ],
)
def test_a_missing_column_and_one_of_the_wrong_type_are_named(name: str, column: str) -> None:
    row = {"id": "1", **FIXTURES[name].rows[0]}
    without = {key: value for key, value in row.items() if key != column}
    with pytest.raises(EvaluationError, match=f'no column "{column}"'):
        score_predictions(name, [without], [{"id": row["id"], "prediction": "A"}])
    with pytest.raises(EvaluationError, match=f'column "{column}" holds float'):
        score_predictions(name, [{**row, column: 0.5}], [{"id": row["id"], "prediction": "A"}])


@pytest.mark.parametrize(
    ("name", "style", "prompt"),
    [
        ("ai2d", "default", f"Which eats?\nA. a fox\nB. grass\nC. a hare{LETTER}"),
        ("ai2d", "cambrian", f"Which eats?\nA. a fox\nB. grass\nC. a hare{LETTER}"),
        ("scienceqa", "llava", f"Context: Matter has states.\nWhich is solid?\nA. juice\nB. rice{LETTER}"),
        (
            "scienceqa",
            "cambrian",
            "Matter has states. Which is solid?\nA. juice\nB. rice\n"
            "Please answer directly with only the letter of the correct option and nothing else.",
        ),
        ("mme", "default", f"Are there two?{PHRASE}"),
        ("mme", "cambrian", f"Are there two? Please answer yes or no.{PHRASE}"),
        ("mmbench", "default", f"What is it? There are several options:\nA. dog\nB. cat\n{LETTER}"),
        ("mmbench", "llava", f"What is it?\nA. dog\nB. cat{LETTER}"),
        ("mmbench", "cambrian", f"What is it? Options:\nA. dog\nB. cat{LETTER}"),
        ("seed", "default", f"What is it?\nA. dog\nB. cat\nC. owl\nD. fox{LETTER}"),
        ("mathvista", "default", "Hint: ...\nQuestion: How much?"),
        ("mathvista", "cambrian", f"Hint: ...\nQuestion: How much?{PHRASE}"),
        ("mmmu", "default", f"Who made <image 1>?\nA. Goya\nB. Klee\nC. O'Keeffe\n{LETTER}"),
        ("mmmu", "cambrian", f"Who made ? Options:\nA. Goya\nB. Klee\nC. O'Keeffe{LETTER}"),
        ("pope", "default", f"Is there a dog in the image?{PHRASE}"),
        ("mmvp", "default", f"Is the dog facing left?\nA. Yes\nB. No{LETTER}"),
        (
            "cv-bench",
            "default",
            "Note: You only need to respond with A, B, C without providing any additional information.\n\n"
            "How many? Select from the following choices.\n(A) 1\n(B) 3\n(C) 2",
        ),
        # What coco_eval.py and omni_eval.py of Cambrian's repository ask.
        ("cv-bench", "cambrian", f"How many? Select from the following choices.\n(A) 1\n(B) 3\n(C) 2{LETTER}"),
        ("cv-bench", "llava", f"How many?\nA. 1\nB. 3\nC. 2{LETTER}"),
    ],
)
def test_prompts_are_the_papers_words(name: str, style: str, prompt: str) -> None:
    row = BENCHMARKS[name]
    assert row.prompt({"id": "1", **FIXTURES[name].rows[0]}, style) == prompt


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        ("ai2d", 1 / 3),
        ("mme", 0.375),  # 75 of a category's 200 points
        ("mmbench", 0.25),  # two rotations of two options
        ("mmmu", 1 / 3),
        ("mmvp", 0.25),  # both of a pair
        ("realworldqa", 1 / 3),
    ],
)
def test_chance_is_what_guessing_adds_to_the_score(name: str, chance: float) -> None:
    assert BENCHMARKS[name].chance({"id": "1", **FIXTURES[name].rows[0]}) == pytest.approx(chance)


def test_mmmu_shows_the_images_that_the_question_names() -> None:
    row = {"id": "1", **FIXTURES["mmmu"].rows[0], "image_2": {"bytes": b"second", "path": ""}}
    assert BENCHMARKS["mmmu"].images(row) == [DOT["bytes"]]
    both = {**row, "question": "Compare <image 2> with <image 1>."}
    assert BENCHMARKS["mmmu"].images(both) == [DOT["bytes"], b"second"]
