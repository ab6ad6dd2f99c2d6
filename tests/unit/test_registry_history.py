"""The chain behind the aliases: several processes at once, processes that die, aliases that others move."""

from __future__ import annotations

import base64
import hmac
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest

from manyeyes.errors import RegistryError
from manyeyes.registry import history as chain
from manyeyes.registry.history import identify, read_history, repair
from manyeyes.registry.references import find_version, parse_model_reference
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import promote, read_aliases, rollback
from tests.registry_moves import check_explained, make_versions, run_at_once, stopped_before_write
from tests.registry_store import store_uri


@pytest.fixture(scope="module", autouse=True)
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
            patch.delenv(name, raising=False)
        yield store_uri(tmp_path_factory)


def test_each_move_says_who_when_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "told"
    make_versions(name, 2)
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setenv("MANYEYES_GIT_COMMIT", "abc123")
    promote(name, 1, reason="the first")
    promote(name, 2, reason="better on charts")
    assert promote(name, 2).notes == ()  # is champion already: nothing to record
    rollback(name, reason="worse on\ntables \udcff")
    history = check_explained(name)
    assert [record.action for record in history.records] == ["promote", "promote", "rollback"]
    last = history.records[-1]
    assert last.moves == {"champion": (2, 1), "previous": (1, 2)}
    assert (last.by.name, last.by.source, last.code) == ("ada", "environment", "abc123")
    assert last.reason == "worse on\ntables ?"
    assert last.at.endswith("+00:00")
    assert "mlflow" in last.client
    assert (last.verdict, last.bundle_digest) == ("passed", "told 1")
    assert find_version(connect(), parse_model_reference(f"{name}/1")).tags["promotion_reason"] == last.reason
    promote(name, 2, reason="\x01" * 5000)
    assert check_explained(name).records[-1].reason.strip("\x01") == ""


def test_aliases_from_before_there_was_a_history_are_adopted() -> None:
    name = "older"
    make_versions(name, 3)
    client = connect().client
    client.set_registered_model_alias(name, "champion", "2")
    client.set_registered_model_alias(name, "previous", "1")
    assert promote(name, 3).notes == ()
    adopted, promoted = check_explained(name).records
    assert (adopted.action, adopted.aliases) == ("adopt", {"champion": 2, "previous": 1})
    assert promoted.moves == {"champion": (2, 3), "previous": (1, 2)}


def test_an_alias_that_was_moved_around_us_stands_and_is_recorded_as_that() -> None:
    name = "around"
    make_versions(name, 3)
    promote(name, 1)
    promote(name, 2)
    connect().client.set_registered_model_alias(name, "champion", "3")
    (note,) = repair(connect(), name)
    assert "by other means" in note
    assert "champion from 2 to 3" in note
    assert repair(connect(), name) == ()
    assert rollback(name).version == 1
    assert [record.action for record in check_explained(name).records][-2:] == ["outside", "rollback"]


class _KilledError(BaseException):
    """As a kill is: nothing that catches errors sees it."""


def _dead_process() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid or 0


@pytest.mark.parametrize("what", ["promote", "rollback"])
def test_a_move_that_was_killed_between_two_writes_is_finished_by_the_next_call(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promotion that must make the history first, and a rollback that need not."""
    dead = json.dumps(json.loads(chain._mark_text()) | {"pid": _dead_process()})
    act: Callable[[str], object] = rollback if what == "rollback" else lambda name: promote(name, 3)
    stops: list[str] = []

    def die() -> None:
        raise _KilledError

    client = connect().client
    for number in count(1):
        name = f"killed-{what}-{0 if what == 'rollback' else number}"
        if number == 1 or what == "promote":
            make_versions(name, 3)
            client.set_registered_model_alias(name, "champion", "2")
            client.set_registered_model_alias(name, "previous", "1")
        if what == "rollback":
            repair(connect(), name)
        before, known = read_aliases(name), len(read_history(connect(), name).records)
        with monkeypatch.context() as patch, stopped_before_write(number, die) as made:
            patch.setattr(chain, "_mark_text", lambda: dead)
            try:
                act(name)
            except _KilledError:
                finished = False
            else:
                finished = True
        recorded, left = read_history(connect(), name), read_aliases(name)
        notes = repair(connect(), name)
        history = check_explained(name)
        if len(recorded.records) > known and recorded.records[-1].action == what:
            assert history.records == recorded.records  # finished, and not done anew
            assert history.aliases["champion"] == (3 if what == "promote" else before["previous"])
            assert bool(notes) == (left != history.aliases)
            stops += notes
        else:
            assert history.aliases == before
            assert notes == ()
        if finished:
            break
    assert number == len(made) + 1
    assert len(stops) >= 2
    assert f"({what} version" in stops[0]


def test_processes_at_once_leave_one_champion_and_a_history_that_explains_it(uri: str) -> None:
    name = "at-once"
    make_versions(name, 4)
    promote(name, 1)
    promote(name, 2)
    made = run_at_once(uri, name, processes=3, moves=6)
    history = check_explained(name)
    assert made["promote"] + made["rollback"] == 18, made
    by_seed = [record for record in history.records[2:] if record.action == "promote"]
    # Of each process, unless all that it promoted was the champion at that moment.
    assert by_seed
    assert {record.reason for record in by_seed} <= {"0", "1", "2"}


def test_a_record_that_was_changed_stops_every_move_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "forged"
    make_versions(name, 2)
    promote(name, 1)
    promote(name, 2)
    history = read_history(connect(), name)
    run = connect().client.get_run(history.run_id)
    forged = {**run.data.params, "000001": run.data.params["000001"].replace('"reason":""', '"reason":"as told"')}
    assert chain._parse(name, history.run_id or "", forged).problems == ("record 2 does not follow the one before it",)
    monkeypatch.setattr(chain, "read_history", lambda _tracking, name: chain._parse(name, "run", forged))
    with pytest.raises(RegistryError, match="is damaged: record 2 does not follow"):
        rollback(name)
    assert read_aliases(name) == {"champion": 2, "previous": 1}


def test_a_history_that_was_deleted_stops_every_move_and_says_how_to_restore_it() -> None:
    name = "deleted"
    make_versions(name, 2)
    promote(name, 1)
    client = connect().client
    experiment = client.get_experiment_by_name(f"manyeyes-history-{name}").experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(RegistryError, match=f"mlflow experiments restore --experiment-id {experiment}"):
        promote(name, 2)
    client.restore_experiment(experiment)
    assert promote(name, 2).version == 2
    check_explained(name)


def test_each_move_is_told_with_a_signature_and_a_dead_receiver_stops_none(monkeypatch: pytest.MonkeyPatch) -> None:
    name, got = "events", list[tuple[dict[str, str], str]]()
    make_versions(name, 2)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            got.append(({key.lower(): value for key, value in self.headers.items()}, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/secret-path"
        monkeypatch.setenv("MANYEYES_REGISTRY_WEBHOOK_URL", url)
        monkeypatch.setenv("MANYEYES_REGISTRY_WEBHOOK_SECRET", "shared")
        assert promote(name, 1, reason="first").notes == ()
        server.shutdown()
        thread.join()
    ((headers, body),) = got
    told = json.loads(body)
    assert told["record"] == read_history(connect(), name).records[0].model_dump(mode="json")
    assert told["text"].startswith("events: record 1 (promote version 1, by ")
    assert told["text"].endswith("champion from none to 1")
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    expected = base64.b64encode(hmac.new(b"shared", signed, "sha256").digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"

    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    (note,) = promote(name, 2).notes
    assert note.startswith("webhook of the registry: not sent: 127.0.0.1")
    assert "secret-path" not in note
    assert read_aliases(name) == {"champion": 2, "previous": 1}


def test_the_user_of_the_machine_is_named_where_it_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert identify(connect()).name.startswith("uid ")
