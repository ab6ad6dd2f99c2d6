"""What is kept with a version, and where in the MLflow model it lies."""

from __future__ import annotations

from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from manyeyes.errors import RegistryError, RegistryUnreachableError
from manyeyes.registry.tracking import Tracking, registry_errors

SCORECARD = "scorecard.json"
BUNDLE_SCORECARD = "bundle-scorecard.json"
ITEMS = "items.parquet"
GATE = "gate.json"
BUNDLE_PATH = "artifacts/bundle"
EVIDENCE_PATH = "artifacts/evidence"


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
    try:
        with registry_errors():
            return Path(
                mlflow.artifacts.download_artifacts(
                    uri, dst_path=str(destination), tracking_uri=tracking.uri, registry_uri=tracking.uri
                )
            )
    except (OSError, RegistryError) as error:
        if isinstance(error, RegistryUnreachableError):
            raise
        raise RegistryError(
            f"{path} of {version.name}/{version.version} cannot be fetched ({error.__cause__ or error})",
            "the files that were registered with it",
            "Check that the artifact store answers and still has them.",
        ) from error
