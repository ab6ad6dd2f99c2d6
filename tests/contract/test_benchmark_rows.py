"""Every row of ``BENCHMARKS``, swept with its fixture: it loads, asks in every style, and scores in every variant."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyeyes.data.snapshot import open_folder
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from manyeyes.evaluation.benchmarks.benchmark import STYLES, VARIANTS, Graded, is_of_type
from manyeyes.evaluation.benchmarks.build import build_benchmark
from manyeyes.evaluation.benchmarks.items import MultipleChoice
from manyeyes.evaluation.judging.scoring import find_judging
from manyeyes.evaluation.score import score_predictions
from tests.benchmark_rows import DOT, FIXTURES, Fixture

every_benchmark = pytest.mark.parametrize("name", list(BENCHMARKS))


def fixture_of(name: str) -> Fixture:
    assert name in FIXTURES, f"the benchmark {name} has no fixture: add one to FIXTURES in tests/benchmark_rows.py"
    return FIXTURES[name]


def load(name: str, folder: Path, *, style: str = "default", multiple_choice: MultipleChoice = "generate") -> Benchmark:
    """Build a snapshot of the fixture's rows, once, and read it."""
    source, snapshot = folder / "hub.parquet", folder / "snapshot"
    if not source.exists():
        pq.write_table(pa.Table.from_pylist(fixture_of(name).rows), source)
        build_benchmark(BENCHMARKS[name], snapshot, parquet=source)
    return load_benchmark(
        BENCHMARKS[name], snapshot=open_folder(snapshot), style=style, multiple_choice=multiple_choice
    )


def grade(benchmark: Benchmark, said: tuple[str, ...], variant: str) -> list[Graded]:
    """Every item with its answer, or with what the judge writes about one."""
    row = benchmark.row
    graded = []
    for item, text in zip(benchmark.items, said, strict=True):
        if row.judged:
            asked = find_judging(row.name).ask(item.row, "an answer", variant)
            assert asked is not None
            assert "an answer" in asked[-1]["content"]
            judged = find_judging(row.name).read(item.row, "an answer", text, variant)
            assert judged is not None, f"{row.name} cannot read the verdict {text!r}"
            graded.append(judged)
        else:
            graded.append(row.grade(item.row, text, variant))
    return graded


def test_a_benchmark_without_a_fixture_is_named() -> None:
    with pytest.raises(AssertionError, match="toy has no fixture"):
        fixture_of("toy")
    assert [name for name in FIXTURES if name not in BENCHMARKS] == []


@every_benchmark
def test_every_row_says_what_it_is(name: str) -> None:
    row = BENCHMARKS[name]
    assert row.name == name
    assert row.default_variant in row.variants
    assert set(row.variants) <= set(VARIANTS)
    assert row.default_reason
    assert row.licence
    assert name in row.scorer
    assert set(row.reported_by) <= {"llava", "eagle", "cambrian", "mini-gemini"}
    assert row.cambrian_group in (None, "general", "knowledge", "ocr-chart", "vision-centric")
    for kind in row.columns.values():
        is_of_type(None, kind)  # refuses a type that there is not
    for variant in set(VARIANTS) - set(row.variants):
        with pytest.raises(EvaluationError, match=f"{name} is scored as"):
            row.check_variant(variant)


@every_benchmark
def test_rows_in_the_hubs_schema_load_as_questions_with_their_images(name: str, tmp_path: Path) -> None:
    benchmark = load(name, tmp_path)
    assert len({item.id for item in benchmark.items}) == len(fixture_of(name).right) > 1
    for item in benchmark.items:
        assert DOT["bytes"] in benchmark.read_images(item.record)
        assert len(item.image_sha256s) == len(benchmark.read_images(item.record))
        assert item.cluster
        assert item.reference
        assert 0 <= item.chance < 1


@every_benchmark
def test_prompts_of_every_style_ask_the_question(name: str, tmp_path: Path) -> None:
    for style in STYLES:
        for item in load(name, tmp_path, style=style).items:
            # What follows a question is each style's own.
            asked = re.sub(r"<image \d>", "", item.question).partition("?")[0]
            words = re.findall(r"\w+", asked.lower())
            assert words
            assert set(words) <= set(re.findall(r"\w+", item.prompt.lower())), style


@every_benchmark
def test_right_answers_are_right_and_wrong_ones_wrong_in_every_variant(name: str, tmp_path: Path) -> None:
    fixture = fixture_of(name)
    benchmark = load(name, tmp_path)
    row = benchmark.row
    for variant in row.variants:
        for said, share in ((fixture.right, 1), (fixture.wrong, 0)):
            graded = grade(benchmark, said, variant)
            assert [item.id for item in graded] == [item.id for item in benchmark.items]
            # A rule that looks for the reference reads nothing in another answer.
            assert share == 0 or None not in [item.parsed for item in graded], (variant, said)
            best = row.maximum if fixture.best is None else fixture.best
            assert row.aggregate(graded, variant)["score"] == pytest.approx(share * best), (variant, said)
            if not row.judged:
                assert [item.score for item in graded] == [share] * len(graded), (variant, said)
                predictions = [
                    {"id": item.id, "prediction": text} for item, text in zip(benchmark.items, said, strict=True)
                ]
                report = score_predictions(name, [item.row for item in benchmark.items], predictions, variant=variant)
                assert report.score == pytest.approx(share * best)


@every_benchmark
def test_no_answer_at_all_scores_nothing_and_a_judged_benchmark_says_that_it_needs_a_judge(
    name: str, tmp_path: Path
) -> None:
    benchmark = load(name, tmp_path)
    references = [item.row for item in benchmark.items]
    if benchmark.row.judged:
        with pytest.raises(EvaluationError, match="judged by a language model"):
            score_predictions(name, references, [])
        return
    for variant in benchmark.row.variants:
        report = score_predictions(name, references, [], variant=variant)
        assert (report.score, report.missing) == (0, len(references))


@every_benchmark
def test_what_is_offered_to_choose_from_has_the_right_answer(name: str, tmp_path: Path) -> None:
    for item, right in zip(load(name, tmp_path, multiple_choice="prefill").items, fixture_of(name).right, strict=True):
        assert not item.options or right.rstrip(".").lower() in [option.lower() for option in item.options]
