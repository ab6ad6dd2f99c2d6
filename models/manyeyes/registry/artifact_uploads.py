"""Uploads to MLflow's artifact store that outlast a store that fails now and then."""

from __future__ import annotations

import logging
import time

from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from manyeyes.registry.mlflow_errors import LONGEST_WAIT_S, may_pass

_PARTS = "Failed to upload at least one part"


class PatientArtifacts(MlflowArtifactsRepository):  # type: ignore[misc]
    """MLflow's own, which asks for each part of a large file once; here the file is sent again.

    Everything else MLflow repeats itself.
    """

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Keep a file.

        Args:
            local_file: The file.
            artifact_path: Folder for it, below the repository's.

        Raises:
            MlflowException: The store refuses, or fails as often as MLflow asks for anything
                (``MLFLOW_HTTP_REQUEST_MAX_RETRIES``).
        """
        attempt = 0
        while True:
            try:
                super().log_artifact(local_file, artifact_path)
                return
            except MlflowException as error:
                text = str(error)
                if _PARTS not in text or not may_pass(text) or attempt >= MLFLOW_HTTP_REQUEST_MAX_RETRIES.get():
                    raise
            time.sleep(min(2.0**attempt, LONGEST_WAIT_S))
            attempt += 1


def use_patient_artifacts() -> None:
    """Make MLflow send files to ``mlflow-artifacts:`` with ``PatientArtifacts``, in this process."""
    _artifact_repository_registry.register("mlflow-artifacts", PatientArtifacts)
    # Its warnings show the signed addresses of the parts; what is raised in the end is told without them.
    logging.getLogger("mlflow.store.artifact.http_artifact_repo").setLevel(logging.ERROR)
