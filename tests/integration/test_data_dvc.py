"""Our reader against what dvc itself writes: a folder remote, and S3 (moto's server, in this process).

Needs dvc with dvc-s3 (``pip install 'manyeyes[dvc]'``); nothing has to be started.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from manyeyes.data.snapshot import hash_folder, open_folder, open_snapshot, read_default_remote, read_dvc_file

pytest.importorskip("dvc_s3", reason="pip install 'manyeyes[dvc]'")
REPOSITORY = Path(__file__).parents[2]


def dvc(*arguments: str, cwd: Path) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(cwd / ".site")}
    result = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository without git that tracks a small folder with names that are hard to sort."""
    path = tmp_path_factory.mktemp("repository")
    for name in ("b.txt", "a/c.txt", "a-b/c.txt", "a.txt", "ünïcode/é.txt", "A.txt"):
        (path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "data" / name).write_text(name * 1000, encoding="utf-8")
    (path / "data" / "manifest.json").write_text(
        '{"format_version": 1, "datasets": {}, "pretrained": {}}\n', encoding="utf-8"
    )
    dvc("init", "--no-scm", "--quiet", cwd=path)
    dvc("add", "--quiet", "data", cwd=path)
    return path


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_our_md5_is_the_one_of_dvc(repository: Path) -> None:
    out = read_dvc_file(repository / "data.dvc")
    assert out.md5 == hash_folder(repository / "data") == open_folder(repository / "data").md5
    assert out.nfiles == 7
    assert out.size == sum(path.stat().st_size for path in (repository / "data").rglob("*") if path.is_file())


def test_a_folder_that_dvc_pushed_to_is_read(repository: Path, tmp_path: Path) -> None:
    dvc("remote", "add", "--quiet", "--default", "--force", "folder", str(tmp_path / "remote"), cwd=repository)
    dvc("push", "--quiet", cwd=repository)
    md5 = read_dvc_file(repository / "data.dvc").md5
    remote = read_default_remote(repository)
    assert remote == str(tmp_path / "remote")
    snapshot = open_snapshot(md5=md5, remote=remote, cache_dir=tmp_path / "cache")
    for dataset in snapshot.manifest.datasets:
        snapshot.shards(dataset)
    assert hash_folder(snapshot.path) == md5


def test_a_bucket_that_dvc_pushed_to_is_read(
    repository: Path, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="snapshots")
    dvc("remote", "add", "--quiet", "--default", "--force", "s3", "s3://snapshots/team/data", cwd=repository)
    dvc("remote", "modify", "--quiet", "s3", "endpointurl", endpoint, cwd=repository)
    dvc("push", "--quiet", cwd=repository)
    md5 = read_dvc_file(repository / "data.dvc").md5
    snapshot = open_snapshot(md5=md5, remote=read_default_remote(repository), cache_dir=tmp_path / "cache")
    for dataset in snapshot.manifest.datasets:
        snapshot.shards(dataset)
    assert hash_folder(snapshot.path) == md5
    assert (snapshot.path / "ünïcode" / "é.txt").is_file()


def test_the_checkout_names_a_remote_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert read_default_remote(Path()) == "infra/dvc-remote"
