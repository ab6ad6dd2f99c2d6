"""Whether MLflow takes what a run will write: a run, an artifact and a registered model, each really written."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from manyeyes.errors import RegistryError
from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.tracking import StepRun

_FILE = "preflight-probe.txt"


def probe(run: StepRun) -> list[str]:
    """Write into the run, the artifact store and the registry, and remove it again.

    Args:
        run: A run that was just made: tracking answers and takes runs.

    Returns:
        What could not be removed again, in words; empty when nothing is left.

    Raises:
        RegistryError: MLflow refuses one of them, or hands back other bytes.
        RegistryUnreachableError: It does not answer any more.
    """
    client, left = run.tracking.client, []
    run.log_metrics({"preflight": 1.0})
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILE
        path.write_text(mark, encoding="utf-8")
        run.log_artifact(path)
        with registry_errors():
            place = client.get_run(run.run_id).info.artifact_uri
            repository = get_artifact_repository(place)
            found = Path(repository.download_artifacts(_FILE, dst_path=folder)).read_text(encoding="utf-8")
    if found != mark:
        raise RegistryError(f"{place} hands back other bytes than it was given", "an artifact store", "Check it.")
    try:
        repository.delete_artifacts(_FILE)
    except (MlflowException, NotImplementedError, OSError) as error:
        left.append(f"{place}/{_FILE} ({type(error).__name__})")
    name = f"manyeyes-preflight-{mark}"
    with registry_errors():
        client.create_registered_model(name)
    try:
        client.delete_registered_model(name)
    except MlflowException as error:
        left.append(f"registered model {name} ({error.error_code})")
    return left
