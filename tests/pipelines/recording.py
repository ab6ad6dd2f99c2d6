"""Answers of a real Kubeflow Pipelines 2.17.0, cut down to what ``manyeyes pipeline status`` reads.

``python -m tests.pipelines.recording RUN OUT.json`` records a run of KFP_ENDPOINT: the run, its workflow, and the end
of each log. Addresses and the pipeline itself are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"
_RUN = ("run_id", "display_name", "state", "created_at", "state_history")
_TASK = ("task_id", "display_name", "start_time", "end_time", "state", "child_tasks")
_NODE = ("id", "name", "type", "templateName", "phase", "message", "startedAt", "finishedAt")
_LOG_CHARACTERS = 4000


def trim_run(run: dict[str, Any]) -> dict[str, Any]:
    """What is read of ``GET /apis/v2beta1/runs/ID``."""
    tasks = run["run_details"]["task_details"]
    kept = [{key: task[key] for key in _TASK if key in task} for task in tasks]
    return {**{key: run[key] for key in _RUN if key in run}, "run_details": {"task_details": kept}}


def trim_workflow(manifest: dict[str, Any]) -> dict[str, Any]:
    """What is read of a workflow; a step's inputs and memory are what stays of its pod's patch."""
    templates = []
    for template in manifest["spec"]["templates"]:
        tasks = (template.get("dag") or {}).get("tasks") or []
        templates.append({"name": template["name"], "dag": {"tasks": [_trim_task(task) for task in tasks]}})
    spec = {key: manifest["spec"][key] for key in ("entrypoint", "activeDeadlineSeconds") if key in manifest["spec"]}
    status = manifest["status"]
    nodes = {key: _trim_node(node) for key, node in status["nodes"].items()}
    metadata = manifest["metadata"]
    annotations = {key: value for key, value in metadata["annotations"].items() if key.endswith("pod-name-format")}
    return {
        "metadata": {"name": metadata["name"], "annotations": annotations},
        "spec": {**spec, "templates": templates},
        "status": {"phase": status["phase"], "message": status.get("message", ""), "nodes": nodes},
    }


def _trim_task(task: dict[str, Any]) -> dict[str, Any]:
    kept = {key: task[key] for key in ("name", "template", "depends", "hooks") if key in task}
    parameters = (task.get("arguments") or {}).get("parameters") or []
    for parameter in parameters:
        if parameter["name"] == "task":
            spec = json.loads(parameter["value"])
            spec = {key: spec[key] for key in ("taskInfo", "componentRef") if key in spec}
            kept["arguments"] = {"parameters": [{"name": "task", "value": json.dumps(spec)}]}
    return kept


def _trim_node(node: dict[str, Any]) -> dict[str, Any]:
    kept = {key: node[key] for key in _NODE if node.get(key) is not None}
    outputs = {each["name"]: each.get("value", "") for each in (node.get("outputs") or {}).get("parameters") or []}
    if node["type"] == "Pod" and outputs.get("pod-spec-patch"):
        container = json.loads(outputs["pod-spec-patch"])["containers"][0]
        words = container["command"]
        given = json.loads(words[words.index("--executor_input") + 1])["inputs"]
        launch = [words[0], "--executor_input", json.dumps({"inputs": given})]
        patch = {"containers": [{"name": "main", "command": launch, "resources": container.get("resources") or {}}]}
        outputs["pod-spec-patch"] = json.dumps(patch)
    if node["type"] == "Pod" and outputs:
        names = ("pod-spec-patch", "cached-decision", "condition")
        kept["outputs"] = {"parameters": [{"name": key, "value": outputs[key]} for key in names if key in outputs]}
    return kept


def _trim_log(log: str) -> str:
    """Without what the driver writes of the object store."""
    return "".join(line for line in log.splitlines(True) if "store_session_info" not in line)[-_LOG_CHARACTERS:]


def record(run_id: str, out: Path) -> None:
    """Record a run of the endpoint that the environment names."""
    from manyeyes.kubeflow.endpoint import Endpoint, EndpointSettings
    from manyeyes.kubeflow.run_status import read_status

    with Endpoint(EndpointSettings.from_environment()) as endpoint:
        run = endpoint.runs.run_service_get_run(run_id)
        plain = endpoint._client.sanitize_for_serialization(run)
        manifest = json.loads(endpoint.workflow_of(run_id) or "{}")
        pods = [attempt.pod for step in read_status(endpoint, run).steps for attempt in step.attempts]
        logs = {pod: _trim_log(endpoint.log_of(run_id, pod) or "") for pod in pods}
    kept = {"run": trim_run(plain), "workflow": trim_workflow(manifest), "logs": {k: v for k, v in logs.items() if v}}
    text = json.dumps(kept, separators=(",", ":")).replace("localhost/", "registry.example/")
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
