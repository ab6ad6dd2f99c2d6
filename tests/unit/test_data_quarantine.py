from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import make_image, make_record, make_snapshot

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.contamination.search import find_contamination
from manyeyes.data.mixture import Mixture
from manyeyes.data.quarantine import (
    QUARANTINE_FILE,
    QuarantinedSample,
    read_quarantine,
    row_name,
    rows_of,
    write_quarantine,
)
from manyeyes.data.records import Record, Turn
from manyeyes.data.shards import SCHEMA, RecordReader
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.data.validation import validate_snapshot
from manyeyes.errors import DataError, RecordError
from manyeyes.harness.events import ErrorReport, error_line, find_error_line
from manyeyes.recipe import MixturePart

# Everything that some reader of lines takes for the end of one.
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
PART = MixturePart(dataset="toy-train")


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Snapshot:
    """A snapshot of rows as they are, nulls and all."""
    (folder / "toy").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "toy" / "train-00000.parquet", row_group_size=4)
    write_snapshot_manifest(folder, provenance={"toy-train": Provenance("CC0-1.0", "made for a test")})
    return open_folder(folder)


def plain_row(number: int) -> dict[str, Any]:
    image = make_image(number, size=(24, 16))
    return {
        "id": f"toy/{number}",
        "source": "toy",
        "images": [{"bytes": image.data, "path": image.path}],
        "sha256": [image.sha256],
        "width": [24],
        "height": [16],
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"it is {number}"}],
    }


def outcomes(snapshot: Snapshot, out: Path) -> tuple[dict[int, str], list[int]]:
    """Reasons by row in quarantine, and the rows that a mixture shows."""
    report = validate_snapshot(snapshot, datasets=["toy-train"], eval_datasets=[], suite="conversations", out_dir=out)
    lines = (out / QUARANTINE_FILE).read_bytes().split(b"\n")[:-1]
    samples = [QuarantinedSample.model_validate_json(line) for line in lines]
    assert report.quarantined == len(samples)
    mixture = Mixture([PART], snapshot, seed=0, quarantine=read_quarantine(out))
    kept = [int(mixture.sample(0, index).record.turns[1].text.split()[-1]) for index in range(len(mixture))]
    return {sample.row: sample.reason for sample in samples}, sorted(kept)


def test_a_row_without_a_usable_id_has_one_outcome_and_one_reason(tmp_path: Path) -> None:
    rows = [plain_row(number) for number in range(30)]
    for number in range(0, 15):
        rows[number]["id"] = (None, "", " ", "\u2028", "twin")[number % 5]
    reasons, kept = outcomes(write_rows(tmp_path / "data", rows), tmp_path / "out")
    assert kept == list(range(15, 30))
    assert sorted(reasons) == list(range(15))
    for number, reason in reasons.items():
        expected = "3 samples have this id" if number % 5 == 4 else "it has no id; needed: an id that is unique"
        assert reason.startswith(expected)


def test_unreadable_rows_are_left_out_by_their_place_and_named_by_their_ids(tmp_path: Path) -> None:
    rows = [plain_row(number) for number in range(12)]
    nulls = {"images": [None], "sha256": [None], "width": [None], "height": None, "conversations": [None]}
    for number, (column, value) in enumerate(nulls.items()):
        rows[number][column] = value
    # An id that looks like the name of another row must not leave that one out.
    rows[2]["id"], rows[7]["id"] = "toy-train#6", "toy-train#8"
    reasons, kept = outcomes(write_rows(tmp_path / "data", rows), tmp_path / "out")
    assert (list(reasons), kept) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11])
    lines = (tmp_path / "out" / QUARANTINE_FILE).read_bytes().split(b"\n")[:-1]
    ids = [QuarantinedSample.model_validate_json(line).id for line in lines]
    assert ids == ["toy/0", "toy/1", "toy-train#6", "toy/3", "toy/4"]


def test_a_null_in_the_middle_of_a_conversation_is_a_bad_record(tmp_path: Path) -> None:
    rows = [plain_row(number) for number in range(3)]
    rows[1]["conversations"] = [None, *rows[1]["conversations"]]
    snapshot = write_rows(tmp_path, rows)
    with pytest.raises(RecordError, match='"toy/1" has a null in conversations'):
        RecordReader(snapshot.shards("toy-train")).read(1)


def test_every_line_end_of_unicode_may_stand_in_an_id_and_in_a_speaker(tmp_path: Path) -> None:
    rows = [plain_row(number) for number in range(3 * len(LINE_ENDS))]
    for number, end in enumerate(LINE_ENDS):
        rows[3 * number] |= {"id": f"a{end}b", "conversations": [{"from": f"hu{end}man", "value": "x"}]}
        rows[3 * number + 1]["id"] = f"{end}c{end}"
    reasons, kept = outcomes(write_rows(tmp_path / "data", rows), tmp_path / "out")
    assert list(reasons) == list(range(0, len(rows), 3))
    assert kept == [row for row in range(len(rows)) if row % 3]
    for number, end in enumerate(LINE_ENDS):
        assert f'is from "hu{end}man"' in reasons[3 * number]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_an_error_in_a_log_is_found_whatever_line_ends_it_holds(end: str) -> None:
    report = ErrorReport(
        step="sft", error="DataError", found=f"a{end}b", needed="c", do="d", retry=False, user_error=True
    )
    assert find_error_line(f"before\n{error_line(report)}after\n") == report


def test_what_is_written_is_read_back_by_data_set(tmp_path: Path) -> None:
    assert read_quarantine(tmp_path) == frozenset()
    samples = [
        QuarantinedSample(dataset=name, row=row, id="same", reason="bad")
        for name, row in (("a", 3), ("a", 12), ("a#3", 4), ("b", 3))
    ]
    write_quarantine(tmp_path / QUARANTINE_FILE, samples)
    found = read_quarantine(tmp_path)
    assert found == {row_name(sample.dataset, sample.row) for sample in samples}
    assert [sorted(rows_of(found, name)) for name in ("a", "a#3", "b", "c")] == [[3, 12], [4], [3], []]


def test_a_file_that_is_no_quarantine_says_so(tmp_path: Path) -> None:
    (tmp_path / QUARANTINE_FILE).write_text('{"id": "a", "dataset": "b", "reason": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"quarantine\.jsonl, line 1: Field required"):
        read_quarantine(tmp_path)


def test_contaminated_rows_are_known_by_their_place_whatever_their_ids(tmp_path: Path) -> None:
    shared = "the quick brown fox jumps over the lazy dog and runs far away from here today"
    train = [make_record(number, num_images=0, pairs=1) for number in range(7)]
    asked = (Turn("human", shared), Turn("gpt", "yes"))
    for number, name in ((1, ""), (2, "same"), (5, "same")):
        train[number] = dataclasses.replace(train[number], id=name, turns=asked)
    test = [Record("test/1", "toy", (), asked)]
    snapshot = make_snapshot(tmp_path / "data", {"train": train, "test": test}, rows_per_shard=3)
    report = find_contamination(
        snapshot,
        datasets=["toy-train"],
        benchmarks=["toy-test"],
        out_dir=tmp_path / "out",
        cache_dir=tmp_path / "cache",
    )
    assert report.datasets[0].samples == 3
    assert read_quarantine(tmp_path / "out") == {"toy-train#1", "toy-train#2", "toy-train#5"}


def test_text_that_is_not_utf8_does_not_end_a_search_for_contamination(tmp_path: Path) -> None:
    snapshot = write_rows(tmp_path / "data", [plain_row(number) for number in range(3)])
    path = snapshot.shards("toy-train")[0]
    table = pq.read_table(path)
    ids = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"ab\xff\xfeef")]
    )
    pq.write_table(table.set_column(0, table.schema.field("id"), ids), path)
    write_snapshot_manifest(tmp_path / "data", provenance={"toy-train": Provenance("CC0-1.0", "made for a test")})
    snapshot = open_folder(tmp_path / "data")
    report = find_contamination(
        snapshot,
        datasets=["toy-train"],
        benchmarks=[str(path)],
        out_dir=tmp_path / "out",
        cache_dir=tmp_path / "cache",
    )
    assert report.datasets[0].exact == 3
    reasons, kept = outcomes(snapshot, tmp_path / "validation")
    assert (list(reasons), kept) == ([1], [0, 2])
    assert "text that is not UTF-8" in reasons[1]
