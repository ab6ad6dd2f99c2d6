"""Uploads to MLflow's artifact store that outlast a store that fails now and then."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import requests  # type: ignore[import-untyped]
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from manyeyes.registry.mlflow_errors import LONGEST_WAIT_S, asked_once, may_pass

_PARTS = "Failed to upload at least one part"


class _NotCompletedError(MlflowException):  # type: ignore[misc]
    """All parts were sent, and whether they became a file is not known."""


class PatientArtifacts(MlflowArtifactsRepository):  # type: ignore[misc]
    """MLflow's own, which asks for each part of a large file once; here the file is sent again.

    MLflow repeats the end of such an upload, although a store no longer knows one that it has completed or aborted:
    after a lost answer every attempt fails. So that too is asked once, and then the file is sent again. Everything else
    MLflow repeats itself.
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
                sent_again = isinstance(error, _NotCompletedError) or _PARTS in text
                if not sent_again or not may_pass(text) or attempt >= MLFLOW_HTTP_REQUEST_MAX_RETRIES.get():
                    raise
            time.sleep(min(2.0**attempt, LONGEST_WAIT_S))
            attempt += 1

    def complete_multipart_upload(self, *arguments: Any, **others: Any) -> None:
        """Make a file of its parts; arguments are MLflow's.

        Raises:
            MlflowException: The store did not say that it has done so.
        """
        try:
            with asked_once():
                super().complete_multipart_upload(*arguments, **others)
        except (MlflowException, requests.RequestException) as error:
            raise _NotCompletedError(str(error)) from error

    def abort_multipart_upload(self, *arguments: Any, **others: Any) -> None:
        """Let the store forget the parts of a file; arguments are MLflow's.

        A store that does not answer keeps them; why the file failed counts, and is raised by who asks this.
        """
        with suppress(MlflowException, requests.RequestException), asked_once():
            super().abort_multipart_upload(*arguments, **others)


def use_patient_artifacts() -> None:
    """Make MLflow send files to ``mlflow-artifacts:`` with ``PatientArtifacts``, in this process."""
    _artifact_repository_registry.register("mlflow-artifacts", PatientArtifacts)
    # Its warnings show the signed addresses of the parts; what is raised in the end is told without them.
    logging.getLogger("mlflow.store.artifact.http_artifact_repo").setLevel(logging.ERROR)
