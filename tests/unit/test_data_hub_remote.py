"""The reader of the hub against a server on loopback that answers as the hub's resolve addresses do."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from data_samples import lay_out_remote, make_record, make_snapshot
from huggingface_hub import constants

from manyeyes.data.mixture import Mixture
from manyeyes.data.remote import open_remote
from manyeyes.data.snapshot import open_snapshot
from manyeyes.errors import SnapshotError
from manyeyes.recipe import MixturePart
from tests.web_server import QuietHandler, serve_on_loopback

COMMIT = "0123456789" * 4
URL = f"hub:someone/pictures@{COMMIT}"
RECORDS = [make_record(number) for number in range(12)]


@dataclass
class Hub:
    objects: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    cut: int = 0  # how many answers break off in the middle
    busy: int = 0  # how many answers are 503
    ranges: bool = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    known = Hub({})

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            match = re.fullmatch(r"/(?:datasets/(.+)/resolve/([^/]+)|store)/(.+)", self.path)
            assert match is not None
            repository, revision, key = match.groups()
            data = known.objects.get(key)
            if known.busy:
                known.busy -= 1
                self.reply(503, {}, b"")
            elif repository and (repository, revision) != ("someone/pictures", COMMIT):
                code = "RevisionNotFound" if repository == "someone/pictures" else "RepoNotFound"
                self.reply(404 if code == "RevisionNotFound" else 401, {"X-Error-Code": code}, b"")
            elif data is None:
                self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")
            elif repository:  # large files lie elsewhere
                known.tokens.add(self.headers["Authorization"])
                self.reply(302, {"Location": f"/store/{key}"}, b"")
            else:
                known.asked.append(key)
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                start = int(wanted[1]) if wanted and known.ranges else 0
                if start >= len(data) and start:
                    self.reply(416, {}, b"")
                    return
                body, length = data[start:], len(data) - start
                if known.cut and length > 1:
                    known.cut -= 1
                    body = body[: length // 2]
                self.reply(206 if wanted and known.ranges else 200, {}, body, length=length)
                self.close_connection = True

    with serve_on_loopback(Handler, threading.Event()) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "a-token")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield known


@pytest.fixture
def md5(hub: Hub, tmp_path: Path) -> str:
    folder = make_snapshot(tmp_path / "data", {"train": RECORDS}, rows_per_shard=4).path
    md5, objects = lay_out_remote(folder)
    hub.objects.update(objects)
    return md5


def test_a_snapshot_is_read_on_demand_from_a_data_set_of_the_hub(
    hub: Hub, md5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = open_snapshot(md5=md5, remote=URL, cache_dir=tmp_path / "cache")
    assert not list(snapshot.path.rglob("*.parquet"))
    size = snapshot.dataset("toy-train").shards[0].bytes
    monkeypatch.setenv("MANYEYES_SHARDS_GB", str(1.5 * size / 1e9))
    with pytest.warns(UserWarning, match="MANYEYES_SHARDS_GB"):
        mixture = Mixture([MixturePart(dataset="toy-train")], snapshot, seed=0)
    read = {mixture.sample(0, index).record.id for index in range(len(mixture))}
    assert read == {record.id for record in RECORDS}
    assert len(list(snapshot.path.rglob("*.parquet"))) == 1
    assert hub.tokens == {"Bearer a-token"}


def test_what_breaks_off_or_is_too_busy_is_taken_up_again(hub: Hub, md5: str, tmp_path: Path) -> None:
    hub.cut, hub.busy = 3, 2
    snapshot = open_snapshot(md5=md5, remote=URL, cache_dir=tmp_path / "cache")
    for path in snapshot.shards("toy-train"):
        assert path.read_bytes() == (tmp_path / "data" / path.relative_to(snapshot.path)).read_bytes()
    assert (hub.cut, hub.busy) == (0, 0)


def test_an_object_is_read_from_any_byte_on(hub: Hub) -> None:
    hub.objects["files/md5/aa/b"] = bytes(range(200))
    remote = open_remote(URL)
    for ranges in (True, False):
        hub.ranges = ranges
        for offset in (0, 1, 150):
            assert b"".join(remote.stream("files/md5/aa/b", offset=offset, what="b")) == bytes(range(offset, 200))
    hub.ranges = True
    assert b"".join(remote.stream("files/md5/aa/b", offset=200, what="b")) == b""


def test_a_damaged_object_is_refused(hub: Hub, md5: str, tmp_path: Path) -> None:
    largest = max(hub.objects, key=lambda key: len(hub.objects[key]))
    hub.objects[largest] = b"other" + hub.objects[largest][5:]
    with pytest.raises(SnapshotError, match="md5"):
        open_snapshot(md5=md5, remote=URL, cache_dir=tmp_path / "cache").shards("toy-train")


def test_what_is_missing_or_refused_is_said(hub: Hub, md5: str, tmp_path: Path) -> None:
    def open_at(url: str, digest: str = md5) -> None:
        open_snapshot(md5=digest, remote=url, cache_dir=tmp_path / "cache")

    with pytest.raises(SnapshotError, match="has no snapshot"):
        open_at(URL, "0" * 32)
    with pytest.raises(SnapshotError, match=r"RevisionNotFound \(404\).*HF_TOKEN"):
        open_at("hub:someone/pictures@other")
    with pytest.raises(SnapshotError, match=r"RepoNotFound \(401\)"):
        open_at(f"hub:nobody/pictures@{COMMIT}")
    with pytest.raises(SnapshotError, match="hub:OWNER/NAME@COMMIT"):
        open_at("hub:someone/pictures")
    shard = next(path for path in (tmp_path / "data").rglob("*.parquet"))
    hub.objects = {key: data for key, data in hub.objects.items() if data != shard.read_bytes()}
    with pytest.raises(SnapshotError, match=r"lacks toy/train-0000\d\.parquet"):
        open_snapshot(md5=md5, remote=URL, cache_dir=tmp_path / "cache").shards("toy-train")


def test_an_offline_machine_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SnapshotError, match="HF_HUB_OFFLINE"):
        open_remote(URL)
