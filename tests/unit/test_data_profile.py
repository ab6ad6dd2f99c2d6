"""A new snapshot is profiled by the shards that changed; the profile is that of a whole reading, byte for byte."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from data_samples import lay_out_remote, make_image, make_record, make_snapshot

from bench.fuzz_records import DATASET, odd_rows, write_odd_snapshot
from manyeyes.data import profile as profiles
from manyeyes.data.by_column import RowsByColumn, read_by_column
from manyeyes.data.profile import hash_texts, read_columns, take_rows, write_profile
from manyeyes.data.records import Record, SampleProblem, Turn
from manyeyes.data.snapshot import Snapshot, open_snapshot
from manyeyes.errors import SnapshotError

TRAIN = [make_record(number) for number in range(12)]
TEST = [make_record(number, prefix="test") for number in range(500, 503)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose records are read, as they are."""
    names: list[str] = []
    original = profiles._read_groups

    def watched(path: Path) -> object:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(profiles, "_read_groups", watched)
    return names


def snapshot_of(folder: Path, train: Sequence[Record]) -> Snapshot:
    """Three shards to train on, and one of an evaluation set."""
    return make_snapshot(folder, {"train": train, "test": TEST}, rows_per_shard=4)


def profile_of(snapshot: Snapshot, out: Path, **options: object) -> bytes:
    write_profile(snapshot, ["toy-train", "toy-test"], eval_datasets=["toy-test"], out=out, **options)  # type: ignore[arg-type]
    return out.read_bytes()


def changed() -> list[Record]:
    """In the middle shard one id that is in the first and one image of the evaluation set; the others are as before."""
    records = list(TRAIN)
    records[5] = dataclasses.replace(records[5], id=records[0].id)
    records[6] = dataclasses.replace(records[6], images=TEST[0].images)
    return records


def test_only_shards_that_changed_are_read_and_the_profile_is_the_same(tmp_path: Path, read: list[str]) -> None:
    first = snapshot_of(tmp_path / "first", TRAIN)
    profile_of(first, tmp_path / "1.parquet", cache_dir=tmp_path / "kept")
    assert sorted(read) == ["test-00000.parquet", *(f"train-0000{number}.parquet" for number in range(3))]
    read.clear()
    second = snapshot_of(tmp_path / "second", changed())
    incremental = profile_of(second, tmp_path / "2.parquet", cache_dir=tmp_path / "kept")
    assert read == ["train-00001.parquet"]
    assert incremental == profile_of(second, tmp_path / "3.parquet")
    rows = pd.read_parquet(tmp_path / "2.parquet")
    # Rows of shards that were not read know of the one that was.
    assert rows["problem"].tolist() == [
        "2 samples have this id" if row in (0, 5) else "" for row in range(len(TRAIN) + len(TEST))
    ]
    assert np.flatnonzero(rows["in_eval_set"]).tolist() == [6]
    assert rows["row"].tolist() == [*range(12), *range(3)]


def test_a_shard_that_is_known_is_not_fetched(tmp_path: Path) -> None:
    kept, remote = tmp_path / "kept", tmp_path / "remote"
    snapshots = []
    for number, records in enumerate((TRAIN, changed())):
        folder = tmp_path / str(number)
        snapshot_of(folder, records)
        md5, objects = lay_out_remote(folder)
        for key, data in objects.items():
            (remote / key).parent.mkdir(parents=True, exist_ok=True)
            (remote / key).write_bytes(data)
        snapshot = open_snapshot(md5=md5, remote=str(remote), cache_dir=tmp_path / "cache")
        profile_of(snapshot, tmp_path / f"{number}.parquet", cache_dir=kept)
        snapshots.append(snapshot)
    assert [path.name for path in snapshots[1].path.rglob("*.parquet")] == ["train-00001.parquet"]
    assert (tmp_path / "1.parquet").read_bytes() == profile_of(snapshots[1], tmp_path / "again.parquet")


def test_facts_that_are_damaged_are_found_again(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "data", TRAIN)
    before = profile_of(snapshot, tmp_path / "1.parquet", cache_dir=tmp_path / "kept")
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert profile_of(snapshot, tmp_path / "2.parquet", cache_dir=tmp_path / "kept") == before


def test_what_a_recipe_refuses_is_kept_by_the_recipe_and_the_place(tmp_path: Path, read: list[str]) -> None:
    def refuse_third(record: Record, *, dataset: str, row: int, image_sizes: object) -> SampleProblem | None:
        return SampleProblem(f"it is row {row} of {dataset}", "another") if row == 3 else None

    snapshot = snapshot_of(tmp_path / "data", TRAIN)
    options = {"cache_dir": tmp_path / "kept", "find_misfit": refuse_third}
    for key, expected in (("a", 4), ("a", 0), ("b", 4), ("", 4)):
        read.clear()
        profile_of(snapshot, tmp_path / "1.parquet", misfit_key=key, **options)
        assert len(read) == expected
    problems = pd.read_parquet(tmp_path / "1.parquet")["problem"]
    assert problems[3] == "it is row 3 of toy-train; needed: another"
    # A sample more in front moves all that are behind it.
    read.clear()
    moved = snapshot_of(tmp_path / "moved", [make_record(99), *TRAIN])
    profile_of(moved, tmp_path / "2.parquet", misfit_key="a", **options)
    assert len(read) == 4


def test_an_image_is_decoded_once_however_often_it_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    measure = profiles.measure_image
    monkeypatch.setattr(profiles, "measure_image", lambda data: (decoded.append(data), measure(data))[1])
    broken = dataclasses.replace(make_image(1), data=b"no image")
    records = [dataclasses.replace(record, images=(make_image(1),)) for record in TRAIN]
    records[7] = dataclasses.replace(records[7], images=(broken,))
    profile_of(snapshot_of(tmp_path / "data", records), tmp_path / "1.parquet")
    assert len(decoded) == 2 + len(TEST)
    problems = pd.read_parquet(tmp_path / "1.parquet")["problem"]
    assert np.flatnonzero(problems).tolist() == [7]


def test_a_manifest_that_counts_otherwise_is_refused(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "data", TRAIN)
    entry = snapshot.dataset("toy-train")
    wrong = entry.model_copy(update={"shards": (entry.shards[0].model_copy(update={"rows": 3}), *entry.shards[1:])})
    manifest = snapshot.manifest.model_copy(update={"datasets": {**snapshot.manifest.datasets, "toy-train": wrong}})
    with pytest.raises(SnapshotError, match="has 4 records; 3, as the manifest says"):
        profile_of(dataclasses.replace(snapshot, manifest=manifest), tmp_path / "1.parquet")


def test_columns_and_rows_are_read_alone(tmp_path: Path) -> None:
    records = [*TRAIN[:3], dataclasses.replace(TRAIN[3], id=" ", turns=(Turn("human", "<image>"),))]
    profile_of(snapshot_of(tmp_path / "data", records), path := tmp_path / "1.parquet")
    whole = pd.read_parquet(path)
    columns = read_columns(path, ["problem", "id", "width", "nonsense"], hashed=["id"])
    assert list(columns) == ["id", "width", "problem"]
    assert columns["width"].dtype.itemsize == 1
    assert columns["width"].tolist() == whole["width"].tolist()
    assert columns["problem"].tolist() == whole["problem"].tolist()
    assert columns["id"].tolist() == hash_texts(whole["id"].tolist()).tolist()
    assert take_rows(path, [3, 0], ["id", "row"]).values.tolist() == [["toy/0", 0], ["toy-train#3", 3]]
    assert take_rows(path, [], ["id"]).empty


@pytest.mark.parametrize("rows_a_group", [2, 3, 40])
def test_rows_that_are_looked_at_by_column_have_the_facts_of_rows_that_are_read_alone(
    rows_a_group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lm").mkdir()
    rows = odd_rows(500, random.Random(rows_a_group))
    snapshot = write_odd_snapshot(tmp_path / "data", rows, language_model=tmp_path / "lm", rows_a_group=rows_a_group)
    found: list[RowsByColumn | None] = []

    def watched(group: pa.RecordBatch) -> RowsByColumn | None:
        found.append(read_by_column(group))
        return found[-1]

    def profile(look: object, name: str) -> bytes:
        monkeypatch.setattr(profiles, "read_by_column", look)
        write_profile(snapshot, [DATASET], eval_datasets=[], out=tmp_path / name)
        return (tmp_path / name).read_bytes()

    assert profile(watched, "by_column.parquet") == profile(lambda _: None, "alone.parquet")
    sound = sum(int(each.sound.sum()) for each in found if each is not None)
    whole = sum(len(each.sound) for each in found if each is not None)
    assert None in found
    if rows_a_group < 40:  # some row of a large group holds a null, so that all its rows are read alone
        assert 100 < sound < whole - 30
