"""A verb that reads makes no database, experiment or folder, and asks a server for nothing that needs a writer."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import mlflow
import pytest

from manyeyes.cli.main import cli
from manyeyes.errors import RegistryError
from manyeyes.registry import tracking
from manyeyes.registry.pull import champion_evidence, locate_model
from manyeyes.registry.tracking import connect, find_experiment, step_records, step_run, version_url
from manyeyes.registry.versions import promote, read_aliases, rollback
from tests.cli_calls import call
from tests.evaluation_fakes import make_snapshot
from tests.registry_store import IMAGES, make_candidate, put, store_uri

NAME = "read-only"
READS = {
    "ask": ["ask", NAME, "-", "what is it?"],
    "chat render": ["chat", "render", "llava_v1", __file__],
    "compare": ["compare", NAME, f"{NAME}/2"],
    "correlate": ["correlate", "no.json"],
    "data diff": ["data", "diff", "data.dvc@HEAD", "data.dvc"],
    "data sources": ["data", "sources"],
    "encoders": ["encoders"],
    "fusions": ["fusions"],
    "history": ["history", NAME],
    "pipeline schedule list": ["pipeline", "schedule", "list"],
    "pipeline status": ["pipeline", "status"],
    "projectors": ["projectors"],
    "pull": ["pull", NAME, "pulled"],
    "recipe list": ["recipe", "list"],
    "registry audit": ["registry", "audit", NAME],
    "recipe show": ["recipe", "show", "tiny"],
    "verify": ["verify", "no-bundle", "--verify-key", "no.pem"],
}
# What these write is what they are for; with a model that is not there, they write nothing either.
REFUSED = {
    "approve": ["approve", f"{NAME}/1", "--reason", "good"],
    "reject": ["reject", f"{NAME}/1", "--reason", "bad"],
    "evaluate": ["evaluate", f"{NAME}@champion"],
    "promote": ["promote", f"{NAME}/1"],
    "rollback": ["rollback", NAME],
    "sign": ["sign", f"{NAME}/1"],
}
WRITES = (
    "convert",
    "data build",
    "data contamination",
    "data curate",
    "data generate complex",
    "data generate conversation",
    "data generate detail",
    "data generate dialogue-drawing",
    "data generate engine",
    "data generate llava-bench",
    "data generate recaption",
    "data import",
    "data self-chat",
    "data validate",
    "handoff",
    "judge",
    "logits",
    "pipeline compile",
    "pipeline retry",
    "pipeline run",
    "pipeline schedule create",
    "pipeline schedule delete",
    "pipeline schedule disable",
    "pipeline schedule enable",
    "pipeline upload",
    "reliance",
    "run",
    "score",
    "serve",
)


# MLflow's own server, in its own process: its handlers change globals of MLflow. While the file only_reading is there,
# it answers 403 to whatever is not reading, and notes it in refused.txt.
SERVE = """
from pathlib import Path
import flask
from mlflow.server import app
from werkzeug.serving import make_server
only, refused = Path("only_reading"), Path("refused.txt")
@app.before_request
def refuse():
    request = flask.request
    if request.method in ("GET", "HEAD") or request.path.endswith("/search") or not only.exists():
        return None
    with refused.open("a", encoding="utf-8") as file:
        file.write(f"{request.method} {request.path}\\n")
    return flask.jsonify(error_code="PERMISSION_DENIED", message="this user has READ alone"), 403
http = make_server("127.0.0.1", 0, app, threaded=True)
print(http.server_port, flush=True)
http.serve_forever()
"""


@dataclass
class Server:
    """The server, and what tells it what to refuse."""

    url: str
    folder: Path

    @property
    def refused(self) -> list[str]:
        path = self.folder / "refused.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def take_writes(self, *, yes: bool) -> None:
        if yes:
            (self.folder / "only_reading").unlink(missing_ok=True)
        else:
            (self.folder / "refused.txt").unlink(missing_ok=True)
            (self.folder / "only_reading").touch()


def verbs(command: click.Command = cli, *path: str) -> Iterator[str]:
    """Every verb but the steps, which have outputs."""
    if not isinstance(command, click.Group):
        yield " ".join(path)
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        if (found := command.get_command(context, name)) is not None and (*path, name) != ("step",):
            yield from verbs(found, *path, name)


@pytest.fixture(autouse=True)
def environment(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty folder to work in, and one where a registry could be; the cache holds what can be had again."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MANYEYES_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "registry").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/registry/mlflow.db")
    monkeypatch.setenv("KFP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    tracking._connect.cache_clear()
    yield tmp_path
    tracking._connect.cache_clear()


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_every_verb_says_whether_it_reads_or_writes() -> None:
    assert set(verbs()) == {*READS, *REFUSED, *WRITES}


@pytest.mark.parametrize("verb", [*READS, *REFUSED])
def test_a_verb_makes_nothing_where_there_is_no_registry(
    verb: str, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = call(monkeypatch, *(READS | REFUSED)[verb])
    assert everything_below(environment) == {"registry", "work"}
    if NAME in " ".join((READS | REFUSED)[verb]):
        assert code == 2


def test_a_database_without_tables_stays_without(environment: Path) -> None:
    database = environment / "registry" / "mlflow.db"
    sqlite3.connect(database).close()
    database.touch()
    with pytest.raises(RegistryError, match="MLflow has no tables there"):
        read_aliases(NAME)
    assert database.stat().st_size == 0


def test_a_database_of_an_older_mlflow_is_not_changed_by_reading(environment: Path) -> None:
    database = environment / "registry" / "mlflow.db"
    with sqlite3.connect(database) as older:
        older.execute("CREATE TABLE registered_models (name TEXT)")
    before = database.read_bytes()
    with pytest.raises(RegistryError, match="mlflow db upgrade"):
        read_aliases(NAME)
    assert database.read_bytes() == before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two registered versions, the second of them champion."""
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {
        "_MLFLOW_SERVER_FILE_STORE": store_uri(tmp_path_factory),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": (folder / "artifacts").as_uri(),
    }
    command = [sys.executable, "-c", SERVE]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert process.stdout is not None
        try:
            found = Server(f"http://127.0.0.1:{process.stdout.readline().strip()}", folder)
            patch.setenv("MLFLOW_TRACKING_URI", found.url)
            snapshot = make_snapshot(folder / "snapshot", images=IMAGES)
            for name, floor in (("first", 0), ("second", 101)):
                put(NAME, make_candidate(folder / name, snapshot, floor=floor))
            promote(NAME, 2, force=True)
            yield found
        finally:
            process.terminate()


@pytest.fixture
def reader(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    server.take_writes(yes=False)
    tracking._connect.cache_clear()
    yield server
    server.take_writes(yes=True)


def test_a_user_who_may_only_read_pulls_and_compares(
    reader: Server, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "pull", NAME, "pulled") == 0
    assert call(monkeypatch, "compare", f"{NAME}/1", f"{NAME}/2", "--out", "compared") == 0
    assert call(monkeypatch, "history", NAME, "--html", "history.html") == 0
    assert call(monkeypatch, "registry", "audit", NAME) == 0
    assert call(monkeypatch, "ask", NAME, "-", "what is it?") == 2  # it has the bundle, which is a pretended one
    assert (environment / "work" / "pulled" / "manifest.json").is_file()
    assert reader.refused == []


@pytest.mark.parametrize(
    "look",
    [
        lambda _folder: locate_model(f"{NAME}@champion"),
        lambda folder: champion_evidence(NAME, work_dir=folder),
        lambda _folder: read_aliases(NAME),
        lambda _folder: version_url(NAME, "1"),
        lambda _folder: find_experiment(connect()),
    ],
)
def test_what_steps_and_verbs_look_up_is_only_read(
    look: Callable[[Path], object], reader: Server, tmp_path: Path
) -> None:
    assert look(tmp_path)
    assert reader.refused == []


def test_the_steps_of_a_run_are_found_without_writing(reader: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.take_writes(yes=True)
    with step_run("sft", tags={"manyeyes.pipeline_run": "one"}):
        pass
    reader.take_writes(yes=False)
    tracking._connect.cache_clear()
    monkeypatch.setenv("MANYEYES_PIPELINE_RUN", "one")
    (found,) = step_records()
    assert found.step == "sft"
    assert f"/#/experiments/{mlflow.get_run(found.url.rpartition('/')[2]).info.experiment_id}/runs/" in found.url
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of nobody")
    tracking._connect.cache_clear()
    assert step_records() == []
    assert reader.refused == []


@pytest.mark.parametrize("act", [lambda: promote(NAME, 1), lambda: rollback(NAME), lambda: step_run("a").__enter__()])
def test_writing_is_refused_to_that_user(act: Callable[[], object], reader: Server) -> None:
    with pytest.raises(RegistryError, match="READ of both is enough to pull"):
        act()
    assert reader.refused
