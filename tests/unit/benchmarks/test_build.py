"""Benchmarks from Parquet in the hub's schema: built into a snapshot, read again, and answered."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from manyeyes.cli.main import cli
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.errors import EvaluationError, PipelineError, SourceError
from manyeyes.evaluation.benchmarks import BENCHMARKS, load_benchmark
from manyeyes.evaluation.benchmarks.build import build_benchmark
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from tests.evaluation_fakes import RuleAnswerer, make_recipe


def png(shade: int) -> dict[str, Any]:
    """An image as the hub has it."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{shade}.png"}


def vqa_rows() -> list[dict[str, Any]]:
    """Three images; the questions on one are not beside each other."""
    return [
        {
            "question_type": "what is",
            "multiple_choice_answer": "red",
            "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": place} for place in range(1, 11)],
            "image_id": number % 3,
            "answer_type": "other" if number < 4 else "yes/no",
            "question_id": 1000 + number,
            "question": f"What is {number}?",
            "image": png(number % 3),
        }
        for number in range(6)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    source = write(tmp_path / "hub" / "validation-00000-of-00001.parquet", vqa_rows())
    build_benchmark(BENCHMARKS["vqav2"], tmp_path / "snapshot", parquet=source)
    return open_folder(tmp_path / "snapshot")


def test_a_built_benchmark_is_a_data_set_of_the_snapshot(snapshot: Snapshot) -> None:
    entry = snapshot.dataset("vqav2-validation")
    assert (entry.rows, entry.images, entry.layout) == (6, 6, "hub")
    assert entry.licence.startswith("CC BY 4.0")
    benchmark = load_benchmark(BENCHMARKS["vqav2"], snapshot=snapshot)
    assert [item.id for item in benchmark.items] == [str(1000 + number) for number in range(6)]
    assert benchmark.items[0].prompt == "What is 0?\nAnswer the question using a single word or phrase."
    assert benchmark.read_images(4) == (png(1)["bytes"],)
    assert benchmark.items[1].image_sha256s == benchmark.items[4].image_sha256s
    assert "image" not in benchmark.items[0].row


def test_a_cut_benchmark_knows_how_many_questions_there_are(snapshot: Snapshot) -> None:
    benchmark = load_benchmark(BENCHMARKS["vqav2"], snapshot=snapshot, max_items=2)
    assert (len(benchmark.items), benchmark.n_total) == (2, 6)


def test_datasets_reads_what_was_built(snapshot: Snapshot) -> None:
    import datasets

    rows = datasets.Dataset.from_parquet(str(snapshot.shards("vqav2-validation")[0]))
    assert rows[2]["question"] == "What is 2?"
    assert rows.column_names == list(vqa_rows()[0])


def test_a_model_is_scored_on_it_and_each_image_is_shown_once(snapshot: Snapshot, tmp_path: Path) -> None:
    # Right with the image but for question 5; without it half of the ten agree with nothing.
    def rule(image: bytes | None, question: str) -> str:
        return "nothing" if image is None or "5" in question else "red"

    answerer = RuleAnswerer(rule)
    recipe = make_recipe(
        evaluation__benchmarks=["vqav2"], evaluation__max_new_tokens=None, gate=[{"rule": "validation"}]
    )
    card = evaluate(answerer, recipe, snapshot=snapshot, out_dir=tmp_path / "out", code_digest="c", model_digest="m")
    score = card.benchmarks["vqav2"]
    assert answerer.images == 3
    assert score.score == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert score.scores == {"other": 100, "yes/no": 50}
    for name, (low, high) in score.scores_ci95.items():
        assert 0 <= low <= score.scores[name] <= high <= 100
    assert score.scores_ci95.keys() == score.scores.keys()
    assert (score.n, score.images, score.image_off) == (6, 3, 0)
    assert (score.variant, score.unit, score.max_new_tokens, score.question_only_ceiling) == (
        "official",
        "percent",
        16,
        None,
    )
    assert card.max_new_tokens is None
    assert len(read_outcomes(tmp_path / "out" / "items.parquet").of("vqav2")) == 6
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "83.33% right" in report
    assert "question alone" not in report


def test_variant_and_style_of_the_recipe_change_what_is_asked(snapshot: Snapshot) -> None:
    row = BENCHMARKS["vqav2"]
    digests = {load_benchmark(row, snapshot=snapshot, variant=variant).digest for variant in ("official", "lmms")}
    assert len(digests) == 2
    assert load_benchmark(row, snapshot=snapshot).digest in digests


def test_points_are_drawn_and_averaged_as_shares_of_the_maximum(tmp_path: Path) -> None:
    kinds = ["Regular Text Recognition", "Doc-oriented VQA"]
    rows = [
        {
            "dataset": "IIIT5K",
            "question": f"what is written {number}?",
            "question_type": kinds[number % 2],
            "answer": ["red"],
            "image": png(number),
        }
        for number in range(4)
    ]
    build_benchmark(BENCHMARKS["ocrbench"], tmp_path / "s", parquet=write(tmp_path / "ocr.parquet", rows))
    recipe = make_recipe(evaluation__benchmarks=["ocrbench"], gate=[{"rule": "validation"}])
    card = evaluate(
        RuleAnswerer(lambda image, question: "it says RED" if image and "3" not in question else "no"),
        recipe,
        snapshot=open_folder(tmp_path / "s"),
        out_dir=tmp_path / "out",
        code_digest="c",
        model_digest="m",
    )
    score = card.benchmarks["ocrbench"]
    assert (score.score, score.unit, score.maximum, score.image_adds) == (750, "points", 1000, 750)
    assert score.scores == {"Regular Text Recognition": 500, "Text Recognition": 500, "Doc-oriented VQA": 250}
    assert [outcome.id for outcome in read_outcomes(tmp_path / "out" / "items.parquet").outcomes] == list("0123")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "of 1000 points" in html
    assert 'style="left:750' not in html


def test_gqa_joins_its_images(tmp_path: Path) -> None:
    questions = [
        {"id": f"2{number}", "imageId": f"n{number % 2}", "question": "is it red?", "answer": "yes"}
        for number in range(4)
    ]
    images = [{"id": f"n{number}", "image": png(number)} for number in range(3)]
    source = write(tmp_path / "instructions" / "a.parquet", questions)
    with pytest.raises(EvaluationError, match="--images-from"):
        build_benchmark(BENCHMARKS["gqa"], tmp_path / "s", parquet=source)
    apart = write(tmp_path / "images" / "a.parquet", images)
    command = ["data", "build", "gqa", str(tmp_path / "s"), "--from", str(source.parent), "--images-from", str(apart)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    benchmark = load_benchmark(BENCHMARKS["gqa"], snapshot=open_folder(tmp_path / "s"))
    assert benchmark.read_images(3) == (png(1)["bytes"],)
    assert benchmark.question_only_ceiling == 100
    with pytest.raises(EvaluationError, match='names the image "n0"'):
        build_benchmark(
            BENCHMARKS["gqa"],
            tmp_path / "s",
            parquet=source,
            images=write(tmp_path / "few.parquet", images[1:]),
        )


def test_a_missing_column_is_named_when_building(tmp_path: Path) -> None:
    rows = [{("answer" if name == "answers" else name): value for name, value in row.items()} for row in vqa_rows()]
    with pytest.raises(EvaluationError, match=r'no column "answers".*Did you mean "answer"'):
        build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s", parquet=write(tmp_path / "a.parquet", rows))
    assert not (tmp_path / "s" / "vqav2").exists()


def test_a_column_of_another_type_is_named_when_reading(tmp_path: Path) -> None:
    rows = [{**row, "question": 7} for row in vqa_rows()]
    build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s", parquet=write(tmp_path / "a.parquet", rows))
    with pytest.raises(EvaluationError, match='vqav2 row 0: column "question" holds int'):
        load_benchmark(BENCHMARKS["vqav2"], snapshot=open_folder(tmp_path / "s"))


def test_two_items_of_one_id_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "question_id": 1} for row in vqa_rows()]
    with pytest.raises(EvaluationError, match='vqav2 row 1 has the id of row 0, "1"'):
        build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s", parquet=write(tmp_path / "a.parquet", rows))
    write(tmp_path / "s" / "vqav2" / "validation-00000.parquet", rows)
    write_snapshot_manifest(tmp_path / "s", provenance={"vqav2-validation": Provenance("MIT", "a test", layout="hub")})
    with pytest.raises(EvaluationError, match=r'two items "1" \(rows 0 and 1\)'):
        load_benchmark(BENCHMARKS["vqav2"], snapshot=open_folder(tmp_path / "s"))


def test_an_empty_or_broken_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no Parquet files"):
        build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s", parquet=tmp_path / "empty")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="cannot be read"):
        build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s", parquet=tmp_path / "bad.parquet")


def test_an_unknown_source_offers_the_nearest(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "build", "vqa2", str(tmp_path)])
    assert isinstance(result.exception, PipelineError)
    assert 'Did you mean "vqav2"' in str(result.exception)


def test_the_hub_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(hub_id: str, config: str, *, split: str) -> datasets.Dataset:
        asked.append((hub_id, config, split))
        features = datasets.Features.from_arrow_schema(pa.Table.from_pylist(vqa_rows()).schema)
        return datasets.Dataset.from_list(vqa_rows(), features=features).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s")
    assert asked == [("lmms-lab/VQAv2", "default", "validation")]
    benchmark = load_benchmark(BENCHMARKS["vqav2"], snapshot=open_folder(tmp_path / "s"))
    assert len(benchmark.items) == 6
    assert benchmark.read_images(2) == (png(2)["bytes"],)


def test_a_hub_that_cannot_be_read_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SourceError, match=r"no network.*--from"):
        build_benchmark(BENCHMARKS["vqav2"], tmp_path / "s")
