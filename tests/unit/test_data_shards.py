from __future__ import annotations

import errno
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import make_record

from manyeyes.data.shards import RecordReader, ShardWriter, read_id, read_shard_metadata, write_shards
from manyeyes.errors import RecordError, SnapshotError, StorageError

RECORDS = [make_record(number, pairs=1 + number % 3, num_images=number % 3) for number in range(230)]


def test_what_is_written_is_read_back_at_any_place(tmp_path: Path) -> None:
    shards = write_shards(RECORDS, tmp_path, "train", rows_per_shard=150)
    assert [shard.name for shard in shards] == ["train-00000.parquet", "train-00001.parquet"]
    reader = RecordReader(shards, cached_groups=1)
    assert len(reader) == 230
    for index in (229, 0, 149, 150, 100, 99, 7):
        assert reader.read(index) == RECORDS[index]
    assert list(reader) == RECORDS
    groups = list(reader.groups())
    assert [read_id(group, row) for group in groups for row in range(group.num_rows)] == [
        record.id for record in RECORDS
    ]
    assert reader.group_starts.tolist() == [0, 100, 150]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shards(RECORDS, tmp_path / "a", "train")
    second = write_shards(RECORDS, tmp_path / "b", "train")
    assert first[0].read_bytes() == second[0].read_bytes()


def test_provenance_is_kept_in_a_column_of_its_own_and_only_when_asked_for(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [replace(record, provenance='{"model": "a"}') for record in RECORDS[:3]]
    (plain,) = write_shards(records, tmp_path / "plain", "train")
    assert plain.read_bytes() == write_shards(RECORDS[:3], tmp_path / "none", "train")[0].read_bytes()
    (kept,) = write_shards(records, tmp_path / "kept", "train", provenance=True)
    assert list(RecordReader([kept, plain])) == [*records, *RECORDS[:3]]
    loaded = datasets.Dataset.from_parquet(str(kept), cache_dir=str(tmp_path / "cache"))
    assert loaded[2]["provenance"] == '{"model": "a"}'
    assert loaded[1]["images"][0].size == (8, 6)


def test_row_groups_are_small(tmp_path: Path) -> None:
    (shard,) = write_shards(RECORDS, tmp_path, "train")
    metadata = pq.read_metadata(shard)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [100, 100, 30]


def test_a_shard_also_ends_by_its_bytes(tmp_path: Path) -> None:
    one = sum(len(image.data) for image in RECORDS[1].images)
    shards = write_shards([RECORDS[1]] * 5, tmp_path, "train", bytes_per_shard=2 * one)
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [2, 2, 1]


def test_the_hub_library_opens_a_shard_with_its_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (shard,) = write_shards(RECORDS[:5], tmp_path, "train")
    loaded = datasets.Dataset.from_parquet(str(shard), cache_dir=str(tmp_path / "cache"))
    assert loaded[1]["images"][0].size == (8, 6)
    assert loaded[1]["conversations"][0]["from"] == "human"


def test_duckdb_opens_a_shard(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    (shard,) = write_shards(RECORDS[:5], tmp_path, "train")
    query = f"select id, len(images), conversations[1].value from '{shard}' where id = 'toy/2'"
    assert duckdb.sql(query).fetchall() == [("toy/2", 2, "<image>\n<image>\nquestion 0 of 2?")]


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, kept: int) -> None:
    good, bad = write_shards(RECORDS, tmp_path, "train", rows_per_shard=200)
    bad.write_bytes(bad.read_bytes()[:kept])
    with pytest.raises(SnapshotError, match=rf"{bad.name} .*truncated or damaged"):
        RecordReader([good, bad])


def test_damage_inside_a_shard_is_named_when_it_is_read(tmp_path: Path) -> None:
    (shard,) = write_shards(RECORDS[:100], tmp_path, "train")
    data = bytearray(shard.read_bytes())
    data[4:2000] = b"\xff" * 1996
    shard.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"train-00000\.parquet .*damaged"):
        RecordReader([shard]).read(0)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"gone\.parquet is missing"):
        RecordReader([tmp_path / "gone.parquet"])


def test_other_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "picture": [b"x"]}), tmp_path / "train-00000.parquet")
    with pytest.raises(SnapshotError) as caught:
        RecordReader([tmp_path / "train-00000.parquet"])
    assert "conversations" in caught.value.needed
    assert "too many: picture" in caught.value.needed


def test_images_without_facts_are_a_bad_record(tmp_path: Path) -> None:
    (shard,) = write_shards(RECORDS[:3], tmp_path, "train")
    table = pq.read_table(shard)
    index = table.schema.get_field_index("sha256")
    empty = pa.array([[]] * 3, type=table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), empty), shard)
    reader = RecordReader([shard])
    assert reader.read(0).images == ()
    with pytest.raises(RecordError, match="toy/1"):
        reader.read(1)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path, "train") as writer:
            for record in RECORDS:
                writer.write(record)
            raise KeyError("the source broke off")

    with pytest.raises(KeyError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("manyeyes.data.shards.os.fsync", refuse)
    with pytest.raises(StorageError, match="no space left"):
        write_shards(RECORDS[:3], tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_reading_outside_is_an_index_error(tmp_path: Path) -> None:
    reader = RecordReader(write_shards(RECORDS[:3], tmp_path, "train"))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            reader.read(index)


def test_of_shards_with_many_row_groups_few_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyeyes.data.shards.OPEN_GROUPS", 3)
    records = [make_record(number, num_images=0) for number in range(600)]
    reader = RecordReader(write_shards(records, tmp_path, "train", rows_per_shard=200), cached_groups=1)
    for index in range(599, 0, -100):
        assert reader.read(index) == records[index]
        assert len(reader._open) == 1


def test_a_footer_is_let_go_of_at_once(tmp_path: Path) -> None:
    (path,) = write_shards([make_record(0)], tmp_path, "train")
    gc.collect()
    gc.disable()
    try:
        footer = weakref.ref(read_shard_metadata(path))
        assert footer() is None
    finally:
        gc.enable()
