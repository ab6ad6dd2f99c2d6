from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from manyeyes.errors import RegistryError, RegistryUnreachableError
from manyeyes.registry import tracking
from manyeyes.registry.tracking import connect, default_tracking_uri, end_parent_run, start_parent_run, step_run
from tests.ports import free_port
from tests.registry_store import store_uri

ENVIRONMENT = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MANYEYES_PARENT_RUN_ID")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_uri(tmp_path_factory)


@pytest.fixture(autouse=True)
def environment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def status(run_id: str) -> str:
    return str(connect().client.get_run(run_id).info.status)


def test_steps_are_children_of_the_parent_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parent = start_parent_run("train tiny", tags={"recipe": "tiny"})
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", parent)
    (tmp_path / "report.md").write_text("good", encoding="utf-8")
    with step_run("sft", tags={"stage": "sft"}) as run:
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_metrics({"loss": 1.0}, step=2)
        run.log_metrics({f"metric {number}": number for number in range(1200)})
        run.log_artifact(tmp_path / "report.md", folder="reports")
        run.log_artifact(tmp_path, folder="all")
        assert status(run.run_id) == "RUNNING"
    end_parent_run("FINISHED")
    client = connect().client
    child = client.get_run(run.run_id)
    assert child.info.run_name == "sft"
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.data.tags["stage"] == "sft"
    assert [metric.value for metric in client.get_metric_history(run.run_id, "loss")] == [2.0, 1.0]
    assert child.data.metrics["metric 1199"] == 1199
    assert [file.path for file in client.list_artifacts(run.run_id, "reports")] == ["reports/report.md"]
    assert [file.path for file in client.list_artifacts(run.run_id, "all")] == ["all/report.md"]
    assert status(parent) == "FINISHED"
    assert client.get_run(parent).data.tags["recipe"] == "tiny"


@pytest.mark.parametrize(("error", "expected"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_step_that_fails_says_so(error: type[BaseException], expected: str) -> None:
    with pytest.raises(error), step_run("sft") as run:
        raise error
    assert status(run.run_id) == expected
    assert "mlflow.parentRunId" not in connect().client.get_run(run.run_id).data.tags


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_joins_the_run_that_the_cluster_made_and_does_not_end_it(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected = start_parent_run("made by Kubeflow")
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", "ignored")
    try:
        with step_run("evaluate") as run:
            run.log_metrics({"score": 99})
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert run.run_id == injected
    assert status(injected) == "RUNNING"
    found = connect().client.get_run(injected)
    assert found.data.metrics == {"score": 99}
    # Two items of a loop are told apart.
    assert found.info.run_name == "evaluate"


def test_ending_no_run_is_refused() -> None:
    with pytest.raises(RegistryError, match="MANYEYES_PARENT_RUN_ID"):
        end_parent_run("FINISHED")


def test_the_default_store_is_below_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert default_tracking_uri(Path("/somewhere")) == "sqlite:////somewhere/runs/mlflow.db"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_is_not_there_is_reported_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://user:secret@127.0.0.1:{free_port()}/mlflow")
    started = time.monotonic()
    with pytest.raises(RegistryUnreachableError, match="does not answer") as error:
        connect()
    assert time.monotonic() - started < 10
    assert error.value.retry
    assert "secret" not in str(error.value)


def test_a_server_that_is_silent_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PROBE_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(RegistryUnreachableError, match="does not answer"):
            step_run("sft").__enter__()
        assert time.monotonic() - started < 10


def test_a_broken_database_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, and long enough to be read as one" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RegistryUnreachableError, match="not a database"):
        connect()


def test_a_store_that_cannot_be_made_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(RegistryUnreachableError, match="does not answer"):
        connect(create=True)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "ftp://server"])
def test_a_store_without_registry_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(RegistryError, match="a folder has no registry"):
        connect()


def test_a_deleted_experiment_says_how_to_restore_it(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect().client
    client.delete_experiment(client.create_experiment("gone"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    tracking._connect.cache_clear()
    with pytest.raises(RegistryError, match="mlflow experiments restore --experiment-id"):
        connect(create=True)
    tracking._connect.cache_clear()
