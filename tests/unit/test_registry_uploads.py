from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
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
