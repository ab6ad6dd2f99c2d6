"""What is kept with a version, and where in the MLflow model it lies."""

from __future__ import annotations

import time
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from manyeyes.errors import RegistryError, RegistryUnreachableError
from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.tracking import Tracking

SCORECARD = "scorecard.json"
BUNDLE_SCORECARD = "bundle-scorecard.json"
ITEMS = "items.parquet"
GATE = "gate.json"
BUNDLE_PATH = "artifacts/bundle"
EVIDENCE_PATH = "artifacts/evidence"

_ATTEMPTS = 4


def download(tracking: Tracking, version: ModelVersion, path: str, destination: Path) -> Path:
    """Fetch a file or folder of a version's MLflow model.

    Args:
        tracking: The registry.
        version: Whose model.
        path: Inside the model, with forward slashes.
        destination: Folder to put it into.

    Returns:
        Where it is now.

    Raises:
        RegistryError: The registry knows the version, but its files are gone.
        RegistryUnreachableError: The registry or its storage does not answer.
    """
    uri = f"models:/{version.name}/{version.version}/{path}"
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with registry_errors():
                return Path(
                    mlflow.artifacts.download_artifacts(
                        uri, dst_path=str(destination), tracking_uri=tracking.uri, registry_uri=tracking.uri
                    )
                )
        except RegistryUnreachableError:
            # MLflow repeats a request, but not a download that breaks off.
            if attempt == _ATTEMPTS:
                raise
            time.sleep(2**attempt)
        except (OSError, RegistryError) as error:
            raise RegistryError(
                f"{path} of {version.name}/{version.version} cannot be fetched ({error.__cause__ or error})",
                "the files that were registered with it",
                "Check that the artifact store answers and still has them.",
            ) from error
    raise AssertionError("unreachable: the last attempt returns or raises")
