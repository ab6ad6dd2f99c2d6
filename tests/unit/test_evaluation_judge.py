"""The judge: what it asks, what it keeps, and services that fail, stall and answer nonsense."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest

from manyeyes.evaluation.judging.judge import Judge, JudgeError
from manyeyes.recipe.recipe import JudgeSpec
from manyeyes.web.chat_client import Verdict
from tests.judge_server import Trouble, completion, in_turn, judge_server

QUESTION = [{"role": "user", "content": "How good is it?"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MANYEYES_JUDGE_KEY", raising=False)


def no_wait(seconds: float) -> None:
    """The tests' clock stands still."""


def spec(endpoint: str, **changes: Any) -> JudgeSpec:
    return JudgeSpec(endpoint=endpoint, model="judge", **changes)


def read_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def ask(judge: Judge, content: str = "How good is it?") -> Verdict[float]:
    return judge.ask([{"role": "user", "content": content}], read=read_number, temperature=0.0, max_tokens=9)


def test_answer_is_read_and_what_it_took_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_JUDGE_KEY", "secret")
    with judge_server(in_turn("0.5")) as server:
        judge = Judge(spec(server.endpoint, price_in=2.0, price_out=10.0))
        assert ask(judge) == Verdict(0.5, "0.5")
    assert server.bodies == [{"model": "judge", "messages": QUESTION, "temperature": 0.0, "max_tokens": 9}]
    assert server.keys == ["Bearer secret"]
    use = judge.use
    assert (use.requests, use.cached, use.retried, use.unreadable) == (1, 0, 0, 0)
    assert (use.prompt_tokens, use.answer_tokens, use.served) == (100, 10, ["judge-2024-01-01"])
    assert use.cost == pytest.approx((100 * 2 + 10 * 10) / 1e6)
    assert "secret" not in use.model_dump_json()


def test_without_prices_and_key_there_is_no_cost_and_no_key() -> None:
    with judge_server(in_turn("0.5")) as server:
        judge = Judge(spec(server.endpoint))
        ask(judge)
    assert judge.use.cost is None
    assert server.keys == [None]


def test_nonsense_is_asked_again_warmer_and_never_becomes_a_score() -> None:
    with judge_server(in_turn("a pear", "a plum", "0.7")) as server:
        judge = Judge(spec(server.endpoint))
        assert ask(judge).value == 0.7
        assert server.temperatures() == [0.0, 0.5, 1.0]
        assert judge.use.unreadable == 2
    with judge_server(in_turn("a pear")) as server:
        verdict = ask(Judge(spec(server.endpoint, readings=2)))
        assert verdict == Verdict(None, "a pear", "2 answers made no sense, the last: 'a pear'")


def test_temperature_of_the_judge_wins_and_stops_at_two() -> None:
    with judge_server(in_turn("a pear")) as server:
        ask(Judge(spec(server.endpoint, temperature=1.4)))
    assert server.temperatures() == [1.4, 1.9, 2.0]


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble(status=500),
        Trouble(status=429),
        Trouble(hang_up=True),
        Trouble(body=b"<html>gateway</html>"),
        Trouble(body=b'{"choices": []}'),
        Trouble(body=b'["a", "list"]'),
        Trouble(body=b'{"choices": [{"message": {"content": "0.5"}}], "usage": {"prompt_tokens": 1e999}}'),
    ],
)
def test_service_in_trouble_is_asked_again(trouble: Trouble) -> None:
    waits: list[float] = []
    with judge_server(in_turn(trouble, trouble, "0.5")) as server:
        judge = Judge(spec(server.endpoint), wait=waits.append)
        assert ask(judge).value == 0.5
    assert judge.use.retried == 2
    assert len(waits) == 2
    assert 0.5 <= waits[0] <= 1.5
    assert 1.0 <= waits[1] <= 3.0


def test_retry_after_is_obeyed_up_to_a_minute() -> None:
    waits: list[float] = []
    says = ["7", "9999", "Wed, 21 Oct 2026 07:28:00 GMT"]

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        return "0.5" if before == 3 else Trouble(status=429, headers={"Retry-After": says[before]})

    with judge_server(say) as server:
        assert ask(Judge(spec(server.endpoint), wait=waits.append)).value == 0.5
    assert waits[:2] == [7.0, 60.0]
    assert 2.0 <= waits[2] <= 6.0


@pytest.mark.parametrize("trouble", [Trouble(stall_s=5), Trouble(drip_s=5)])
def test_stalling_service_is_given_up_in_time(trouble: Trouble) -> None:
    started = time.monotonic()
    with judge_server(in_turn(trouble, "0.5")) as server:
        judge = Judge(spec(server.endpoint, timeout_s=0.2), wait=no_wait)
        assert ask(judge).value == 0.5
    assert judge.use.retried == 1
    assert time.monotonic() - started < 3


def test_one_question_without_an_answer_has_no_verdict_and_three_end_the_run() -> None:
    def say(body: dict[str, Any], before: int) -> str | Trouble:
        return Trouble(status=503) if "bad" in body["messages"][0]["content"] else "0.5"

    with judge_server(say) as server:
        judge = Judge(spec(server.endpoint, attempts=2), wait=no_wait)
        assert ask(judge, "bad 1") == Verdict(None, "", "no answer after 2 requests: it answers 503")
        assert ask(judge, "bad 2").value is None
        assert ask(judge, "good").value == 0.5
        assert [ask(judge, f"bad {number}").value for number in (3, 4)] == [None, None]
        with pytest.raises(JudgeError, match="no answer to 3 questions in a row") as raised:
            ask(judge, "bad 5")
    assert raised.value.retry
    assert "not asked again" in raised.value.do


def test_no_service_at_all_says_so() -> None:
    with judge_server(in_turn("0.5")) as server:
        pass
    judge = Judge(spec(server.endpoint, attempts=1), wait=no_wait)
    assert "refused" in ask(judge).reason
    ask(judge)
    with pytest.raises(JudgeError, match="Connection refused"):
        ask(judge)


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_key_names_the_environment_variable(status: int) -> None:
    with (
        judge_server(in_turn(Trouble(status=status, body=b"bad key"))) as server,
        pytest.raises(JudgeError, match=rf"answers {status} \(bad key\).*JUDGE_TOKEN"),
    ):
        ask(Judge(spec(server.endpoint, key_from="JUDGE_TOKEN")))


def test_unknown_model_is_named() -> None:
    with (
        judge_server(in_turn(Trouble(status=404, body=b"no model"))) as server,
        pytest.raises(JudgeError, match='404 for the model "judge"'),
    ):
        ask(Judge(spec(server.endpoint)))


def test_redirect_does_not_take_the_key_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_JUDGE_KEY", "secret")
    with judge_server(in_turn("0.5")) as other:
        elsewhere = {"Location": f"{other.endpoint}/chat/completions"}
        with (
            judge_server(in_turn(Trouble(status=302, headers=elsewhere))) as server,
            pytest.raises(JudgeError, match="302"),
        ):
            ask(Judge(spec(server.endpoint)))
        assert other.bodies == []


def test_question_that_the_service_refuses_has_no_verdict_but_a_service_that_takes_none_ends_the_run() -> None:
    def say(body: dict[str, Any], before: int) -> str | Trouble:
        bad = "bad" in body["messages"][0]["content"]
        return Trouble(status=400, body=b"content filter") if bad else "0.5"

    with judge_server(say) as server:
        judge = Judge(spec(server.endpoint))
        assert ask(judge, "bad 1").reason == "it answers 400: content filter"
        assert ask(judge, "good").value == 0.5
        assert [ask(judge, f"bad {number}").value for number in (2, 3, 4)] == [None] * 3
        other = Judge(spec(server.endpoint))
        assert [ask(other, f"bad {number}").value for number in (1, 2)] == [None] * 2
        with pytest.raises(JudgeError, match="answers 400"):
            ask(other, "bad 3")


def test_answer_without_content_and_thoughts_are_no_answer() -> None:
    def say(body: dict[str, Any], before: int) -> str | Trouble:
        if before == 0:
            return Trouble(body=json.dumps(completion(None)).encode())
        return "<think>\nmaybe 0.1\n</think>\n\n0.9"

    with judge_server(say) as server:
        judge = Judge(spec(server.endpoint))
        assert ask(judge) == Verdict(0.9, "0.9")
    assert judge.use.unreadable == 1


def test_answer_is_asked_once_and_cached_by_content(tmp_path: Path) -> None:
    with judge_server(in_turn("0.5")) as server:
        ask(Judge(spec(server.endpoint), cache=tmp_path))
        again = Judge(spec(server.endpoint), cache=tmp_path)
        assert ask(again).value == 0.5
        assert (again.use.requests, again.use.cached, again.use.served) == (0, 1, ["judge-2024-01-01"])
        ask(again, "Another question?")
        ask(Judge(spec(server.endpoint, temperature=0.3), cache=tmp_path))
        ask(Judge(spec(server.endpoint).model_copy(update={"model": "other"}), cache=tmp_path))
        assert len(server.bodies) == 4


def test_nonsense_is_not_cached_and_a_damaged_entry_is_asked_again(tmp_path: Path) -> None:
    with judge_server(in_turn("a pear", "0.5")) as server:
        assert ask(Judge(spec(server.endpoint, readings=1), cache=tmp_path)).value is None
        assert list(tmp_path.rglob("*.json")) == []
        assert ask(Judge(spec(server.endpoint), cache=tmp_path)).value == 0.5
        (entry,) = tmp_path.rglob("*.json")
        entry.write_text("{", encoding="utf-8")
        assert ask(Judge(spec(server.endpoint), cache=tmp_path)).value == 0.5
        assert len(server.bodies) == 3


def test_rate_limit_spaces_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with judge_server(in_turn("0.5")) as server:
        judge = Judge(spec(server.endpoint, requests_per_minute=60), wait=waits.append)
        for number in range(3):
            ask(judge, str(number))
    # The clock goes on a little while the requests are served.
    assert len(waits) == 2
    assert 0.5 < waits[0] <= 1
    assert 1.5 < waits[1] <= 2


def test_stopped_judge_asks_nothing_and_wakes_those_that_wait() -> None:
    with judge_server(in_turn(Trouble(status=500))) as server:
        judge = Judge(spec(server.endpoint))
        thread = threading.Timer(0.1, judge.stop)
        thread.start()
        started = time.monotonic()
        assert ask(judge).reason == "stopped"
        assert time.monotonic() - started < 2
        asked = len(server.bodies)
        assert ask(judge).reason == "stopped"
        assert len(server.bodies) == asked
        thread.join()


@pytest.mark.parametrize("endpoint", ["judge.example/v1", "https://me:secret@judge.example/v1", "https://a/v1?key=b"])
def test_address_with_a_secret_or_without_a_scheme_is_refused(endpoint: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="without user, password or query"):
        spec(endpoint)
