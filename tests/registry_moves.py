"""Many moves at once and processes that die, for tests of the registry's history."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest

from manyeyes.errors import RegistryError
from manyeyes.registry.history import History, read_history
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import promote, read_aliases, rollback
from tests.registry_store import Candidate, put

# Everything of MLflow's client that changes the store, as a registration and a move call it.
WRITES = (
    "create_experiment",
    "create_logged_model",
    "create_model_version",
    "create_registered_model",
    "create_run",
    "delete_experiment",
    "delete_model_version",
    "delete_registered_model_alias",
    "delete_registered_model_tag",
    "log_batch",
    "log_outputs",
    "log_param",
    "rename_experiment",
    "set_experiment_tag",
    "set_model_version_tag",
    "set_registered_model_alias",
    "set_registered_model_tag",
    "set_terminated",
)


def make_versions(name: str, count: int, **tags: str) -> None:
    """Versions that passed the gate, as far as tags go."""
    client = connect(create=True).client
    client.create_registered_model(name)
    for number in range(1, count + 1):
        marks = {"gate": "passed", "bundle_digest": f"{name} {number}", "promotion": "done", **tags}
        client.create_model_version(name, source=f"s3://nowhere/{name}/{number}", tags=marks)


@contextmanager
def stopped_before_write(number: int, stop: Callable[[], object]) -> Iterator[list[str]]:
    """``stop`` is called in the place of the client's write of this number; the list is of those that were made."""
    made: list[str] = []

    def counted(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if len(made) + 1 == number:
                stop()
            made.append(name)
            return write(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(mlflow.MlflowClient, name, counted(name, getattr(mlflow.MlflowClient, name)))
        yield made


def check_explained(name: str) -> History:
    """One champion, ``previous`` the champion before it, and a chain whose records follow from each other."""
    tracking = connect()
    history = read_history(tracking, name)
    assert history.problems == ()
    aliases = read_aliases(name)
    assert aliases == history.aliases
    state: dict[str, int] = {}
    for number, record in enumerate(history.records, 1):
        assert record.number == number
        moved = {alias: (state.get(alias), record.aliases.get(alias)) for alias in {*state, *record.aliases}}
        assert record.moves == {alias: move for alias, move in moved.items() if move[0] != move[1]}
        if record.action in ("promote", "rollback") and state.get("champion") != record.aliases["champion"]:
            assert record.aliases["champion"] == record.version
            assert record.aliases.get("previous") == state.get("champion")
        state = record.aliases
    assert not [tag for tag in tracking.client.get_registered_model(name).tags if tag.startswith("manyeyes.moving")]
    return history


def move_often(uri: str, name: str, seed: int, moves: int, registers: Sequence[Candidate], done: Any) -> None:
    """What one process does: promotes, rolls back and registers, as chance has it."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    chance, made = random.Random(seed), Counter[str]()
    todo: list[Candidate | str] = [*registers, *["promote", "promote", "rollback"] * moves][: len(registers) + moves]
    chance.shuffle(todo)
    for what in todo:
        try:
            if isinstance(what, Candidate):
                version = put(name, what)
                made[f"version {version.version} of {what.digest}"] += 1
            elif what == "promote":
                promote(name, chance.randint(1, 4), reason=f"{seed}")
                made["promote"] += 1
            else:
                rollback(name)
                made["rollback"] += 1
        except RegistryError as error:
            made[f"refused: {str(error)[:200]}"] += 1
    done.put(made)


def run_at_once(
    uri: str, name: str, *, processes: int, moves: int, registers: Sequence[Sequence[Candidate]] = ()
) -> Counter[str]:
    """``move_often`` in several processes; what came of it, counted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry_moves"])
    done = context.Queue()
    given = [*registers, *[()] * processes][:processes]
    workers = [
        context.Process(target=move_often, args=(uri, name, seed, moves, candidates, done))
        for seed, candidates in enumerate(given)
    ]
    for worker in workers:
        worker.start()
    made = sum((done.get(timeout=240) for _ in workers), Counter[str]())
    for worker in workers:
        worker.join()
    return made


def killed_at(uri: str, number: int, name: str, what: str, candidate: Candidate | None, log: Path) -> None:
    """A process that does one thing and is killed in the place of its write of this number; target of a process."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    with stopped_before_write(number, lambda: os.kill(os.getpid(), signal.SIGKILL)) as made:
        if candidate is not None:
            put(name, candidate)
        else:
            {"promote": lambda: promote(name, 2), "rollback": lambda: rollback(name)}[what]()
    log.write_text(" ".join(made), encoding="utf-8")
