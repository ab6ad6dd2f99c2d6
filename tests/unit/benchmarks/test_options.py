"""What answers are chosen from: every row offers what its prompt asks for, and every variant reads what is offered."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyeyes.data.snapshot import open_folder
from manyeyes.evaluation.benchmarks import BENCHMARKS, load_benchmark
from manyeyes.evaluation.benchmarks.build import build_benchmark
from tests import benchmark_rows as rows
from tests.benchmark_rows import FIXTURES
from tests.evaluation_fakes import make_snapshot

YES_NO = ("Yes", "No", "yes", "no")
FIVE = {"choices": ["a dog", "a cat", "an owl", "a fox", "a hen"], "answer": 4}
NINE = [f"option {number}" for number in range(9)]

# Rows of each benchmark with options, what may be answered, and a right one of it.
OFFERED = [
    ("ai2d", rows.ai2d(), ("A", "B", "C"), "B"),
    ("scienceqa", rows.scienceqa(), ("A", "B"), "B"),
    ("scienceqa", rows.scienceqa(**FIVE), ("A", "B", "C", "D", "E"), "E"),
    ("mme", rows.mme(), YES_NO, "Yes"),
    ("mme", rows.mme(answer="No"), YES_NO, "no"),
    ("mmbench", rows.mmbench(7), ("A", "B"), "A"),
    ("seed", rows.seed(), ("A", "B", "C", "D"), "B"),
    ("mathvista", rows.mathvista(), (), ""),
    (
        "mathvista",
        rows.mathvista(choices=["3 cm", "4 cm"], question_type="multi_choice", answer_type="text", answer="4 cm"),
        ("A", "B"),
        "B",
    ),
    ("mmmu", rows.mmmu(), ("A", "B", "C"), "B"),
    ("mmmu", rows.mmmu(options=str(NINE), answer="I"), tuple("ABCDEFGHI"), "I"),
    ("mmmu", rows.mmmu(question_type="open", options="[]", answer="Paris"), (), ""),
    ("pope", rows.pope(), YES_NO, "yes"),
    ("pope", rows.pope(answer="no"), YES_NO, "No"),
    ("mmvp", rows.mmvp(1), ("A", "B"), "A"),
    ("realworldqa", rows.realworldqa(), ("A", "B", "C"), "C"),
    ("realworldqa", rows.realworldqa(question="How many cars are there?", answer="2"), (), ""),
    ("cv-bench", rows.cv_bench(), ("A", "B", "C"), "B"),
]


@pytest.mark.parametrize(("name", "row", "offered", "right"), OFFERED)
def test_a_row_offers_what_its_prompt_asks_for_and_every_variant_reads_it(
    name: str, row: dict[str, object], offered: tuple[str, ...], right: str
) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.options is not None
    options = benchmark.options(row)
    assert tuple(options) == offered
    for style in ("default", "llava"):
        prompt = benchmark.prompt({"id": "1", **row}, style)
        letters = [letter for letter in offered if letter not in YES_NO]
        # MathVista's own query lists the options, and the fixture's does not.
        assert name == "mathvista" or all(f"{each}. " in prompt or f"({each}) " in prompt for each in letters)
    for variant in benchmark.variants:
        for option in options:
            graded = benchmark.grade({"id": "1", **row}, option, variant)
            # No choice is unreadable, whoever's rule reads it.
            assert graded.parsed is not None, (variant, option)
            assert graded.score == (option.lower() == right.lower()), (variant, option)


def test_benchmarks_with_free_answers_offer_nothing() -> None:
    offering = {name for name, row in BENCHMARKS.items() if row.options is not None}
    assert offering == {name for name, *_ in OFFERED} | {"easy-vqa"}
    assert not any(BENCHMARKS[name].judged for name in offering)


def test_easy_vqa_offers_its_13_answers_to_every_question(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path, images=9)
    row = BENCHMARKS["easy-vqa"]
    benchmark = load_benchmark(row, snapshot=snapshot, multiple_choice="prefill")
    (options,) = {item.options for item in benchmark.items}
    assert len(options) == 13
    for item in benchmark.items:
        assert {option: row.grade(item.row, option, "official").score for option in options} == {
            option: float(option == item.reference) for option in options
        }


def test_options_change_the_digest_and_only_where_they_are_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "hub.parquet"
    pq.write_table(pa.Table.from_pylist(FIXTURES["mmmu"].rows), source)
    build_benchmark(BENCHMARKS["mmmu"], tmp_path / "snapshot", parquet=source)
    snapshot = open_folder(tmp_path / "snapshot")
    plain = load_benchmark(BENCHMARKS["mmmu"], snapshot=snapshot)
    written = load_benchmark(BENCHMARKS["mmmu"], snapshot=snapshot, multiple_choice="generate")
    chosen = load_benchmark(BENCHMARKS["mmmu"], snapshot=snapshot, multiple_choice="prefill")
    assert (written.multiple_choice, chosen.multiple_choice) == ("generate", "prefill")
    assert plain.digest == written.digest != chosen.digest
    assert [item.options for item in written.items] == [(), ()]
    # The second question is an open one.
    assert [item.options for item in chosen.items] == [("A", "B", "C"), ()]
