"""The S3 reader against moto's server, which runs in this process and answers on localhost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from data_samples import lay_out_remote, make_record, make_snapshot
from moto.server import ThreadedMotoServer

from manyeyes.data.fetching import list_files
from manyeyes.data.mixture import Mixture
from manyeyes.data.remote import S3Remote, open_remote
from manyeyes.data.snapshot import hash_folder, open_snapshot
from manyeyes.errors import SnapshotError
from manyeyes.recipe import MixturePart

URL = "s3://bucket/some/prefix"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
        client.close()


@pytest.fixture
def client(bucket: Any) -> Iterator[Any]:
    """The bucket, empty again after the test."""
    yield bucket
    for item in bucket.list_objects_v2(Bucket="bucket").get("Contents", []):
        bucket.delete_object(Bucket="bucket", Key=item["Key"])


@pytest.fixture
def md5(client: Any, tmp_path: Path) -> str:
    folder = make_snapshot(
        tmp_path / "data", {"train": [make_record(number) for number in range(40)]}, rows_per_shard=4
    )
    md5, objects = lay_out_remote(folder.path)
    for key, data in objects.items():
        client.put_object(Bucket="bucket", Key=f"some/prefix/{key}", Body=data)
    return md5


def find_key(md5: str, relpath: str) -> str:
    (entry,) = [file for file in list_files(open_remote(URL), md5) if file.relpath == relpath]
    return f"some/prefix/files/md5/{entry.md5[:2]}/{entry.md5[2:]}"


def materialise(md5: str, cache: Path) -> Path:
    """Folder of a snapshot with all its shards."""
    snapshot = open_snapshot(md5=md5, remote=URL, cache_dir=cache)
    assert len(snapshot.shards("toy-train")) == 10
    return snapshot.path


def test_a_snapshot_is_fetched_from_s3(md5: str, tmp_path: Path) -> None:
    assert hash_folder(materialise(md5, tmp_path / "cache")) == md5


def test_a_broken_off_download_asks_for_the_rest_only(
    md5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = (tmp_path / "data/toy/train-00003.parquet").read_bytes()
    partial = tmp_path / "cache" / "snapshots" / f"{md5}.partial" / "toy"
    partial.mkdir(parents=True)
    (partial / ".train-00003.parquet.part").write_bytes(shard[:700])
    received: dict[str, int] = {}
    stream = S3Remote.stream

    def count(self: S3Remote, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        for chunk in stream(self, key, offset=offset, what=what):
            received[what] = received.get(what, 0) + len(chunk)
            yield chunk

    monkeypatch.setattr(S3Remote, "stream", count)
    path = materialise(md5, tmp_path / "cache")
    assert received["toy/train-00003.parquet"] == len(shard) - 700
    assert hash_folder(path) == md5


def test_a_start_longer_than_the_object_is_thrown_away(md5: str, tmp_path: Path) -> None:
    partial = tmp_path / "cache" / "snapshots" / f"{md5}.partial" / "toy"
    partial.mkdir(parents=True)
    (partial / ".train-00003.parquet.part").write_bytes(b"x" * 1_000_000)
    assert hash_folder(materialise(md5, tmp_path / "cache")) == md5


def test_a_connection_that_breaks_off_is_taken_up_again(
    md5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ResponseStreamingError

    from manyeyes.data import remote

    read_body = remote._read_body
    broken: list[int] = []

    def break_off_once(body: Any) -> Iterator[bytes]:
        data = b"".join(read_body(body))
        if len(data) > 1000 and not broken:
            broken.append(len(data))
            yield data[:500]
            raise ResponseStreamingError(error="connection reset")
        yield data

    monkeypatch.setattr(remote, "_read_body", break_off_once)
    assert hash_folder(materialise(md5, tmp_path / "cache")) == md5
    assert broken


def test_a_damaged_object_is_refused(md5: str, client: Any, tmp_path: Path) -> None:
    client.put_object(Bucket="bucket", Key=find_key(md5, "toy/train-00002.parquet"), Body=b"damaged")
    with pytest.raises(SnapshotError, match=r"toy/train-00002\.parquet .* has md5"):
        materialise(md5, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*train-00002.parquet*"))


def test_a_missing_object_is_named(md5: str, client: Any, tmp_path: Path) -> None:
    client.delete_object(Bucket="bucket", Key=find_key(md5, "toy/train-00002.parquet"))
    with pytest.raises(SnapshotError, match=r"lacks toy/train-00002\.parquet") as caught:
        materialise(md5, tmp_path / "cache")
    assert not caught.value.retry


def test_an_unknown_md5_is_no_reason_to_retry(md5: str) -> None:
    with pytest.raises(SnapshotError, match="has no snapshot") as caught:
        list_files(open_remote(URL), "0" * 32)
    assert not caught.value.retry


def test_a_missing_bucket_is_named(client: Any) -> None:
    with pytest.raises(SnapshotError, match='no bucket "other"'):
        list_files(open_remote("s3://other/prefix"), "0" * 32)


def test_a_bucket_must_be_named() -> None:
    with pytest.raises(SnapshotError, match="Name the bucket"):
        open_remote("s3://")


def test_a_store_that_does_not_answer_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SnapshotError, match="cannot be reached") as caught:
        list_files(open_remote(URL), "0" * 32)
    assert caught.value.retry


def test_a_mixture_fetches_shards_from_s3_when_it_reads_them(md5: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    mixture = Mixture([MixturePart(dataset="toy-train")], open_snapshot(md5=md5, remote=URL, cache_dir=cache), seed=0)
    assert list(cache.rglob("*.parquet")) == []
    ids = {mixture.sample(0, index).record.id for index in range(len(mixture))}
    assert len(ids) == 40
    assert len(list(cache.rglob("*.parquet"))) == 10


def test_a_shard_that_is_damaged_in_s3_stops_who_reads_it(md5: str, client: Any, tmp_path: Path) -> None:
    key = find_key(md5, "toy/train-00004.parquet")
    data = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    client.put_object(Bucket="bucket", Key=key, Body=b"x" + data[1:])
    snapshot = open_snapshot(md5=md5, remote=URL, cache_dir=tmp_path / "cache")
    mixture = Mixture([MixturePart(dataset="toy-train")], snapshot, seed=0)

    def read_all() -> None:
        for index in range(len(mixture)):
            mixture.sample(0, index)

    with pytest.raises(SnapshotError, match=r"train-00004\.parquet .* has md5"):
        read_all()
    assert not list((tmp_path / "cache").rglob("*train-00004*"))
