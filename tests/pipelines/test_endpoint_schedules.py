"""Schedules on an endpoint, and the server of these tests."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from manyeyes.errors import PipelineError
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.endpoint_runs import find_pipeline_version
from manyeyes.kubeflow.uploading import create_schedule, delete_schedule, make_trigger
from tests.pipelines.endpoint_toys import Answer, add_version
from tests.pipelines.kfp_server import Fault, Kubeflow, check_model


def test_schedule_is_made_listed_switched_and_deleted(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    create = ("pipeline", "schedule", "create", "train", "--cron", "0 2 * * *", "--name", "nightly", "--set", "a.b=1")
    made = manyeyes(*create)
    assert made.code == 0, made.err
    (schedule,) = kubeflow.schedules
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert schedule["mode"] == "ENABLE"
    assert schedule["no_catchup"] is True
    assert schedule["runtime_config"]["parameters"] == {"recipe_overrides": "a.b=1"}

    assert "was there already" in manyeyes(*create).out
    other = manyeyes("pipeline", "schedule", "create", "train", "--every", "6h", "--name", "nightly")
    assert other.code == 2
    assert "does something else" in other.err
    assert len(kubeflow.schedules) == 1

    assert "cron 0 0 2 * * *, on" in manyeyes("pipeline", "schedule", "list").out
    assert manyeyes("pipeline", "schedule", "disable", "nightly").code == 0
    assert ", off" in manyeyes("pipeline", "schedule", "list").out
    assert manyeyes("pipeline", "schedule", "enable", "nightly").code == 0
    assert kubeflow.schedules[0]["status"] == "ENABLED"
    unknown = manyeyes("pipeline", "schedule", "delete", "nightli")
    assert 'Did you mean "nightly"?' in unknown.err
    assert manyeyes("pipeline", "schedule", "delete", "nightly").code == 0
    assert kubeflow.schedules == []


@pytest.mark.parametrize("kind", ["drop", "timeout", 500])
def test_schedule_whose_answer_is_lost_is_made_once(endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str) -> None:
    add_version(kubeflow)
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [Fault("POST", "/recurringruns$", kind, takes_effect=True)]
    options = {"name": "weekly", "trigger": make_trigger(every="1w"), "parameters": {}}
    create_schedule(endpoint, find_pipeline_version(endpoint, "train"), **options)
    assert [each["display_name"] for each in kubeflow.schedules] == ["weekly"]
    assert kubeflow.schedules[0]["trigger"] == {"periodic_schedule": {"interval_second": "604800"}}


def test_delete_whose_answer_is_lost_is_no_error(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    version = find_pipeline_version(endpoint, "train")
    create_schedule(endpoint, version, name="weekly", trigger=make_trigger(every="30m"), parameters={})
    kubeflow.faults = [Fault("DELETE", "/recurringruns/", "drop", takes_effect=True)]
    delete_schedule(endpoint, "weekly")
    assert kubeflow.schedules == []


@pytest.mark.parametrize(
    "when", [{}, {"cron": "0 2 * * *", "every": "6h"}, {"cron": "0 2 *"}, {"every": "6 hours"}, {"every": "0h"}]
)
def test_wrong_time_says_what_is_right(when: dict[str, str]) -> None:
    with pytest.raises(PipelineError):
        make_trigger(**when)


def test_strict_models_see_an_unknown_field_and_a_wrong_type() -> None:
    assert check_model({"run_id": "a", "state": "SUCCEEDED"}, "V2beta1Run", "run") == []
    wrong = {"runs": [{"run_id": 1, "stat": "x", "state": "DONE", "created_at": "yesterday"}]}
    problems = check_model(json.loads(json.dumps(wrong)), "V2beta1ListRunsResponse", "runs")
    assert len(problems) == 4
