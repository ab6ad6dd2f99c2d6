"""A pipeline, runs and tasks as an API server tells them, for tests of the command line against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manyeyes.harness.events import ErrorReport
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.endpoint_runs import find_pipeline_version, start_run
from tests.pipelines.kfp_server import EPOCH, Kubeflow

DIGEST = "0123456789ab" + "c" * 52
IMAGE = f"registry.example/team/manyeyes-steps@sha256:{DIGEST}"
SECRET = "s3cr3t-t0ken-value"
REFUSAL = ErrorReport(
    step="validate_data",
    error="ValidationError",
    found="12 conversations without an image",
    needed="one image each",
    do="Read the quarantine file.",
    retry=False,
    user_error=True,
)


@dataclass
class Answer:
    """What a command line did."""

    code: int
    out: str
    err: str


def add_version(state: Kubeflow, name: str = "train") -> None:
    """A pipeline with one version, as an upload leaves it."""
    parameters = {
        "recipe": {"parameterType": "STRING", "defaultValue": "tiny", "literals": ["tiny", "large"]},
        "recipe_overrides": {"parameterType": "STRING", "defaultValue": ""},
        "data_md5": {"parameterType": "STRING", "defaultValue": ""},
        "rounds": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1},
    }
    spec = {"root": {"inputDefinitions": {"parameters": parameters}}}
    state.pipelines.append({"pipeline_id": "p1", "display_name": name, "created_at": state.now()})
    state.versions.append(
        {
            "pipeline_id": "p1",
            "pipeline_version_id": "v1",
            "display_name": "0.1.0-abc-def",
            "created_at": state.now(),
            "pipeline_spec": {"pipeline_spec": spec, "platform_spec": {}},
        }
    )


def task(name: str, state: str, *pods: str, **fields: Any) -> dict[str, Any]:
    """A node as the API server tells it: no error, no pod of its own, only its children's pods."""
    return {
        "run_id": "r",
        "task_id": f"id-{name}",
        "display_name": name,
        "create_time": "2026-11-22T01:00:00Z",
        "start_time": "2026-11-22T01:00:00Z" if state != "PENDING" else EPOCH,
        "end_time": "2026-11-22T01:01:30Z" if state in ("SUCCEEDED", "FAILED") else EPOCH,
        "state": state,
        "execution_id": "0",
        "child_tasks": [{"pod_name": pod} for pod in pods],
        **fields,
    }


def snapshot(state: str, *tasks: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A run as the API server tells it, its own machinery among the tasks."""
    machinery = [task("root", state, "x"), task("root-driver", "SUCCEEDED"), task("executor", state)]
    return {"state": state, "run_details": {"task_details": [*machinery, *tasks]}, **fields}


def started_run(endpoint: Endpoint, state: Kubeflow, **options: Any) -> Any:
    """A run of the pipeline ``train``, which is made when it is not there."""
    if not state.pipelines:
        add_version(state)
    version = find_pipeline_version(endpoint, "train")
    return start_run(endpoint, version, pipeline="train", parameters={"recipe": "tiny"}, **options)
