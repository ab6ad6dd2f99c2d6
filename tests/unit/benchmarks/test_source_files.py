"""Which files of a folder are a benchmark's: one split, one configuration, all of it, and no hidden answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.data.builders.manifest import write_snapshot_manifest
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import EvaluationError, SourceError
from manyeyes.evaluation.benchmarks import BENCHMARKS, load_benchmark
from manyeyes.evaluation.benchmarks.benchmark import ANSWERS, RECORDS, TEXTS, BenchmarkRow
from manyeyes.evaluation.benchmarks.build import SourceFiles, build_benchmark, find_files, split_of
from manyeyes.evaluation.score import score_predictions
from tests import benchmark_rows as rows

IMAGES = {f"image_{number}": None for number in range(2, 8)}


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def mmmu_rows(subject: str, split: str, count: int) -> list[dict[str, Any]]:
    """Questions of a subject; the answers of test are hidden."""
    answer = "?" if split == "test" else "B"
    return [
        rows.mmmu(id=f"{split}_{subject}_{number}", answer=answer, image_1=rows.dot(), **IMAGES)
        for number in range(1, count + 1)
    ]


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """Two of MMMU's subjects as its authors' repository has them."""
    for subject in ("Art", "Music"):
        for split, count in (("dev", 2), ("validation", 3), ("test", 5)):
            file = tmp_path / "mmmu" / subject / f"{split}-00000-of-00001.parquet"
            write(file, mmmu_rows(subject, split, count))
    return tmp_path / "mmmu"


def test_the_scored_split_of_every_subject_is_taken_and_named(subjects: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "build", "mmmu", str(tmp_path / "s"), "--from", str(subjects)])
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "mmmu: split validation: 2 of 6 Parquet files "
        "(Art/validation-00000-of-00001.parquet, Music/validation-00000-of-00001.parquet)\n"
    )
    snapshot = open_folder(tmp_path / "s")
    assert list(snapshot.manifest.datasets) == ["mmmu-validation"]
    assert snapshot.dataset("mmmu-validation").source == "Parquet of lmms-lab/MMMU, validation"
    assert {item.id.split("_")[0] for item in load_benchmark(BENCHMARKS["mmmu"], snapshot=snapshot).items} == {
        "validation"
    }
    assert snapshot.dataset("mmmu-validation").rows == 6


def test_another_split_is_built_under_its_own_name_even_with_hidden_answers(subjects: Path, tmp_path: Path) -> None:
    command = ["data", "build", "mmmu", str(tmp_path / "s"), "--from", str(subjects), "--split", "test"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert open_folder(tmp_path / "s").dataset("mmmu-test").rows == 10


def test_a_folder_without_the_scored_split_says_which_it_has(subjects: Path, tmp_path: Path) -> None:
    for file in subjects.rglob("validation-*"):
        file.unlink()
    with pytest.raises(SourceError, match=r"has the splits dev, test; files of validation.*--split dev"):
        build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=subjects)
    test = subjects / "Art" / "test-00000-of-00001.parquet"
    with pytest.raises(SourceError, match="is of the split test; files of validation"):
        build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=test)
    assert not (tmp_path / "s" / "mmmu").exists()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("data/val-00000-of-00002-0123456789abcdef.parquet", "validation"),
        ("Art/dev-00000-of-00001.parquet", "dev"),
        ("Full/adversarial-00000-of-00001.parquet", "adversarial"),
        ("default/test/0000.parquet", "test"),
        ("default/partial-train/0000.parquet", "train"),
        ("testdev_balanced_instructions/0003.parquet", "testdev"),
        ("mmmu_val.parquet", "validation"),
        ("MMBench_DEV_EN.parquet", "dev"),
        ("test-dev/a.parquet", "testdev"),
        ("test/train.parquet", "train"),
        ("dev_and_val.parquet", None),
        ("latest.parquet", None),
        ("part-0.parquet", None),
    ],
)
def test_a_file_says_its_split_in_its_name_or_else_in_its_folder(name: str, split: str | None, tmp_path: Path) -> None:
    assert split_of(tmp_path / "source" / name, tmp_path / "source") == split


def test_the_source_folder_itself_may_be_named_like_the_split(tmp_path: Path) -> None:
    assert split_of(tmp_path / "val" / "0000.parquet", tmp_path / "val") == "validation"
    assert split_of(tmp_path / "validated" / "0000.parquet", tmp_path / "validated") is None


def find(name: str, folder: Path, files: list[str], *, split: str = "") -> SourceFiles:
    """What is taken of empty files; they are not opened."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    row = BENCHMARKS[name]
    return find_files(row, folder, split=split or row.split, config=row.config)


def test_files_that_do_not_say_their_split_are_refused_unless_there_is_but_one(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1 of 2 Parquet files below .* do not say their split \(b.parquet\)"):
        find("chartqa", tmp_path / "mixed", ["test.parquet", "b.parquet"])
    with pytest.raises(SourceError, match="2 of 2"):
        find("chartqa", tmp_path / "two", ["a.parquet", "b.parquet"])
    one = find("chartqa", tmp_path / "one", ["a.parquet"])
    assert one.describe(tmp_path / "one") == "split test: 1 of 1 Parquet files (a.parquet)"


@pytest.mark.parametrize(
    ("name", "files", "taken"),
    [
        (
            "mmbench",
            ["cn/dev-00000-of-00001.parquet", "en/dev-00000-of-00001.parquet", "cc/test-00000-of-00001.parquet"],
            ["en/dev-00000-of-00001.parquet"],
        ),
        (
            "docvqa",
            ["DocVQA/validation-00000-of-00001.parquet", "InfographicVQA/validation-00000-of-00001.parquet"],
            ["DocVQA/validation-00000-of-00001.parquet"],
        ),
        (
            "pope",
            ["data/test-00000-of-00001.parquet", "Full/random-00000-of-00001.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        ("cv-bench", ["test_2d.parquet", "test_3d.parquet"], ["test_2d.parquet", "test_3d.parquet"]),
        (
            "seed",
            [".cache/test/0000.parquet", "data/test-00000-of-00002-ab.parquet", "data/test-00001-of-00002-cd.parquet"],
            ["data/test-00000-of-00002-ab.parquet", "data/test-00001-of-00002-cd.parquet"],
        ),
    ],
)
def test_of_several_configurations_the_benchmarks_own_is_taken(
    name: str, files: list[str], taken: list[str], tmp_path: Path
) -> None:
    found = find(name, tmp_path, files)
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == taken


def test_several_folders_of_one_split_are_refused_where_nothing_tells_them_apart(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"are in 2 folders below .* \(new, old\); one configuration of lmms-lab/ChartQA"
    ):
        find("chartqa", tmp_path / "chartqa", ["old/test.parquet", "new/test.parquet"])
    with pytest.raises(SourceError, match="one configuration of lmms-lab/ScienceQA: ScienceQA-IMG"):
        find("scienceqa", tmp_path / "scienceqa", ["a/test.parquet", "b/test.parquet"])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="and none of number 00001"):
        find("seed", tmp_path / "gap", ["data/test-00000-of-00003.parquet", "data/test-00002-of-00003.parquet"])
    with pytest.raises(SourceError, match="that do not belong together"):
        find("seed", tmp_path / "two", ["data/test-00000-of-00001.parquet", "data/test-00000-of-00001-ab.parquet"])


def test_a_folder_of_another_kind_of_file_says_what_it_has(tmp_path: Path) -> None:
    for file in ("a.tsv", "b.tsv", "c.jsonl"):
        (tmp_path / file).write_text("x", encoding="utf-8")
    with pytest.raises(SourceError, match=r"has no Parquet files \(it has 2 .tsv, 1 .jsonl\)"):
        find("mmbench", tmp_path, [])


def test_one_subject_given_twice_is_refused(subjects: Path, tmp_path: Path) -> None:
    write(subjects / "Copy" / "validation-00000-of-00001.parquet", mmmu_rows("Art", "validation", 3))
    with pytest.raises(EvaluationError, match='has the id of row 0, "validation_Art_1"'):
        build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=subjects)


def test_files_of_other_columns_are_refused_and_empty_columns_take_the_type_of_the_first(
    subjects: Path, tmp_path: Path
) -> None:
    second = subjects / "Music" / "validation-00000-of-00001.parquet"
    write(second, [{**row, "image_1": None} for row in mmmu_rows("Music", "validation", 3)])
    build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=subjects)
    assert open_folder(tmp_path / "s").dataset("mmmu-validation").images == 3
    write(second, [{**row, "answer": ["B"]} for row in mmmu_rows("Music", "validation", 3)])
    with pytest.raises(SourceError, match="has other columns than"):
        build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=subjects)


HIDDEN = [
    (row, column, value)
    for row in BENCHMARKS.values()
    if not row.judged and row.hub_id
    for column, kind in row.columns.items()
    if column in ("answer", "answers", "Correct Answer")
    for value in (
        [None, [], ["", ""]]
        if kind == TEXTS
        else [None, [], [{"answer": ""}]]
        if kind in (RECORDS, ANSWERS)
        else ["?", "", " ", None]
    )
]


@pytest.mark.parametrize(("row", "column", "value"), HIDDEN, ids=lambda value: getattr(value, "name", None))
def test_no_benchmark_scores_a_hidden_answer(row: BenchmarkRow, column: str, value: object) -> None:
    reference = {"id": "7", column: value}
    with pytest.raises(EvaluationError, match=f'{row.name} references, row 1: "{column}" is .* hides the answer'):
        score_predictions(row.name, [reference], [{"id": "7", "prediction": "A"}])


def test_minus_one_hides_an_option_and_is_a_number_elsewhere() -> None:
    for name, reference in (
        ("ai2d", rows.ai2d(answer="-1")),
        ("scienceqa", rows.scienceqa(answer=-1)),
        ("seed", rows.seed(answer="-1")),
        ("mmbench", rows.mmbench(7, answer="nan")),
        ("mmmu", rows.mmmu(answer="-1")),
    ):
        with pytest.raises(EvaluationError, match="hides the answer"):
            score_predictions(name, [{"id": "1", **reference}], [{"id": "1", "prediction": "A"}])
    open_question = rows.mmmu(id="validation_Math_1", question_type="open", options="[]", answer="-1")
    assert score_predictions("mmmu", [open_question], [{"id": open_question["id"], "prediction": "-1"}]).score == 100
    chart = {"id": "1", "type": "human_test", "question": "?", "answer": "-1"}
    assert score_predictions("chartqa", [chart], [{"id": "1", "prediction": "-1"}]).score == 100


def test_a_snapshot_with_hidden_answers_is_not_asked(subjects: Path, tmp_path: Path) -> None:
    table = [*mmmu_rows("Art", "validation", 2), *mmmu_rows("Art", "test", 2)]
    source = write(tmp_path / "all.parquet", table)
    with pytest.raises(EvaluationError, match=r"mmmu row 2: \"answer\" is '\?', which hides the answer.*those of test"):
        build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=source)
    build_benchmark(BENCHMARKS["mmmu"], tmp_path / "s", parquet=subjects)
    write(next((tmp_path / "s" / "mmmu").iterdir()), table)
    write_snapshot_manifest(tmp_path / "s")
    with pytest.raises(EvaluationError, match=r"mmmu row 2: .* hides the answer"):
        load_benchmark(BENCHMARKS["mmmu"], snapshot=open_folder(tmp_path / "s"))
