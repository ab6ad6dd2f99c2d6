from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from data_samples import lay_out_remote, make_record, make_snapshot, write_remote

from manyeyes.data.builders.manifest import add_pretrained, write_snapshot_manifest
from manyeyes.data.fetching import list_files
from manyeyes.data.remote import FolderRemote, open_remote
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import (
    DvcOutput,
    Snapshot,
    hash_folder,
    open_folder,
    open_snapshot,
    read_default_remote,
    read_dvc_file,
)
from manyeyes.errors import SnapshotError, StorageError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [make_record(number) for number in range(25)]
    return make_snapshot(tmp_path / "data", {"train": records[:20], "test": records[20:]}, rows_per_shard=8).path


@pytest.fixture
def remote(folder: Path, tmp_path: Path) -> tuple[str, str]:
    """md5 and url."""
    md5, objects = lay_out_remote(folder)
    return md5, write_remote(tmp_path / "remote", objects)


def materialise(md5: str, url: str, cache: Path) -> Snapshot:
    """A snapshot with all its shards."""
    snapshot = open_snapshot(md5=md5, remote=url, cache_dir=cache)
    for dataset in snapshot.manifest.datasets:
        snapshot.shards(dataset)
    return snapshot


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    snapshot = open_folder(folder)
    train = snapshot.manifest.datasets["toy-train"]
    assert (train.rows, train.images, train.licence) == (20, 20, "CC0-1.0")
    assert [shard.path for shard in train.shards] == [f"toy/train-0000{index}.parquet" for index in range(3)]
    assert snapshot.shards("toy-test") == [folder / "toy/test-00000.parquet"]


def test_an_unknown_data_set_offers_the_nearest(folder: Path) -> None:
    with pytest.raises(SnapshotError, match='Did you mean "toy-train"'):
        open_folder(folder).shards("toy-tain")


def test_the_md5_is_the_one_that_dvc_documents(folder: Path) -> None:
    assert hash_folder(folder) == lay_out_remote(folder)[0] == open_folder(folder).md5


def test_a_snapshot_is_materialised_whole(remote: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    md5, url = remote
    snapshot = materialise(f"{md5}.dir", url, tmp_path / "cache")
    assert snapshot.path == tmp_path / "cache" / "snapshots" / md5
    assert snapshot.md5 == md5 == hash_folder(snapshot.path)
    assert list(RecordReader(snapshot.shards("toy-test"))) == list(RecordReader([folder / "toy/test-00000.parquet"]))


def test_a_materialised_snapshot_needs_no_remote(remote: tuple[str, str], tmp_path: Path) -> None:
    md5, url = remote
    open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")
    shutil.rmtree(url)
    assert open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache").md5 == md5


def test_a_damaged_object_is_refused_and_nothing_is_left_under_its_name(
    remote: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    md5, url = remote
    (entry,) = [file for file in list_files(open_remote(url), md5) if file.relpath == "toy/test-00000.parquet"]
    damaged = Path(url) / "files/md5" / entry.md5[:2] / entry.md5[2:]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    cache = tmp_path / "cache"
    with pytest.raises(SnapshotError, match=rf"test-00000\.parquet .* has md5 .*; md5 {entry.md5}"):
        materialise(md5, url, cache)
    assert not list(cache.rglob("*test-00000.parquet*"))
    # Once the remote is fixed, the same call succeeds, with what was good already.
    damaged.write_bytes((folder / "toy/test-00000.parquet").read_bytes())
    assert hash_folder(materialise(md5, url, cache).path) == md5


def test_a_broken_off_download_goes_on_where_it_stopped(
    remote: tuple[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md5, url = remote
    partial = tmp_path / "cache" / "snapshots" / f"{md5}.partial" / "toy"
    partial.mkdir(parents=True)
    for name in ("train-00000.parquet", "train-00001.parquet"):
        shutil.copy(folder / "toy" / name, partial / name)
    half = (folder / "toy/train-00002.parquet").read_bytes()[:1000]
    (partial / ".train-00002.parquet.part").write_bytes(half)
    asked: dict[str, int] = {}
    stream = FolderRemote.stream

    def remember(self: FolderRemote, key: str, *, offset: int, what: str) -> object:
        asked[what] = offset
        return stream(self, key, offset=offset, what=what)

    monkeypatch.setattr(FolderRemote, "stream", remember)
    snapshot = materialise(md5, url, tmp_path / "cache")
    assert asked == {"manifest.json": 0, "toy/test-00000.parquet": 0, "toy/train-00002.parquet": 1000}
    assert hash_folder(snapshot.path) == md5


def test_a_wrong_start_of_a_download_is_thrown_away(remote: tuple[str, str], tmp_path: Path) -> None:
    md5, url = remote
    partial = tmp_path / "cache" / "snapshots" / f"{md5}.partial" / "toy"
    partial.mkdir(parents=True)
    (partial / ".train-00002.parquet.part").write_bytes(b"not the start of that file")
    assert hash_folder(materialise(md5, url, tmp_path / "cache").path) == md5


def test_a_full_disk_is_a_storage_error_and_the_next_call_goes_on(
    remote: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md5, url = remote

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("manyeyes.data.fetching.os.fsync", refuse)
        with pytest.raises(StorageError, match="no space left"):
            open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "snapshots" / md5).exists()
    assert hash_folder(materialise(md5, url, tmp_path / "cache").path) == md5


def test_an_object_that_cannot_be_read_is_the_remotes_fault(remote: tuple[str, str], tmp_path: Path) -> None:
    md5, url = remote
    (entry, *_) = list_files(open_remote(url), md5)
    broken = Path(url) / "files/md5" / entry.md5[:2] / entry.md5[2:]
    broken.unlink()
    broken.mkdir()
    with pytest.raises(SnapshotError, match=f"{entry.md5[2:]} cannot be read"):
        materialise(md5, url, tmp_path / "cache")


def _open(md5: str, remote: str, cache: Path) -> str:
    return hash_folder(materialise(md5, remote, cache).path)


def test_several_processes_open_one_snapshot_at_once(remote: tuple[str, str], tmp_path: Path) -> None:
    md5, url = remote
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_open, [(md5, url, tmp_path / "cache")] * 4)
    assert found == [md5] * 4


def test_an_unknown_md5_says_what_to_push(remote: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"has no snapshot 0{32}.*dvc push"):
        open_snapshot(md5="0" * 32, remote=remote[1], cache_dir=tmp_path / "cache")


def test_a_md5_that_is_none_is_refused(remote: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="32 hexadecimal digits"):
        open_snapshot(md5="latest", remote=remote[1], cache_dir=tmp_path / "cache")


def test_the_layout_of_dvc_2_is_refused_by_name(remote: tuple[str, str], tmp_path: Path) -> None:
    md5, url = remote
    (Path(url) / "files/md5").rename(Path(url) / "old")
    (Path(url) / "old" / md5[:2]).rename(Path(url) / md5[:2])
    with pytest.raises(SnapshotError, match="layout of DVC 2"):
        open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")


def test_a_listing_that_leads_outside_is_refused(tmp_path: Path) -> None:
    listing = json.dumps([{"md5": "0" * 32, "relpath": "../outside"}]).encode()
    md5 = hashlib.md5(listing).hexdigest()
    url = write_remote(tmp_path / "remote", {f"files/md5/{md5[:2]}/{md5[2:]}.dir": listing})
    with pytest.raises(SnapshotError, match="paths inside the folder"):
        open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("url", "found"), [("gs://bucket/x", "gs://bucket/x"), ("no/such/folder", "is not a folder")])
def test_other_remotes_are_refused(url: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=found):
        open_snapshot(md5="0" * 32, remote=url, cache_dir=tmp_path / "cache")


def test_a_truncated_shard_is_noticed_on_opening(folder: Path) -> None:
    shard = folder / "toy/train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SnapshotError, match=r"train-00001\.parquet .*truncated"):
        open_folder(folder)


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="manyeyes data build"):
        open_folder(tmp_path)


def test_an_unknown_field_of_the_manifest_is_named(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["colour"] = "red"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(SnapshotError, match="colour"):
        open_folder(folder)


def test_pretrained_parts_travel_with_the_snapshot(folder: Path, tmp_path: Path) -> None:
    for name in ("tiny-lm", "tiny-vit"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "config.json").write_text(name, encoding="utf-8")
    add_pretrained(folder, tmp_path / "parts")
    snapshot = open_folder(folder)
    assert (snapshot.pretrained("tiny-vit") / "config.json").read_text(encoding="utf-8") == "tiny-vit"
    assert snapshot.manifest.pretrained["tiny-lm"].how == "manyeyes step pretrain_language_model"
    assert snapshot.manifest.datasets["toy-train"].licence == "CC0-1.0"
    with pytest.raises(SnapshotError, match='Did you mean "tiny-lm"'):
        snapshot.pretrained("tiny-ml")


def test_data_without_a_licence_is_refused(folder: Path) -> None:
    (folder / "toy").rename(folder / "found-somewhere")
    with pytest.raises(SnapshotError, match="licence"):
        write_snapshot_manifest(folder)


def test_a_dvc_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data.dvc"
    file.write_text(
        f"outs:\n- md5: {'ab' * 16}.dir\n  size: 12\n  nfiles: 3\n  hash: md5\n  path: data\n", encoding="utf-8"
    )
    assert read_dvc_file(file) == DvcOutput(path="data", md5="ab" * 16, size=12, nfiles=3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"outs:\n- md5: {'ab' * 16}.dir\n  size: 12\n  nfiles: 3\n  path: data\n", "DVC 2"),
        ("outs:\n- size: 12\n  hash: md5\n  path: data\n", "no md5"),
        (f"outs:\n- md5: {'ab' * 16}\n  size: 12\n  hash: md5\n  path: a.txt\n", "tracks the file"),
        ("stages: {}\n", "not a .dvc file"),
    ],
)
def test_other_dvc_files_are_refused_with_the_reason(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "data.dvc").write_text(text, encoding="utf-8")
    with pytest.raises(SnapshotError, match=found):
        read_dvc_file(tmp_path / "data.dvc")


def write_config(repository: Path, text: str, *, name: str = "config") -> None:
    (repository / ".dvc").mkdir(exist_ok=True)
    (repository / ".dvc" / name).write_text(text, encoding="utf-8")


def test_the_default_remote_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, "[core]\n    remote = r\n['remote \"r\"']\n    url = ../infra/dvc-remote\n")
    monkeypatch.chdir(tmp_path)
    assert read_default_remote(Path()) == "infra/dvc-remote"
    monkeypatch.chdir("/")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/nowhere"))
    assert read_default_remote(tmp_path) == str(tmp_path.resolve() / "infra/dvc-remote")


def test_a_local_config_wins(tmp_path: Path) -> None:
    write_config(tmp_path, "[core]\n    remote = r\n['remote \"r\"']\n    url = ../x\n")
    write_config(tmp_path, "['remote \"r\"']\n    url = s3://bucket/prefix\n", name="config.local")
    assert read_default_remote(tmp_path) == "s3://bucket/prefix"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[core]\n    analytics = false\n", "names no default remote"),
        ("[core]\n    remote = r\n", 'no url for remote "r"'),
        ("[core]\n    remote = r\n['remote \"r\"']\n    url = s3://b\n    version_aware = true\n", "version_aware"),
    ],
)
def test_a_config_without_a_usable_remote_is_refused(tmp_path: Path, text: str, found: str) -> None:
    write_config(tmp_path, text)
    with pytest.raises(SnapshotError, match=found):
        read_default_remote(tmp_path)


def test_the_bundled_snapshot_is_whole_and_small(tmp_path: Path) -> None:
    out = read_dvc_file(REPOSITORY / "data.dvc")
    remote = read_default_remote(REPOSITORY)
    snapshot = open_snapshot(md5=out.md5, remote=remote, cache_dir=tmp_path)
    rows = {name: entry.rows for name, entry in snapshot.manifest.datasets.items()}
    assert rows == {"easy-vqa-train": 3800, "easy-vqa-val": 200, "easy-vqa-test": 1000}
    sizes = [path.stat().st_size for path in (REPOSITORY / "infra/dvc-remote").rglob("*") if path.is_file()]
    assert sum(sizes) < 10_000_000
    assert max(sizes) < 5_000_000
