"""What a client does for data: it keeps to a sum of money, slows down, and keeps what it could not read."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest

from manyeyes.errors import ServiceError
from manyeyes.recipe.service import ServiceSpec
from manyeyes.web.chat_client import ChatClient, Verdict, ask_each
from tests.judge_server import Trouble, completion, in_turn, judge_server

# Of the server's completions, 100 prompt tokens and 10 answered ones, at these prices.
PRICES = {"price_in": 1000.0, "price_out": 10_000.0}
ONE = 0.2


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def client(endpoint: str, cache: Path | None = None, *, keep: bool = False, **changes: Any) -> ChatClient:
    spec = ServiceSpec(endpoint=endpoint, model="writer", key_from="NO_KEY", **changes)
    return ChatClient(spec, cache=cache, wait=lambda _seconds: None, keep_unreadable=keep)


def ask(asked: ChatClient, content: str, *, whole: bool = False) -> Verdict[str]:
    def read(text: str) -> str | None:
        return None if "nonsense" in text else text

    messages = [{"role": "user", "content": content}]
    return asked.ask(messages, read=read, temperature=0.5, max_tokens=10, whole=whole)


def test_nothing_is_asked_that_may_cost_more_than_is_left_and_earlier_answers_count(tmp_path: Path) -> None:
    with judge_server(in_turn("yes")) as server:
        limited = client(server.endpoint, tmp_path, max_cost=0.75, **PRICES)
        answered = [ask(limited, str(number)).value for number in range(3)]
        with pytest.raises(ServiceError, match=r"another question may cost more than what is left of 0\.75"):
            ask(limited, "3")
        # A question is about 120 bytes, so the third may cost 0.22 where 0.35 are left, and the fourth does not fit.
        assert limited.use.cost == pytest.approx(len(answered) * ONE)
        assert len(answered) == len(server.bodies) == 3
        again = client(server.endpoint, tmp_path, max_cost=0.75, **PRICES)
        assert [ask(again, str(number)).value for number in range(3)] == answered
        assert (again.use.cost, again.spent) == (0.0, pytest.approx(3 * ONE))
        with pytest.raises(ServiceError, match="Raise max_cost"):
            ask(again, "3")


def test_requests_at_a_time_never_spend_more_than_the_limit_together() -> None:
    with judge_server(in_turn("yes")) as server:
        limited = client(server.endpoint, max_cost=1.0, concurrency=8, **PRICES)
        done = []
        with pytest.raises(ServiceError, match="is spent"):
            done.extend(ask_each(lambda number: ask(limited, str(number)), range(99), limited))
        assert len(server.bodies) * ONE <= 1.0


def test_a_service_that_counts_no_tokens_costs_the_most_that_it_can() -> None:
    uncounted = completion("yes") | {"usage": None}
    with judge_server(in_turn(Trouble(body=json.dumps(uncounted).encode()))) as server:
        asked = client(server.endpoint, **PRICES)
        ask(asked, "a")
        sent = len(json.dumps(server.bodies[0]))
        assert asked.use.cost == pytest.approx((sent * 1000 + 10 * 10_000) / 1e6)


def test_a_limit_without_prices_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="max_cost needs price_in and price_out"):
        client("http://a.example/v1", max_cost=1.0)


def test_answers_that_cannot_be_read_are_kept_and_not_asked_for_again_unless_told_to(tmp_path: Path) -> None:
    with judge_server(in_turn("nonsense")) as server:
        first = ask(client(server.endpoint, tmp_path, keep=True), "a")
        assert first == Verdict(None, "nonsense", "3 answers made no sense, the last: 'nonsense'")
        kept = client(server.endpoint, tmp_path, keep=True, **PRICES)
        assert ask(kept, "a") == first
        assert kept.spent == pytest.approx(3 * ONE)
        assert len(server.bodies) == 3
        ask(client(server.endpoint, tmp_path, keep=False), "a")
        assert len(server.bodies) == 6


def test_an_answer_that_was_cut_off_is_none_where_a_whole_one_is_needed() -> None:
    cut = completion("half of a senten")
    cut["choices"][0]["finish_reason"] = "length"
    with judge_server(in_turn(Trouble(body=json.dumps(cut).encode()))) as server:
        assert ask(client(server.endpoint), "a").value == "half of a senten"
        refused = ask(client(server.endpoint, readings=1), "a", whole=True)
    assert refused == Verdict(None, "half of a senten", "the answer was cut off (length)")


def test_half_of_a_surrogate_pair_is_no_reason_to_fail(tmp_path: Path) -> None:
    odd = json.dumps(completion("odd \ud83d end")).encode()
    with judge_server(in_turn(Trouble(body=odd))) as server:
        assert ask(client(server.endpoint, tmp_path), "a").value == "odd ? end"


def test_a_busy_service_is_asked_less_at_a_time_and_then_more_again() -> None:
    under_way, most, lock = 0, [0, 0], threading.Lock()
    calls = 0

    def say(_body: dict[str, Any], before: int) -> str | Trouble:
        nonlocal under_way, calls
        with lock:
            calls += 1
            under_way += 1
            phase = 0 if calls <= 8 else 1
            most[phase] = max(most[phase], under_way)
            refuse = phase == 0 and before == 0
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return Trouble(status=429) if refuse else "yes"

    with judge_server(say) as server:
        asked = client(server.endpoint, concurrency=8, attempts=9)
        found = list(ask_each(lambda number: ask(asked, str(number)).value, range(24), asked))
    assert found == ["yes"] * 24
    assert most[0] > 1
    assert 1.0 <= asked._pace._limit <= 8.0
    pace = asked._pace
    pace._limit = 8.0
    pace.lower_limit(time.monotonic())
    pace.lower_limit(0.0)  # sent before the limit was lowered
    assert pace._limit == 4.0
    for _ in range(5):
        pace.raise_limit()
    assert 5.0 <= pace._limit < 5.5


def test_an_error_ends_a_run_of_any_length_without_taking_all_questions() -> None:
    taken = []

    def questions() -> Any:
        for number in range(10_000):
            taken.append(number)
            yield number

    with judge_server(in_turn(Trouble(status=401))) as server:
        asked = client(server.endpoint, concurrency=2)
        with pytest.raises(ServiceError, match="a key that it takes"):
            list(ask_each(lambda number: ask(asked, str(number)), questions(), asked))
    assert len(taken) < 50
