"""Preflight asks the judge before anything is trained, against a small server that also fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manyeyes.evaluation.judging.judge import Judge, JudgeError
from manyeyes.recipe import Recipe
from manyeyes.recipe.recipe import JudgeSpec
from manyeyes.steps.preflight import _Findings, check_judge
from tests.judge_server import JudgeServer, Trouble, in_turn, judge_server
from tests.training_toys import toy_recipe

GATE = [{"rule": "floor", "benchmark": "mm-vet", "at_least": 20}]
AWAY = Trouble(status=503)
WRONG_KEY = Trouble(status=401, body=b"no such key")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("MANYEYES_JUDGE_KEY", "MANYEYES_RUN_LOCK"):
        monkeypatch.delenv(name, raising=False)


def recipe(server: JudgeServer | None, *benchmarks: str, gate: Any = ()) -> Recipe:
    values = toy_recipe().model_dump()
    values["evaluation"]["benchmarks"] = benchmarks or ("easy-vqa", "mm-vet")
    if server is not None:
        values["evaluation"]["judge"] = {"endpoint": server.endpoint, "model": "judge"}
    values["gate"] = [*gate, {"rule": "validation"}]
    return Recipe.model_validate(values)


def test_a_judge_that_answers_is_asked_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_JUDGE_KEY", "secret")
    with judge_server(in_turn("OK")) as server:
        (check,) = check_judge(recipe(server, gate=GATE))
    assert check.state == "ok"
    assert check.found == f"judge at {server.endpoint} answers as judge-2024-01-01; mm-vet"
    assert [body["max_tokens"] for body in server.bodies] == [1]
    assert server.keys == ["Bearer secret"]
    assert "secret" not in json.dumps(check.__dict__)


def test_nothing_is_asked_where_no_benchmark_needs_a_judge() -> None:
    with judge_server(in_turn("OK")) as server:
        assert check_judge(recipe(server, "easy-vqa", "textvqa")) == []
        assert server.bodies == []
        # MathVista has rules, and a judge where there is one.
        assert check_judge(recipe(None, "mathvista")) == []
        (check,) = check_judge(recipe(server, "mathvista"))
    assert check.found.endswith("; mathvista")


def test_no_judge_skips_benchmarks_and_fails_a_gate() -> None:
    (check,) = check_judge(recipe(None))
    assert (check.state, check.found) == ("warning", "no judge: mm-vet will be skipped")
    (check,) = check_judge(recipe(None, gate=GATE))
    assert (check.state, check.found) == ("problem", "no judge, and the gate has rules on mm-vet")


def test_a_judge_that_is_away_is_a_warning_and_fails_a_gate_for_now() -> None:
    with judge_server(in_turn(AWAY)) as server:
        (check,) = check_judge(recipe(server))
        assert check.state == "warning"
        assert "it answers 503" in check.found
        assert len(server.bodies) == 1
        findings = _Findings()
        with findings.collecting("judge"):
            check_judge(recipe(server, gate=GATE))
    assert [(check.subject, check.state) for check in findings.checks] == [("judge", "problem")]
    assert findings.retry


@pytest.mark.parametrize(
    ("key", "here", "gate", "state"),
    [
        ("wrong", False, (), "problem"),  # the evaluation would end at it
        ("", True, (), "problem"),
        ("", False, GATE, "problem"),
        ("", False, (), "warning"),  # the steps that evaluate may have one
    ],
)
def test_a_key_that_is_refused_is_named_by_its_variable(
    key: str, here: bool, gate: Any, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYEYES_JUDGE_KEY", key)
    if here:
        monkeypatch.setenv("MANYEYES_RUN_LOCK", "lock")
    with judge_server(in_turn(WRONG_KEY)) as server:
        (check,) = check_judge(recipe(server, gate=gate))
    assert check.state == state
    assert "answers 401 (no such key)" in check.found
    assert "MANYEYES_JUDGE_KEY" in check.do
    assert "mm-vet" in check.do


@pytest.mark.parametrize(
    ("trouble", "retry", "said"),
    [
        (Trouble(status=400, body=b"no model judge"), False, "it answers 400: no model judge"),
        (Trouble(status=404), False, "answers 404"),
        (Trouble(stall_s=5), True, "timed out"),
        (Trouble(body=b"<html>"), True, "no chat completion"),
        (Trouble(hang_up=True), True, "gives no answer"),
    ],
)
def test_probe_says_what_the_service_does(trouble: Trouble, retry: bool, said: str) -> None:
    with judge_server(in_turn(trouble)) as server:
        judge = Judge(JudgeSpec(endpoint=server.endpoint, model="judge", timeout_s=0.3))
        with pytest.raises(JudgeError, match=said) as caught:
            judge.probe()
    assert caught.value.retry == retry
    assert len(server.bodies) == 1


def test_nobody_at_the_address_is_said_so() -> None:
    with judge_server(in_turn("OK")) as server:
        gone = recipe(server)
    (check,) = check_judge(gone)
    assert check.state == "warning"
    assert "Connection refused" in check.found
