"""Models that the pipeline ``evaluate`` is given by S3 address or registered name: pinned first, then fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import BundleError, CheckpointError, RegistryError
from manyeyes.harness.base import Reporter, StepResult
from manyeyes.registry.pull import ModelLocation, locate_model
from manyeyes.registry.signing import CARD, SBOM
from manyeyes.registry.versions import promote
from manyeyes.steps.fetch_model import fetch_model
from manyeyes.steps.plan_evaluation import plan_evaluation
from tests.evaluation_fakes import make_recipe, make_snapshot
from tests.pipelines.checkout import push
from tests.registry_store import IMAGES, make_bundle, make_candidate, put, store_uri

PLACE = "s3://models/some/prefix"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        yield client
        client.close()
    server.stop()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def upload(bucket: Any, bundle: Path) -> None:
    """Put a bundle where ``PLACE`` is, in place of what is there."""
    for item in bucket.list_objects_v2(Bucket="models").get("Contents", []):
        bucket.delete_object(Bucket="models", Key=item["Key"])
    for file in bundle.rglob("*.*"):
        bucket.put_object(Bucket="models", Key=f"some/prefix/{file.relative_to(bundle)}", Body=file.read_bytes())


def fetch(location: ModelLocation, out: Path) -> StepResult:
    return fetch_model(
        Reporter("fetch"), kind=location.kind, model=location.place, model_digest=location.digest, fetched=out
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def test_bundle_on_s3_is_found_and_every_file_fetched(bucket: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "one", decoder_bytes=3 << 20)
    upload(bucket, bundle)
    found = locate_model(f"{PLACE}/")
    assert found == ModelLocation(
        "bundle", PLACE, json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["digest"]
    )
    result = fetch(found, tmp_path / "fetched")
    assert contents(tmp_path / "fetched") == contents(bundle)
    assert result.metrics["bytes"] == sum(len(data) for data in contents(bundle).values())
    assert PLACE in result.markdown


def test_bundle_on_s3_that_changed_after_it_was_found_is_refused(bucket: Any, tmp_path: Path) -> None:
    upload(bucket, make_bundle(tmp_path / "one", "one"))
    found = locate_model(PLACE)
    upload(bucket, make_bundle(tmp_path / "two", "two"))
    with pytest.raises(BundleError, match="when this run began"):
        fetch(found, tmp_path / "fetched")


def test_damaged_bundle_on_s3_is_refused(bucket: Any, tmp_path: Path) -> None:
    upload(bucket, make_bundle(tmp_path / "one", "one"))
    found = locate_model(PLACE)
    bucket.put_object(Bucket="models", Key="some/prefix/onnx/decoder_model_merged.onnx", Body=b"half")
    with pytest.raises(BundleError, match=r"decoder_model_merged\.onnx"):
        fetch(found, tmp_path / "damaged")
    bucket.delete_object(Bucket="models", Key="some/prefix/onnx/decoder_model_merged.onnx")
    with pytest.raises(CheckpointError, match=r"decoder_model_merged\.onnx"):
        fetch(found, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(("place", "said"), [("s3://models/nowhere", "neither"), ("s3://no-such-bucket/x", "bucket")])
def test_nothing_at_an_s3_address_is_said_so(place: str, said: str, bucket: Any) -> None:
    assert bucket is not None
    with pytest.raises(CheckpointError, match=said):
        locate_model(place)


def plan(model: str, snapshot: Snapshot, remote: Path) -> Mapping[str, Any]:
    """What the step before hands to ``fetch_model``."""
    return plan_evaluation(
        Reporter("plan"),
        evaluate_model=model,
        evaluate_benchmarks="easy-vqa",
        recipe=make_recipe().canonical_json(),
        data_md5=push(snapshot.path, remote),
        data_remote=str(remote),
    ).values


def test_registered_model_is_pinned_to_a_version_and_fetched(snapshot: Snapshot, tmp_path: Path) -> None:
    name = "fetched-by-name"
    first = make_candidate(tmp_path / "first", snapshot)
    put(name, first)  # passed its gate, and is the first: the champion
    planned = plan(name, snapshot, tmp_path / "remote")
    assert planned["model"] == f"models:/{name}/1"
    assert (planned["kind"], planned["model_digest"]) == ("bundle", first.digest)

    # The champion may be another one by the time that the model is fetched: the run stays with what it pinned.
    second = make_candidate(tmp_path / "second", snapshot, floor=101)  # the gate fails it, a person promotes it
    promote(name, put(name, second).version, force=True)
    pinned = ModelLocation(planned["kind"], planned["model"], planned["model_digest"])
    fetch(pinned, tmp_path / "fetched")
    fetched = contents(tmp_path / "fetched")
    assert {name: fetched.pop(name)[:3] for name in (CARD, SBOM)} == {CARD: b"---", SBOM: b"{\n "}
    assert fetched == contents(first.bundle)
    assert locate_model(f"{name}@champion") == ModelLocation("bundle", f"models:/{name}/2", second.digest)
    assert locate_model(f"{name}/1") == pinned


def test_registered_model_of_another_digest_or_none_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    name = "fetched-and-refused"
    put(name, make_candidate(tmp_path / "first", snapshot, floor=101))
    with pytest.raises(BundleError, match="when this run began"):
        fetch(ModelLocation("bundle", f"models:/{name}/1", "0" * 64), tmp_path / "other")
    with pytest.raises(RegistryError, match=name):
        fetch(ModelLocation("bundle", f"models:/{name}/7", "0" * 64), tmp_path / "gone")
    with pytest.raises(RegistryError, match="champion"):
        locate_model(name)
