"""A fresh clone has data without any network: the default remote is in the repository."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DVC = Path(sys.executable).with_name("dvc")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: apt-get install git"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing to clone"),
    pytest.mark.skipif(not DVC.exists(), reason="dvc is not installed: pip install 'manyeyes[dvc]'"),
]


def test_dvc_pull_brings_every_file_of_the_snapshot(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    unreachable = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **unreachable, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    done = subprocess.run([str(DVC), "pull"], check=False, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((clone / "data" / "manifest.json").read_text(encoding="utf-8"))
    shards = [shard for dataset in manifest["datasets"].values() for shard in dataset["shards"]]
    assert len(manifest["datasets"]) >= 3
    for shard in shards:
        assert hashlib.sha256((clone / "data" / shard["path"]).read_bytes()).hexdigest() == shard["sha256"]


def test_the_remote_in_the_repository_stays_small() -> None:
    files = [path for path in (ROOT / "infra" / "dvc-remote").rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    assert files
    assert max(sizes) < 5_000_000
    assert sum(sizes) < 10_000_000
