"""Shards come when they are read, and go where the disk is small."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import lay_out_remote, make_record, make_snapshot, write_remote

from manyeyes.data import mixture as mixture_module
from manyeyes.data.mixture import Mixture, Sample
from manyeyes.data.snapshot import Snapshot, open_folder, open_snapshot
from manyeyes.errors import PipelineError, SnapshotError
from manyeyes.recipe import MixturePart

TRAIN = MixturePart(dataset="toy-train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    records = [make_record(number) for number in range(66)]
    return make_snapshot(path, {"train": records[:60], "test": records[60:]}, rows_per_shard=6).path


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Snapshot:
    md5, objects = lay_out_remote(folder)
    url = write_remote(tmp_path / "remote", objects)
    return open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")


def on_disk(snapshot: Snapshot) -> list[str]:
    return sorted(path.relative_to(snapshot.path).as_posix() for path in snapshot.path.rglob("*.parquet"))


def read(mixture: Mixture, count: int | None = None) -> list[Sample]:
    return [mixture.sample(0, index) for index in range(count or len(mixture))]


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_opening_a_snapshot_fetches_no_shard_and_a_data_set_only_its_own(snapshot: Snapshot) -> None:
    assert on_disk(snapshot) == []
    assert [path.name for path in snapshot.shards("toy-test")] == ["test-00000.parquet"]
    assert on_disk(snapshot) == ["toy/test-00000.parquet"]


def test_a_mixture_shows_what_it_shows_of_a_whole_snapshot(snapshot: Snapshot, folder: Path) -> None:
    mixture, whole = Mixture([TRAIN], snapshot, seed=3), Mixture([TRAIN], open_folder(folder), seed=3)
    assert on_disk(snapshot) == []
    assert mixture.digest == whole.digest
    assert read(mixture) == read(whole)
    assert len(on_disk(snapshot)) == 10
    assert not any("test-" in name for name in on_disk(snapshot))


def test_only_shards_of_this_window_and_the_next_are_fetched(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture_module, "WINDOW_GROUPS", 2)
    mixture = Mixture([TRAIN], snapshot, seed=3)
    mixture.sample(0, 0)
    wait_until(lambda: len(on_disk(snapshot)) == 4)
    read(mixture, 12)
    assert len(on_disk(snapshot)) == 4


def test_another_process_reads_the_same(snapshot: Snapshot, folder: Path) -> None:
    mixture = pickle.loads(pickle.dumps(Mixture([TRAIN], snapshot, seed=3)))
    assert read(mixture) == read(Mixture([TRAIN], open_folder(folder), seed=3))


def test_shards_take_no_more_of_the_disk_than_is_given(
    snapshot: Snapshot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture_module, "WINDOW_GROUPS", 2)
    monkeypatch.setattr("manyeyes.data.shards.OPEN_GROUPS", 1)
    largest = max(shard.bytes for shard in snapshot.dataset("toy-train").shards)
    limit = 3 * largest
    monkeypatch.setenv("MANYEYES_SHARDS_GB", str(limit / 1e9))
    with pytest.warns(UserWarning, match="fetched several times an epoch"):
        mixture = Mixture([TRAIN], snapshot, seed=3)
    whole = Mixture([TRAIN], open_folder(folder), seed=3)
    for epoch in (0, 1):
        for index in range(len(mixture)):
            assert mixture.sample(epoch, index) == whole.sample(epoch, index)
            # One that is just being fetched ahead may be there before it is seen that it is too many.
            assert len(on_disk(snapshot)) <= 3 + 4
    wait_until(lambda: sum(path.stat().st_size for path in snapshot.path.rglob("*.parquet")) <= limit)


def test_a_snapshot_that_is_whole_needs_its_remote_no_more(snapshot: Snapshot, tmp_path: Path) -> None:
    read(Mixture([TRAIN], snapshot, seed=3))
    shutil.rmtree(tmp_path / "remote")
    again = open_snapshot(md5=snapshot.md5, remote=str(tmp_path / "remote"), cache_dir=tmp_path / "cache")
    assert len(read(Mixture([TRAIN], again, seed=3))) == 60
    with pytest.raises(SnapshotError, match="is not a folder"):
        again.shards("toy-test")


def test_a_shard_that_the_remote_does_not_list_is_named(snapshot: Snapshot) -> None:
    assert snapshot.remote is not None
    with pytest.raises(SnapshotError, match=r"lacks shard toy/none\.parquet"):
        snapshot.remote.fetch(["toy/none.parquet"])


@pytest.mark.parametrize("wrong", ["much", "0", "-1", "inf", "nan"])
def test_a_bound_that_is_no_size_is_refused(wrong: str, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_SHARDS_GB", wrong)
    with pytest.raises(PipelineError, match=f'MANYEYES_SHARDS_GB is "{wrong}"'):
        Mixture([TRAIN], snapshot, seed=0)
