from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import http_artifact_repo
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from manyeyes.errors import RegistryUnreachableError
from manyeyes.registry import artifact_uploads
from manyeyes.registry.artifact_uploads import use_patient_artifacts
from manyeyes.registry.mlflow_errors import registry_errors

PART = "http://s3/bucket/model.onnx?partNumber=2&X-Amz-Credential=key&X-Amz-Signature=b997"
BUSY = f"Failed to upload at least one part of model.onnx. Errors: {{2: 'HTTPError(500 Server Error for url: {PART})'}}"


class Store:
    """Raises what it is given, one a call, then takes the file."""

    def __init__(self, *failures: str) -> None:
        self.failures = list(failures)
        self.calls: list[tuple[str, str | None]] = []

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        self.calls.append((local_file, artifact_path))
        if self.failures:
            raise MlflowException(self.failures.pop(0))


def send(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Send a file through MLflow to ``store``; how long it waited between attempts."""
    waits: list[float] = []
    monkeypatch.setattr(artifact_uploads.time, "sleep", waits.append)
    monkeypatch.setattr(
        MlflowArtifactsRepository, "log_artifact", lambda _, file, path=None: store.log_artifact(file, path)
    )
    use_patient_artifacts()
    uri = "mlflow-artifacts://localhost:5000/1/models"
    get_artifact_repository(uri, tracking_uri="http://localhost:5000").log_artifact("model.onnx", "bundle")
    return waits


def test_a_file_of_which_a_part_failed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(BUSY, BUSY)
    assert send(store, monkeypatch) == [1.0, 2.0]
    assert store.calls == [("model.onnx", "bundle")] * 3


def test_a_store_that_always_fails_is_told_without_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    store = Store(*[BUSY] * 9)
    with pytest.raises(RegistryUnreachableError, match="artifact store fails") as caught, registry_errors():
        send(store, monkeypatch)
    assert len(store.calls) == 4
    assert "X-Amz" not in str(caught.value)
    assert "b997" not in str(caught.value)


@pytest.mark.parametrize(
    "failure",
    [BUSY.replace("500 Server Error", "403 Client Error"), "API request failed with exception Max retries exceeded"],
    ids=["refused", "asked again by MLflow itself"],
)
def test_other_failures_are_raised_at_once(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(failure)
    with pytest.raises(MlflowException):
        send(store, monkeypatch)
    assert len(store.calls) == 1


def answer(status: int, content: str = "{}") -> requests.Response:
    response = requests.Response()
    response.status_code, response.url, response._content = status, "http://localhost:5000", content.encode()
    return response


class Multipart:
    """A server that hands out addresses for parts, and a store that loses answers at the end of an upload.

    Args:
        lost: Uploads that become a file, but whose answer is lost; asked again, the store knows no such upload.
        broken: Uploads of which a part is refused.
    """

    def __init__(self, *, lost: int = 0, broken: int = 0) -> None:
        self.lost, self.broken = lost, broken
        self.calls: Counter[str] = Counter()

    def request(self, _: Any, endpoint: str, __: str, json: dict[str, Any]) -> requests.Response:
        kind = endpoint.split("/mpu/")[1].split("/")[0]
        self.calls[kind] += 1
        if kind == "create":
            part = '{"url": "http://s3/part", "part_number": 1, "headers": {}}'
            return answer(200, f'{{"upload_id": "{self.calls[kind]}", "credentials": [{part}]}}')
        if kind == "complete" and int(json["upload_id"]) > self.lost:
            return answer(200)
        raise MlflowException(f"API request to {endpoint} failed with exception too many 500 error responses")

    def put(self, *_: Any, **__: Any) -> requests.Response:
        self.calls["put"] += 1
        return answer(500 if self.calls["put"] <= self.broken else 200)


def send_parts(store: Multipart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ENABLE_PROXY_MULTIPART_UPLOAD", "MULTIPART_UPLOAD_MINIMUM_FILE_SIZE"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")
    monkeypatch.setattr(artifact_uploads.time, "sleep", lambda _: None)
    monkeypatch.setattr(http_artifact_repo, "http_request", store.request)
    monkeypatch.setattr(requests, "put", store.put)
    (tmp_path / "model.onnx").write_bytes(b"weights")
    use_patient_artifacts()
    uri = "mlflow-artifacts://localhost:5000/1/models"
    get_artifact_repository(uri, tracking_uri="http://localhost:5000").log_artifact(str(tmp_path / "model.onnx"), "b")


def test_an_upload_whose_end_is_not_known_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Multipart(lost=2)
    send_parts(store, monkeypatch, tmp_path)
    assert store.calls == {"create": 3, "put": 3, "complete": 3, "abort": 2}


def test_a_refused_part_counts_and_not_that_the_store_does_not_forget_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = Multipart(broken=1)
    send_parts(store, monkeypatch, tmp_path)
    assert store.calls == {"create": 2, "put": 2, "complete": 1, "abort": 1}
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(MlflowException, match="at least one part"):
        send_parts(Multipart(broken=9), monkeypatch, tmp_path)
