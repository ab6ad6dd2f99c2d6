"""100 moves of one model from several processes, and processes that are killed, on SQLite and on a server.

Needs PostgreSQL for the second half: ``apt-get install postgresql``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from manyeyes.registry.history import read_history, repair
from manyeyes.registry.references import parse_model_reference
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import describe, promote
from tests.evaluation_fakes import make_snapshot
from tests.integration.servers import answers, find_postgres, postgres, wait_for
from tests.ports import free_port
from tests.registry_moves import check_explained, killed_at, make_versions, run_at_once
from tests.registry_store import IMAGES, make_candidate, put

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PROCESSES, MOVES, BUNDLES = 5, 18, 2


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking URI: a file, or a server with PostgreSQL behind it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from _store(request.param, tmp_path_factory.mktemp("store"), monkeypatch)


def _store(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if kind == "sqlite":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
        yield os.environ["MLFLOW_TRACKING_URI"]
        return
    programs = find_postgres()
    if programs is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with postgres(programs) as database:
        port, log = free_port(), tmp_path / "server.log"
        uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{database}/mlflow"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", uri, "--artifacts-destination", f"{tmp_path}/artifacts"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), process=process, log=log)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            yield os.environ["MLFLOW_TRACKING_URI"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def test_a_hundred_moves_at_once_leave_a_history_that_explains_every_state(store: str, tmp_path: Path) -> None:
    name = "busy"
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    # The gate refuses them, so that registering moves no alias.
    candidates = [make_candidate(tmp_path / str(number), snapshot, floor=101) for number in range(BUNDLES)]
    make_versions(name, 4)
    promote(name, 1)
    promote(name, 2)
    made = run_at_once(store, name, processes=PROCESSES, moves=MOVES, registers=[candidates] * PROCESSES)
    history = check_explained(name)
    print(made, Counter(record.action for record in history.records))
    assert made.total() == PROCESSES * (MOVES + BUNDLES) == 100
    assert not [what for what in made if what.startswith("refused")], made
    # Each bundle is one version, whoever registered it.
    registered = [record for record in history.records if record.action == "register"]
    assert sorted(str(record.bundle_digest) for record in registered) == sorted(c.digest for c in candidates)
    versions = connect().client.search_model_versions(f"name='{name}'")
    assert {int(v.version) for v in versions} == {1, 2, 3, 4, *(record.version for record in registered)}
    assert len(versions) == 4 + BUNDLES
    for candidate in candidates:
        assert sum(count for what, count in made.items() if what.endswith(candidate.digest)) == PROCESSES
        assert len([what for what in made if what.endswith(candidate.digest)]) == 1


def test_a_registration_killed_at_any_write_is_one_version_after_the_next_call(store: str, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    candidate, log = make_candidate(tmp_path / "one", snapshot), tmp_path / "writes"
    connect(create=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry_moves"])
    # Not every write of a registration, since each kill takes seconds: every third, every ninth of a server.
    step = 9 if store.startswith("http") else 3
    for number in count(1, step):
        name = f"killed-{number}"
        process = context.Process(target=killed_at, args=(store, number, name, "register", candidate, log))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        version = put(name, candidate)
        assert (version.version, version.aliases, version.verdict) == (1, ("challenger", "champion"), "passed")
        history = check_explained(name)
        assert [record.action for record in history.records] == ["register", "promote"]
        assert len(connect().client.search_model_versions(f"name='{name}'")) == 1
        assert repair(connect(), name) == ()
    writes = log.read_text(encoding="utf-8").split()
    assert writes.count("log_param") == 2
    assert number - step <= len(writes) < number
    assert describe(parse_model_reference(name)).version == 1
    assert len(read_history(connect(), name).records) == 2
