"""MLflow runs: one parent run a pipeline run, one child run a step.

The store is SQLite in ``runs/mlflow.db`` with artifacts in ``runs/mlartifacts``, or whatever ``MLFLOW_TRACKING_URI``
names: an MLflow server, PostgreSQL, another SQLite file. Kubeflow injects ``MLFLOW_RUN_ID`` into a step; the step then
joins that run and leaves its life to Kubeflow.

Reading makes nothing: no database, no experiment, no folder. Only what starts a run makes what is missing.

``probe`` finds out whether MLflow takes what a run will write: a run, an artifact and a registered model.

What the steps of one pipeline run left there is read for the run's summary.
"""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import mlflow
import mlflow.exceptions
import sqlalchemy
from mlflow.entities import Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel

from manyeyes.errors import RegistryError, StorageError
from manyeyes.registry.artifact_uploads import use_patient_artifacts
from manyeyes.registry.mlflow_errors import (
    REQUEST,
    asked_once,
    create_once,
    registry_errors,
    unreachable,
    without_password,
)
from manyeyes.storage import file_lock, is_there, wait_for_release

EXPERIMENT = "manyeyes"
PROBE_TIMEOUT_S = 5
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow takes at most 1000 metrics and 100 parameters a call, and 6000 characters a parameter.
_METRICS_A_CALL = 1000
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class Tracking:
    """A tracking store that answers.

    Attributes:
        uri: Of the store.
        experiment_id: Where runs go; empty when neither ``connect(create=True)`` nor the environment said it.
        client: MLflow's own.
    """

    uri: str
    experiment_id: str
    client: mlflow.MlflowClient


class StepRun:
    """The MLflow run of one step; made by ``step_run``.

    Attributes:
        run_id: Of the run.
        tracking: Its store.
    """

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.tracking = tracking
        self.run_id = run_id

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Record figures.

        Args:
            metrics: By name.
            step: Optimizer step that they belong to; figures of a whole step of the pipeline leave it out.

        Raises:
            RegistryUnreachableError: The store does not answer any more.
        """
        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        with registry_errors():
            for start in range(0, len(entries), _METRICS_A_CALL):
                self.tracking.client.log_batch(self.run_id, metrics=entries[start : start + _METRICS_A_CALL])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags.

        Raises:
            RegistryUnreachableError: The store does not answer any more.
        """
        with registry_errors():
            self.tracking.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_artifact(self, path: Path, *, folder: str | None = None) -> None:
        """Keep a file, or a folder with all that is in it.

        Args:
            path: The file or folder.
            folder: Where it goes in the run's artifacts.

        Raises:
            RegistryUnreachableError: The store does not answer any more.
        """
        with registry_errors():
            if path.is_dir():
                self.tracking.client.log_artifacts(self.run_id, str(path), folder)
            else:
                self.tracking.client.log_artifact(self.run_id, str(path), folder)


def default_tracking_uri(directory: Path | None = None) -> str:
    """``MLFLOW_TRACKING_URI``, or SQLite in ``runs/mlflow.db``.

    Args:
        directory: Has ``runs``; the working directory when left out.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{(directory or Path.cwd()).absolute()}/runs/mlflow.db"


def connect(*, create: bool = False) -> Tracking:
    """Check that the tracking store answers.

    Args:
        create: Make the database and the experiment where there are none, for a run; a store that is only read, or
            whose aliases move, must be there.

    Raises:
        RegistryUnreachableError: It does not answer within seconds.
        RegistryError: The URI is of no kind that has a registry, there is no registry, or the experiment was deleted.
    """
    tracking = _connect(default_tracking_uri(), os.environ.get("MLFLOW_EXPERIMENT_ID", ""), create)
    mlflow.set_tracking_uri(tracking.uri)
    return tracking


def find_experiment(tracking: Tracking) -> str | None:
    """Id of the experiment that runs go to; ``None`` when no run has made it.

    Raises:
        RegistryError: It was deleted, or MLflow refuses.
        RegistryUnreachableError: The store does not answer.
    """
    if tracking.experiment_id:
        return tracking.experiment_id
    name = _experiment_name()
    with registry_errors():
        found = tracking.client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage == "deleted":
        raise RegistryError(
            f'experiment "{name}" was deleted',
            "one that takes runs",
            f"Restore it: mlflow experiments restore --experiment-id {found.experiment_id}",
        )
    return str(found.experiment_id)


def start_parent_run(run_name: str, *, tags: Mapping[str, str] | None = None) -> str:
    """Start the run that the steps' runs are children of.

    Args:
        run_name: For people.
        tags: For instance the recipe and its digest.

    Returns:
        The run's id; hand it to the steps as ``MANYEYES_PARENT_RUN_ID``.

    Raises:
        RegistryUnreachableError: The store does not answer.
    """
    return _create_run(connect(create=True), run_name, dict(tags or {}))


def end_parent_run(status: RunStatus, *, run_id: str | None = None) -> None:
    """End the run that ``start_parent_run`` started.

    Args:
        status: How it went.
        run_id: Of the run; ``MANYEYES_PARENT_RUN_ID`` when left out.

    Raises:
        RegistryError: There is no such run.
        RegistryUnreachableError: The store does not answer.
    """
    run_id = run_id or os.environ.get("MANYEYES_PARENT_RUN_ID")
    if not run_id:
        raise RegistryError("no parent run", "run_id or MANYEYES_PARENT_RUN_ID", "Start one with start_parent_run.")
    with registry_errors():
        connect().client.set_terminated(run_id, status)


@contextmanager
def step_run(name: str, *, tags: Mapping[str, str] | None = None) -> Iterator[StepRun]:
    """The MLflow run of one step.

    Joins ``MLFLOW_RUN_ID`` where Kubeflow injected it; else a child of ``MANYEYES_PARENT_RUN_ID``; else a run of its
    own. A run that is joined is given the step's name, and is not ended here.

    Args:
        name: Of the step.
        tags: Set on the run.

    Raises:
        RegistryUnreachableError: The store does not answer.
    """
    tracking = connect(create=True)
    joined = os.environ.get("MLFLOW_RUN_ID")
    if joined:
        run = StepRun(tracking, joined)
        # Kubeflow calls the runs of a loop's items the same.
        run.set_tags({STEP_TAG: name, "mlflow.runName": name, **(tags or {})})
        yield run
        return
    marks = {STEP_TAG: name, **(tags or {})}
    parent = os.environ.get("MANYEYES_PARENT_RUN_ID")
    if parent:
        marks["mlflow.parentRunId"] = parent
    run = StepRun(tracking, _create_run(tracking, name, marks))
    status: RunStatus = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with registry_errors():
            tracking.client.set_terminated(run.run_id, status)


@cache
def _connect(uri: str, experiment_id: str, create: bool) -> Tracking:
    scheme = uri.partition(":")[0].partition("+")[0]
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    use_patient_artifacts()
    if scheme == "sqlite":
        database = _database(uri)
        with _initialising(database) if create else _initialised(database):
            return _open(uri, experiment_id, create=create)
    if scheme in _PORTS:
        _probe_database(uri, scheme)
        if not create:
            _check_tables(uri)
    elif scheme not in ("http", "https", "databricks"):
        raise RegistryError(
            without_password(f'MLFLOW_TRACKING_URI is "{uri}"'),
            "sqlite:///FILE, http(s)://SERVER or a database: a folder has no registry",
            "Unset it to use runs/mlflow.db.",
        )
    return _open(uri, experiment_id, create=create)


def _database(uri: str) -> Path:
    return Path(uri.partition(":///")[2].partition("?")[0]).absolute()


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files; ``None`` where the server says it.

    Args:
        uri: Of the store.
    """
    return (_database(uri).parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None


def _open(uri: str, experiment_id: str, *, create: bool) -> Tracking:
    mlflow.set_tracking_uri(uri)
    with registry_errors():
        client = mlflow.MlflowClient(uri)
        with asked_once(timeout_s=PROBE_TIMEOUT_S):
            client.search_experiments(max_results=1)
        tracking = Tracking(uri, experiment_id, client)
        return replace(tracking, experiment_id=_make_experiment(tracking)) if create else tracking


def _make_experiment(tracking: Tracking) -> str:
    found = find_experiment(tracking)
    if found is not None:
        return found
    try:
        return str(
            tracking.client.create_experiment(_experiment_name(), artifact_location=artifact_location(tracking.uri))
        )
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    return str(find_experiment(tracking))  # another process made it just now


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _create_run(tracking: Tracking, run_name: str, tags: dict[str, str]) -> str:
    marks = tags | {REQUEST: uuid.uuid4().hex}

    def create() -> str:
        run = tracking.client.create_run(tracking.experiment_id, tags=marks, run_name=run_name)
        return str(run.info.run_id)

    def find() -> str | None:
        with registry_errors():
            runs = tracking.client.search_runs([tracking.experiment_id], f"tags.`{REQUEST}` = '{marks[REQUEST]}'")
        return str(runs[0].info.run_id) if runs else None

    return create_once(create, find=find)


@contextmanager
def _initialising(database: Path) -> Iterator[None]:
    """One process at a time: two that create the tables at once fail each other."""
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(database.parent / f".{database.name}.lock"))
        except (OSError, StorageError) as error:
            raise unreachable(f"sqlite:///{database}", str(error.__cause__ or error)) from error
        if database.exists():
            _probe_sqlite(database)
        yield


@contextmanager
def _initialised(database: Path) -> Iterator[None]:
    """A database that is there, once nobody creates its tables any more."""
    if not is_there(database):
        raise _no_registry(f"sqlite:///{database}", "no such file")
    lock = database.parent / f".{database.name}.lock"
    if lock.exists():
        wait_for_release(lock)
    _probe_sqlite(database)
    _check_tables(f"sqlite:///{database}")
    yield


def _check_tables(uri: str) -> None:
    """That MLflow finds all its tables: opening a database, it makes those that are missing."""
    engine = sqlalchemy.create_engine(uri)
    try:
        with registry_errors():
            tables = set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()
    if SqlRegisteredModel.__tablename__ not in tables:
        raise _no_registry(uri, "MLflow has no tables there")
    if not set(Base.metadata.tables) <= tables:
        raise RegistryError(
            without_password(f"{uri} was made by an older MLflow than {mlflow.__version__}"),
            "the tables of this one, which reading does not add",
            without_password(f"Keep a copy of the database, then run: mlflow db upgrade {uri}"),
        )


def _no_registry(uri: str, why: str) -> RegistryError:
    return RegistryError(
        without_password(f"there is no registry at {uri} ({why})"),
        "one that is there: reading makes none",
        "Set MLFLOW_TRACKING_URI, or make one with: manyeyes run",
    )


def _probe_sqlite(database: Path) -> None:
    # MLflow would try a broken file ten times, over minutes.
    try:
        connection = sqlite3.connect(database, timeout=PROBE_TIMEOUT_S)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise unreachable(f"sqlite:///{database}", str(error)) from error


def _probe_database(uri: str, scheme: str) -> None:
    # MLflow tries ten times, over minutes; here it is enough to know that somebody listens.
    url = sqlalchemy.engine.make_url(uri)
    try:
        socket.create_connection((url.host or "localhost", url.port or _PORTS[scheme]), PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise unreachable(uri, str(error)) from error


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


STEP_TAG, PIPELINE_RUN_TAG = "manyeyes.step", "manyeyes.pipeline_run"
_PARENT = "mlflow.parentRunId"
_STATES: dict[str, Literal["finished", "failed", "stopped", "running"]] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped",
}
# Steps of one run; a search trains many candidates.
_MOST = 1000


@dataclass(frozen=True)
class StepRecord:
    """One step's MLflow run.

    Attributes:
        step: Step name, with its encoder or model in brackets where it has one.
        state: How it went.
        seconds: From its start to its end; None while it runs.
        tags: What it left: figure, error, digests.
        url: Of its page; empty where the store is a file.
    """

    step: str
    state: Literal["finished", "failed", "stopped", "running"]
    seconds: float | None
    tags: Mapping[str, str]
    url: str


def step_records() -> list[StepRecord]:
    """The steps that ran in this pipeline run, in the order in which they began; those from the cache did not run.

    A run's steps are the children of ``MANYEYES_PARENT_RUN_ID`` (``manyeyes run``), or those that carry the same
    ``MANYEYES_PIPELINE_RUN`` (set in a pod), or what lies below the parent of ``MLFLOW_RUN_ID``: Kubeflow's own
    integration gives groups and loops a run of their own, whose children their steps are.

    Raises:
        RegistryError: MLflow refuses.
        RegistryUnreachableError: It does not answer.
    """
    tracking = connect()
    experiment = find_experiment(tracking)
    if experiment is None:
        return []
    with registry_errors():
        runs = _runs_of_pipeline(tracking, experiment)
    own = os.environ.get("MLFLOW_RUN_ID")
    records = []
    for run in sorted(runs, key=lambda run: run.info.start_time):
        tags = dict(run.data.tags)
        if STEP_TAG not in tags or run.info.run_id == own:
            continue
        ended = run.info.end_time
        # A run that Kubeflow made is ended by it, some time after its step.
        state = _STATES.get(run.info.status, _state(tags))
        records.append(
            StepRecord(
                step=tags[STEP_TAG],
                state=state,
                seconds=(ended - run.info.start_time) / 1000 if ended else None,
                tags=tags,
                url=run_url(tracking, run.info.experiment_id, run.info.run_id),
            )
        )
    return records


def _state(tags: Mapping[str, str]) -> Literal["finished", "failed", "running"]:
    if "manyeyes.figure" in tags:
        return "finished"
    return "failed" if "manyeyes.error" in tags else "running"


def _runs_of_pipeline(tracking: Tracking, experiment: str) -> list[Run]:
    def search(tag: str, value: str) -> list[Run]:
        return list(tracking.client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=_MOST))

    parent = os.environ.get("MANYEYES_PARENT_RUN_ID")
    if parent:
        return search(_PARENT, parent)
    pipeline_run = os.environ.get("MANYEYES_PIPELINE_RUN")
    if pipeline_run:
        return search(PIPELINE_RUN_TAG, pipeline_run)
    own = os.environ.get("MLFLOW_RUN_ID")
    parent = tracking.client.get_run(own).data.tags.get(_PARENT) if own else None
    found: list[Run] = []
    parents = [parent] if parent else []
    while parents:
        children = search(_PARENT, parents.pop())
        found += children
        parents += [str(run.info.run_id) for run in children if STEP_TAG not in run.data.tags]
    return found


def run_url(tracking: Tracking, experiment_id: str, run_id: str) -> str:
    """Page of a run, where people can open it.

    ``MANYEYES_MLFLOW_URL`` is the server's address as a browser knows it; the tracking URI when it is not set.
    """
    base = _browser_url(tracking)
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}" if base else ""


def version_url(name: str, version: str) -> str:
    """Page of a registered version; empty where the store is a file.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
    """
    base = _browser_url(connect())
    return f"{base}/#/models/{name}/versions/{version}" if base else ""


def _browser_url(tracking: Tracking) -> str:
    given = os.environ.get("MANYEYES_MLFLOW_URL", "")
    from_uri = tracking.uri if tracking.uri.startswith(("http://", "https://")) else ""
    scheme, _, rest = (given or from_uri).partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].rstrip('/')}" if rest else ""
