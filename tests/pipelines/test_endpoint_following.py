"""What a person sees of a run on an endpoint: progress, the error of a step, status.

Here the endpoint hands out no workflow, so that all is told from the API's own tasks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from manyeyes.harness.events import error_line
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.run_status import Failure, RunStatus, failures_of, follow_run, read_status
from tests.pipelines.checkout import ROOT
from tests.pipelines.endpoint_toys import REFUSAL, Answer, snapshot, started_run, task
from tests.pipelines.kfp_server import Fault, Kubeflow


def status_of(endpoint: Endpoint, run_id: str) -> RunStatus:
    return read_status(endpoint, endpoint.runs.run_service_get_run(run_id))


def test_follow_shows_each_change_once_and_none_of_the_machinery(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [
        snapshot("RUNNING", task("resolve-data", "RUNNING"), task("sft", "PENDING")),
        snapshot("RUNNING", task("resolve-data", "RUNNING")),
        snapshot("RUNNING", task("resolve-data", "SUCCEEDED"), task("sft", "RUNNING")),
        snapshot("SUCCEEDED", task("resolve-data", "SUCCEEDED"), task("sft", "SUCCEEDED")),
    ]
    lines: list[str] = []
    ended = follow_run(endpoint, run.run_id, say=lines.append, poll_s=0.01)
    assert ended.run.state == "SUCCEEDED"
    told = [" ".join(line.split()[1:]) for line in lines]
    assert told == [
        "resolve data running",
        f"run {run.display_name}: running",
        "resolve data succeeded 90 s",
        "sft running",
        "sft succeeded 90 s",
        f"run {run.display_name}: succeeded",
    ]


def test_iterations_of_a_loop_are_told_apart(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    first, second = task("prealign-encoder", "SUCCEEDED"), task("prealign-encoder", "RUNNING", task_id="later")
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING", second, first)] * 4 + [snapshot("SUCCEEDED", first)]
    lines: list[str] = []
    follow_run(endpoint, run.run_id, say=lines.append, poll_s=0.01)
    told = [" ".join(line.split()[1:]) for line in lines if "prealign" in line]
    assert told == ["prealign encoder succeeded 90 s", "prealign encoder #2 running"]


def test_follow_waits_for_an_endpoint_that_is_away(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("SUCCEEDED")]
    kubeflow.faults = [
        Fault("GET", "/runs/", 503, times=6),
        Fault("GET", "/runs/", "drop", times=6),
        Fault("GET", "/runs/", 500, times=1),
    ]
    lines: list[str] = []
    assert follow_run(endpoint, run.run_id, say=lines.append, poll_s=0.01).state == "SUCCEEDED"
    assert sum("waiting for it" in line for line in lines) == 1


@pytest.mark.parametrize(("user_error", "code"), [(True, 2), (False, 1)])
def test_failed_run_shows_the_error_of_its_step_and_exits_as_the_step_did(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow, user_error: bool, code: int
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    report = REFUSAL.model_copy(update={"user_error": user_error})
    failed = snapshot(
        "FAILED", task("resolve-data", "SUCCEEDED", "pod-1"), task("validate-data", "FAILED", "a", "pod-2")
    )
    kubeflow.scripts[run.run_id] = [failed]
    kubeflow.logs[run.run_id, "pod-2"] = f"I1122 launcher\nTraceback ...\n{error_line(report)}I1122 exit status 2\n"
    followed = manyeyes("pipeline", "status", run.display_name, "--follow", "--poll", "0.01")
    assert followed.code == code
    for text in ("validate data: ValidationError", REFUSAL.found, REFUSAL.needed, REFUSAL.do):
        assert text in followed.err
    asked = manyeyes("pipeline", "status", run.run_id)
    assert asked.code == 0
    assert "validate data" in asked.out
    assert REFUSAL.found in asked.err


def test_log_is_read_through_the_ui_where_the_gateway_lets_only_that_through(
    endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    kubeflow.only_ui = True
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED", task("validate-data", "FAILED", "pod"))]
    kubeflow.logs[run.run_id, "pod"] = error_line(REFUSAL)
    assert failures_of(endpoint, status_of(endpoint, run.run_id)) == [Failure("validate data", REFUSAL)]


def test_step_that_died_without_a_word_says_where_to_look(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED", task("sft", "FAILED", "gone"))]
    (failure,) = failures_of(endpoint, follow_run(endpoint, run.run_id, say=lambda _line: None, poll_s=0.01))
    assert (failure.name, failure.report.user_error) == ("sft", False)
    assert f"pipeline/runid={run.run_id}" in failure.report.do


def test_words_of_the_backend_are_shown_where_the_step_has_none(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [
        snapshot("FAILED", task("sft", "FAILED"), error={"code": 13, "message": "workflow exceeded its deadline"})
    ]
    (failure,) = failures_of(endpoint, follow_run(endpoint, run.run_id, say=lambda _line: None, poll_s=0.01))
    assert failure.report.found == "workflow exceeded its deadline"


def test_tasks_that_never_started_are_said_to_be_so(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING", task("gate", "PENDING"), task("sft", "RUNNING"))]
    told = [(step.name, step.state, step.seconds) for step in status_of(endpoint, run.run_id).steps]
    assert told == [("sft", "running", None), ("gate", "not started", None)]


def test_status_lists_runs_and_refuses_an_unknown_one(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    assert "no runs yet" in manyeyes("pipeline", "status").out
    run, _ = started_run(endpoint, kubeflow)
    assert run.display_name in manyeyes("pipeline", "status").out
    for unknown in ("nightly", "00000000-0000-0000-0000-000000000000"):
        answer = manyeyes("pipeline", "status", unknown)
        assert answer.code == 2
        assert "manyeyes pipeline status" in answer.err


def test_a_run_that_failed_goes_on_and_one_that_runs_is_left_alone(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    refused = manyeyes("pipeline", "retry", run.run_id)
    assert refused.code == 2
    assert "is pending" in refused.err
    kubeflow.runs[0]["state"] = "FAILED"
    answer = manyeyes("pipeline", "retry", run.display_name)
    assert (answer.code, kubeflow.runs[0]["state"]) == (0, "RUNNING")
    assert "goes on" in answer.out
    assert kubeflow.calls("POST", ":retry$") == 1


@pytest.mark.parametrize("takes_effect", [True, False])
def test_a_retry_whose_answer_is_lost_is_asked_for_once(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow, takes_effect: bool
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.runs[0]["state"] = "FAILED"
    kubeflow.faults = [Fault("POST", ":retry$", "drop", takes_effect=takes_effect)]
    answer = manyeyes("pipeline", "retry", run.run_id)
    assert answer.code == (0 if takes_effect else 2), answer.err
    assert kubeflow.calls("POST", ":retry$") == 1


def test_looking_at_an_endpoint_makes_nothing_there(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.requests.clear()
    for look in (["status"], ["status", run.run_id], ["status", run.display_name], ["schedule", "list"]):
        assert manyeyes("pipeline", *look).code == 0
    assert {method for method, _, _ in kubeflow.requests} == {"GET"}


def test_terminated_run_exits_1(manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("CANCELED")]
    answer = manyeyes("pipeline", "status", run.run_id, "--follow", "--poll", "0.01")
    assert answer.code == 1
    assert "canceled" in answer.err


def test_ctrl_c_leaves_the_run_going_and_says_how_to_follow_again(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING", task("sft", "RUNNING"))]
    # In the background of a shell Ctrl-C is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "manyeyes.cli.main", "pipeline", "status", run.run_id, "--follow", "--poll", "0.05"],
        env={**os.environ, "KFP_ENDPOINT": kubeflow.url, "PYTHONPATH": str(ROOT / "models")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 30
    while kubeflow.calls("GET", f"/runs/{run.run_id}") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"manyeyes pipeline status {run.run_id} --follow" in err
    assert "Traceback" not in err
    assert kubeflow.calls("POST", "terminate") == 0
