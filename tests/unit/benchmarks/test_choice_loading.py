"""Benchmarks with options from Parquet in the hub's schema: ids, prompts in each system's words, chance, columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyeyes.data.snapshot import open_folder
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from manyeyes.evaluation.benchmarks.build import build_benchmark
from manyeyes.evaluation.score import score_predictions
from tests import benchmark_rows as rows

LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."
DOT = rows.dot()

# Two rows of each, and the predictions that are right in every variant.
HUB: dict[str, tuple[list[dict[str, Any]], tuple[str, str]]] = {
    "ai2d": ([rows.ai2d(image=DOT), rows.ai2d(image=DOT, answer="2")], ("B", "C")),
    "scienceqa": ([rows.scienceqa(image=DOT), rows.scienceqa(image=DOT, hint="", answer=0)], ("B", "A")),
    "mme": ([rows.mme(image=DOT), rows.mme(image=DOT, answer="No")], ("yes", "no")),
    "mmbench": (
        [rows.mmbench(7, image=DOT), rows.mmbench(1_000_007, image=DOT, answer="B", A="cat", B="dog")],
        ("A", "B"),
    ),
    "seed": ([rows.seed(image=[DOT]), rows.seed(question_id="102", image=[DOT], answer="D")], ("B", "D")),
    "mathvista": (
        [
            rows.mathvista(decoded_image=DOT),
            rows.mathvista(
                pid="2",
                decoded_image=DOT,
                choices=["3 cm", "4 cm"],
                question_type="multi_choice",
                answer_type="text",
                answer="4 cm",
            ),
        ],
        ("14", "B"),
    ),
    "mmmu": (
        [
            {**rows.mmmu(), **{f"image_{n}": DOT if n < 3 else None for n in range(1, 8)}},
            {
                **rows.mmmu(id="validation_Math_2", question_type="open", options="[]", answer="Paris"),
                **{f"image_{n}": DOT if n == 1 else None for n in range(1, 8)},
            },
        ],
        ("B", "Paris"),
    ),
    "pope": ([rows.pope(image=DOT), rows.pope(image=DOT, question_id="2", answer="no")], ("yes", "no")),
    "mmvp": ([rows.mmvp(1, image=DOT), rows.mmvp(2, image=DOT, **{"Correct Answer": "(b)"})], ("A", "B")),
    "realworldqa": (
        [rows.realworldqa(image=DOT), rows.realworldqa(image=DOT, question="How many cars?", answer="2")],
        ("C", "2"),
    ),
    "cv-bench": (
        [rows.cv_bench(image=DOT), rows.cv_bench(idx=1, image=DOT, type="3D", source="Omni3D", answer="(A)")],
        ("B", "A"),
    ),
}


def load(name: str, folder: Path, *, style: str = "default") -> Benchmark:
    """Build a snapshot of the benchmark's two rows and read it."""
    source = folder / "hub.parquet"
    pq.write_table(pa.Table.from_pylist(HUB[name][0]), source)
    build_benchmark(BENCHMARKS[name], folder / "snapshot", parquet=source)
    return load_benchmark(BENCHMARKS[name], snapshot=open_folder(folder / "snapshot"), style=style)


@pytest.mark.parametrize("name", list(HUB))
def test_right_answers_to_a_snapshot_get_the_best_score_in_every_variant(name: str, tmp_path: Path) -> None:
    benchmark = load(name, tmp_path)
    assert len({item.id for item in benchmark.items}) == 2
    assert benchmark.read_images(0)[0] == DOT["bytes"]
    predictions = [
        {"id": item.id, "prediction": said} for item, said in zip(benchmark.items, HUB[name][1], strict=True)
    ]
    references = [item.row for item in benchmark.items]
    best = 200 if name == "mme" else 100
    for variant in benchmark.row.variants:
        assert score_predictions(name, references, predictions, variant=variant).score == best
        wrong = score_predictions(name, references, [], variant=variant)
        assert (wrong.score, wrong.missing) == (0, 2)


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
    row = {"id": "1", **HUB[name][0][0]}
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
    assert row.prompt({"id": "1", **HUB[name][0][0]}, style) == prompt


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
    assert BENCHMARKS[name].chance({"id": "1", **HUB[name][0][0]}) == pytest.approx(chance)


def test_mmmu_shows_the_images_that_the_question_names() -> None:
    row = {"id": "1", **HUB["mmmu"][0][0], "image_2": {"bytes": b"second", "path": ""}}
    assert BENCHMARKS["mmmu"].images(row) == [DOT["bytes"]]
    both = {**row, "question": "Compare <image 2> with <image 1>."}
    assert BENCHMARKS["mmmu"].images(both) == [DOT["bytes"], b"second"]
