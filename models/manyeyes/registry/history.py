"""The history of a registered model: every move of its aliases is a record in a chain that only grows.

MLflow has no transactions over several calls. It has one write that of two callers only one can make: a parameter of a
run is written once and never changed (its primary key is run and key, on every SQL store). Record ``N`` is parameter
``N`` of the one run in the experiment ``manyeyes-history-MODEL``, so who writes ``N + 1`` knows that nothing came
between: compare and set, without a lock. The experiment gets its name by a rename, and names are unique: only one
process succeeds.

Each record holds the aliases as they are after it and the sha256 of the record before. MLflow's aliases, and a few tags
of the version, are written after the record and follow from it. A process puts a mark on the registered model before
its record and takes it away once aliases and chain agree; where a mark was left behind, the next call finishes what was
begun. Aliases that differ without a mark were moved by somebody else: that is recorded as what it is, ``outside``, and
stands.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import mlflow
from mlflow.exceptions import MlflowException
from pydantic import Field, ValidationError

from manyeyes import __version__
from manyeyes.errors import RegistryError, RegistryUnreachableError
from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.references import CHALLENGER, CHAMPION, PREVIOUS
from manyeyes.registry.tracking import Tracking, artifact_location
from manyeyes.registry.webhook import post_json, sign
from manyeyes.strict import StrictModel

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel

    from manyeyes.recipe.recipe import RegistrySpec

T = TypeVar("T")
P = ParamSpec("P")
Action = Literal["adopt", "outside", "register", "challenge", "approve", "reject", "promote", "rollback"]

ALIASES = (CHAMPION, PREVIOUS, CHALLENGER)
_EXPERIMENT = "manyeyes-history-"
_RUN_TAG, _MARK = "manyeyes.history", "manyeyes.moving."
_REASON_CHARACTERS = 2000
_RECORD_CHARACTERS = 6000  # MLflow cuts longer parameters
_MARK_LASTS_S = 600.0
_ATTEMPTS = 6
_TIMEOUT_S = 10
EVENTS_URL, EVENTS_SECRET = "MANYEYES_REGISTRY_WEBHOOK_URL", "MANYEYES_REGISTRY_WEBHOOK_SECRET"
_EVENT_S = 3.0


class Identity(StrictModel):
    """Who made a move."""

    name: str = Field(description="Of the user.")
    source: Literal["mlflow", "environment"] = Field(
        description="mlflow: the server knows the user by password or token; environment: what the machine says."
    )


class Approvals(StrictModel):
    """What a version needs before it becomes champion, where passing the gate is not enough."""

    count: int = Field(default=1, ge=1, le=2, description="Persons who must approve.")
    four_eyes: bool = Field(default=False, description="None of them may be who registered the version.")


def approvals_of(wanted: RegistrySpec) -> Approvals | None:
    """What a recipe asks for; ``None`` where passing the gate is enough."""
    if wanted.promotion == "automatic":
        return None
    return Approvals(count=wanted.approvals, four_eyes=wanted.four_eyes)


class MoveRecord(StrictModel):
    """One move, as it stands in the chain."""

    format_version: Literal[1] = 1
    number: int = Field(ge=1, description="From 1, without gaps.")
    action: Action = Field(description="adopt: aliases from before there was a history; outside: moved by other means.")
    version: int | None = Field(description="That the move is about; null where it is about aliases alone.")
    moves: dict[str, tuple[int | None, int | None]] = Field(description="By alias: version before, and after.")
    aliases: dict[str, int] = Field(description="Version by alias after this record.")
    tags: dict[str, str] = Field(default_factory=dict, description="Of the version, which follow from this record.")
    by: Identity
    at: str = Field(description="UTC, by the clock of the machine that made the move.")
    reason: str = Field(default="", description="Why, in the words of who made the move.")
    forced: bool = Field(default=False, description="The gate did not pass the version, and --force was said.")
    verdict: str | None = Field(default=None, description="The gate's, of the version.")
    gate_digest: str | None = Field(default=None, description="sha256 of the version's gate.json.")
    bundle_digest: str | None = Field(default=None, description="Of the version's bundle.")
    approvals: Approvals | None = Field(default=None, description="That the version needs, from its registration on.")
    against: int | None = Field(default=None, description="Champion that the gate compared a challenger with.")
    client: str = Field(description="Versions of what made the move.")
    code: str = Field(description="Image digest or commit of what made the move; unknown where neither is said.")
    previous: str = Field(description="sha256 of the record before; empty for the first.")
    request: str = Field(description="Tells this record from any other.")


class RegistryEvent(StrictModel):
    """A move, as the webhook is told it."""

    text: str = Field(description="In one line, which chat services show as it is.")
    model: str = Field(description="Name in the registry.")
    record: MoveRecord = Field(description="As it stands in the history; a number that is left out was not delivered.")


@dataclass(frozen=True)
class History:
    """What the chain of a model holds.

    Attributes:
        name: Of the registered model.
        run_id: Run that holds the records; ``None`` where there is no history yet.
        records: From the first.
        digest: sha256 of the last record's text; empty where there is none.
        problems: What is wrong with the chain; empty when each record follows the one before.
    """

    name: str
    run_id: str | None = None
    records: tuple[MoveRecord, ...] = ()
    digest: str = ""
    problems: tuple[str, ...] = ()

    @property
    def aliases(self) -> dict[str, int]:
        """Version by alias after the last record."""
        return dict(self.records[-1].aliases) if self.records else {}

    def of(self, version: int, *actions: Action) -> tuple[MoveRecord, ...]:
        """Records about a version, of these actions."""
        return tuple(record for record in self.records if record.version == version and record.action in actions)


@dataclass(frozen=True)
class Change:
    """What a move is to do; ``History`` makes a record of it."""

    action: Action
    version: int | None
    aliases: Mapping[str, int]
    tags: Mapping[str, str] = field(default_factory=dict)
    forced: bool = False
    verdict: str | None = None
    gate_digest: str | None = None
    bundle_digest: str | None = None
    approvals: Approvals | None = None
    against: int | None = None


@dataclass(frozen=True)
class Move:
    """What came of a move.

    Attributes:
        record: The new one; ``None`` where nothing was to be done.
        notes: What was found and put right on the way, one sentence each.
    """

    record: MoveRecord | None
    notes: tuple[str, ...]


def read_history(tracking: Tracking, name: str) -> History:
    """The chain of a model, checked; empty where there is none yet.

    Raises:
        RegistryError: It was deleted.
        RegistryUnreachableError: The store does not answer.
    """
    with registry_errors():
        experiment = tracking.client.get_experiment_by_name(_EXPERIMENT + name)
        if experiment is None:
            return History(name)
        run_id = experiment.tags.get(_RUN_TAG, "")
        run = tracking.client.get_run(run_id) if experiment.lifecycle_stage == "active" else None
    if run is None or run.info.lifecycle_stage != "active":
        command = "runs restore --run-id" if run else "experiments restore --experiment-id"
        raise RegistryError(
            f'the history of "{name}" was deleted',
            "the record of every move: without it no alias moves",
            f"Restore it: mlflow {command} {run_id if run else experiment.experiment_id}",
        )
    return _parse(name, run_id, run.data.params)


def _parse(name: str, run_id: str, params: Mapping[str, str]) -> History:
    records: list[MoveRecord] = []
    digest, problems = "", []
    for position, (key, text) in enumerate(sorted(params.items()), 1):
        try:
            record = MoveRecord.model_validate_json(text)
        except ValidationError as error:
            problems.append(f'"{key}" is no record ({error.errors()[0]["msg"]})')
            continue
        if (key, record.number, record.previous) != (_key(position), position, digest):
            problems.append(f"record {record.number} does not follow the one before it")
        digest = _sha256(text)
        records.append(record)
    return History(name, run_id, tuple(records), digest, tuple(problems))


def move(tracking: Tracking, name: str, decide: Callable[[History], Change | None], *, reason: str = "") -> Move:
    """Make a move: decide by the newest state, record it, let the aliases follow.

    Where another process moves at the same time, one of them is first, and the other decides anew.

    Args:
        tracking: The registry.
        name: Of the registered model, which must be there.
        decide: What is to be done in this state; ``None`` for nothing. It raises to refuse, and may be called often.
        reason: Why; kept with the record.

    Raises:
        RegistryError: ``decide`` refuses, or the history is damaged or was deleted.
        RegistryUnreachableError: The store does not answer; the next call finishes what was begun.
    """
    request, notes = uuid.uuid4().hex, list[str]()
    mark = _MARK + request
    _write(tracking.client.set_registered_model_tag, name, mark, _mark_text())
    while True:
        try:
            history = _settle(tracking, name, mark=mark, notes=notes)
            change = decide(history)
        except Exception:
            with suppress(RegistryError):
                _unmark(tracking, name, [mark])
            raise
        if change is None:
            _unmark(tracking, name, [mark])
            return Move(None, tuple(notes))
        made = _append(tracking, history, change, reason=reason, request=request)
        if made is not None:
            break
    _project(tracking, made, tags_of=made.records[-1:])
    _unmark(tracking, name, [mark])
    notes += _tell(name, made.records[-1])
    return Move(made.records[-1], tuple(notes))


def repair(tracking: Tracking, name: str) -> tuple[str, ...]:
    """Finish a move that a process left half done; record what was moved by other means.

    Returns:
        What was done, one sentence each.

    Raises:
        RegistryError: The history is damaged or was deleted.
        RegistryUnreachableError: The store does not answer.
    """
    return move(tracking, name, lambda _history: None).notes


def _settle(tracking: Tracking, name: str, *, mark: str, notes: list[str]) -> History:
    """Bring chain and aliases together; the chain as it is then."""
    seen: tuple[str, dict[str, int]] | None = None
    while True:
        # In this order: who has no mark by now has nothing left to write of what stands in the chain.
        history = read_history(tracking, name)
        if history.problems:
            raise RegistryError(
                f'the history of "{name}" is damaged: {"; ".join(history.problems[:3])}',
                "records that follow each other: without them no alias moves",
                f"See: manyeyes history {name}. Restore the experiment {_EXPERIMENT}{name} from a backup of MLflow.",
            )
        with registry_errors():
            model = tracking.client.get_registered_model(name)
        found = _aliases(model)
        marks = {key: value for key, value in model.tags.items() if key.startswith(_MARK) and key != mark}
        left_behind = [key for key, value in marks.items() if _is_left_behind(value)]
        if history.records and marks and (found != history.aliases or left_behind):
            unfinished = [record for record in history.records if _MARK + record.request in marks]
            changed = _project(tracking, history, tags_of=unfinished)
            if changed:
                notes.append(f"{_about(unfinished)} was not finished; now it is: {', '.join(changed)}")
        _unmark(tracking, name, left_behind)
        if found == history.aliases or (history.records and marks):
            return history
        if seen != (history.digest, found):
            seen = (history.digest, found)  # MLflow reads tags and aliases one after the other: look once more
            continue
        change = Change("outside" if history.records else "adopt", None, found)
        made = _append(tracking, history, change, reason="", request=uuid.uuid4().hex)
        if made is None:
            continue
        notes += _tell(name, made.records[-1])
        if history.records:
            moved = ", ".join(alias_move(alias, *move) for alias, move in made.records[-1].moves.items())
            notes.append(f"moved by other means than ManyEyes, and recorded as such: {moved}")
        return made


def _tell(name: str, record: MoveRecord) -> list[str]:
    """Tell the webhook, if there is one; what went wrong, in words. The move stands whatever comes of it."""
    url, secret = os.environ.get(EVENTS_URL, ""), os.environ.get(EVENTS_SECRET, "")
    if not url:
        return []
    text = f"{name}: {_about([record])}; {', '.join(alias_move(alias, *ends) for alias, ends in record.moves.items())}"
    body = RegistryEvent(text=text.removesuffix("; "), model=name, record=record).model_dump_json()
    said = post_json(url, body, timeout_s=_EVENT_S, waits_s=(1.0,), headers=sign(body, secret) if secret else None)
    return [] if said.startswith("sent") else [f"webhook of the registry: {said}"]


def _about(records: Iterable[MoveRecord]) -> str:
    said = [
        f"record {record.number} ({record.action}{f' version {record.version}' if record.version else ''}, by "
        f"{record.by.name})"
        for record in records
    ]
    return " and ".join(said) or "an earlier move"


def alias_move(alias: str, before: int | None, after: int | None) -> str:
    """A move of an alias."""
    return f"{alias} from {before or 'none'} to {after or 'none'}"


def _append(tracking: Tracking, history: History, change: Change, *, reason: str, request: str) -> History | None:
    """The chain with one more record; ``None`` where another process was first."""
    run_id = history.run_id or _open(tracking, history.name)
    before, after = history.aliases, dict(change.aliases)
    record = MoveRecord(
        number=len(history.records) + 1,
        action=change.action,
        version=change.version,
        moves={
            alias: (before.get(alias), after.get(alias)) for alias in ALIASES if before.get(alias) != after.get(alias)
        },
        aliases=after,
        tags=dict(change.tags),
        by=identify(tracking),
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        reason=reason.encode("utf-8", "replace").decode()[:_REASON_CHARACTERS],
        forced=change.forced,
        verdict=change.verdict,
        gate_digest=change.gate_digest,
        bundle_digest=change.bundle_digest,
        approvals=change.approvals,
        against=change.against,
        client=f"manyeyes {__version__}, mlflow {mlflow.__version__}, python {platform.python_version()}",
        code=os.environ.get("MANYEYES_IMAGE_DIGEST") or os.environ.get("MANYEYES_GIT_COMMIT") or "unknown",
        previous=history.digest,
        request=request,
    )
    while len(text := record.model_dump_json()) > _RECORD_CHARACTERS:
        record = record.model_copy(update={"reason": record.reason[: len(record.reason) // 2]})
    if not _write(_claim, tracking, run_id, _key(record.number), text):
        return None
    return replace(history, run_id=run_id, records=(*history.records, record), digest=_sha256(text))


def _claim(tracking: Tracking, run_id: str, key: str, text: str) -> bool:
    """Write a parameter; whether it is ours that stands there."""
    try:
        tracking.client.log_param(run_id, key, text)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        # Told by what stands there, and not by the words of the refusal.
        params = tracking.client.get_run(run_id).data.params
        if key not in params:
            raise
        return bool(params[key] == text)
    return True


def _open(tracking: Tracking, name: str) -> str:
    """Make the experiment with its run, under a name of its own, and rename it: of several processes one succeeds."""
    client, wanted = tracking.client, _EXPERIMENT + name
    own = f"{wanted}.{uuid.uuid4().hex}"
    try:
        with registry_errors():
            experiment = client.create_experiment(own, artifact_location=artifact_location(tracking.uri))
            run_id = client.create_run(experiment, run_name="history").info.run_id
            client.set_terminated(run_id)
            client.set_experiment_tag(experiment, _RUN_TAG, run_id)
            client.rename_experiment(experiment, wanted)
    except RegistryError:
        with registry_errors():
            if client.get_experiment_by_name(wanted) is None:
                raise
    with suppress(RegistryError), registry_errors():
        # Ours where another process was first, and what processes left that died before they came this far.
        for other in client.search_experiments(filter_string=f"name LIKE '{wanted}.%'"):
            if other.name.startswith(wanted) and len(other.name) == len(own):
                client.delete_experiment(other.experiment_id)
    with registry_errors():
        return str(client.get_experiment_by_name(wanted).tags[_RUN_TAG])


def _project(tracking: Tracking, history: History, *, tags_of: Iterable[MoveRecord]) -> list[str]:
    """Make aliases and tags what the chain says, until neither changes any more.

    Returns:
        The aliases that had to be moved, in words.
    """
    client, name, moved = tracking.client, history.name, list[str]()
    for record in tags_of:
        reason = {"promotion_reason": record.reason} if record.reason else {}
        for key, value in {**record.tags, **reason}.items():
            with suppress(_AbsentError):
                _write(client.set_model_version_tag, name, str(record.version), key, value)
    while True:
        with registry_errors():
            found = _aliases(client.get_registered_model(name))
        changed = False
        # The champion first: that is what services follow.
        for alias in ALIASES:
            number = history.aliases.get(alias)
            if found.get(alias) == number:
                continue
            with suppress(_AbsentError):  # a version that was deleted; the next call records that
                if number is None:
                    _write(client.delete_registered_model_alias, name, alias)
                else:
                    _write(client.set_registered_model_alias, name, alias, str(number))
                moved.append(alias_move(alias, found.get(alias), number))
                changed = True
        latest = read_history(tracking, name)
        if not changed and latest.digest == history.digest:
            return moved
        history = latest


def read_aliases_of(tracking: Tracking, name: str) -> dict[str, int]:
    """Version by alias, of those that moves are about."""
    with registry_errors():
        return _aliases(tracking.client.get_registered_model(name))


def moving(tracking: Tracking, name: str) -> bool:
    """Whether a process moves aliases now, or died while it did."""
    with registry_errors():
        return any(tag.startswith(_MARK) for tag in tracking.client.get_registered_model(name).tags)


def _aliases(model: RegisteredModel) -> dict[str, int]:
    return {alias: int(model.aliases[alias]) for alias in ALIASES if alias in model.aliases}


class _AbsentError(Exception):
    """What was to be written is about something that is not there."""


def _write(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Write what may be written twice; again where another process was in the way."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with registry_errors():
                try:
                    return call(*arguments, **named)
                except MlflowException as error:
                    if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                        raise _AbsentError from error
                    # Two that insert the same row at once.
                    if attempt == _ATTEMPTS or "UNIQUE" not in str(error).upper():
                        raise
        except RegistryUnreachableError as error:
            if attempt == _ATTEMPTS or "locked" not in str(error):
                raise
        time.sleep(random.uniform(0, 0.05 * 2**attempt))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _mark_text() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "at": time.time()})


def _is_left_behind(text: str) -> bool:
    """Whether the process behind a mark is gone: known for this machine, presumed of another after a while."""
    mark = json.loads(text)
    if mark["host"] == socket.gethostname():
        try:
            os.kill(mark["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    return bool(time.time() - mark["at"] > _MARK_LASTS_S)


def _unmark(tracking: Tracking, name: str, marks: Iterable[str]) -> None:
    for mark in marks:
        with suppress(_AbsentError):
            _write(tracking.client.delete_registered_model_tag, name, mark)


def identify(tracking: Tracking) -> Identity:
    """Who this process acts as: the user whom MLflow knows by password or token, else the machine's."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    name = _mlflow_user(tracking.uri, user) if tracking.uri.startswith("http") else None
    if name:
        return Identity(name=name, source="mlflow")
    try:
        return Identity(name=getpass.getuser(), source="environment")
    except (KeyError, OSError):  # a container's user often has no name
        return Identity(name=f"uid {os.getuid()}", source="environment")


@cache
def _mlflow_user(uri: str, user: str) -> str | None:  # noqa: ARG001  (another user, another answer)
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with registry_errors():
        answer = http_request(get_default_host_creds(uri), "/api/2.0/mlflow/users/current", "GET", timeout=_TIMEOUT_S)
    if answer.status_code != HTTPStatus.OK:
        return None  # a server without users of its own
    return str(answer.json()["user"]["username"])


def _key(number: int) -> str:
    return f"{number:06d}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
