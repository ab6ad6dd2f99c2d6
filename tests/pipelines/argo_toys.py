"""A small Argo workflow as Kubeflow Pipelines 2.17 compiles it, and its status as Argo writes it.

The pipeline: ``resolve-data``, then ``prealign-encoder`` in a loop, ``sft`` (with retries), ``evaluate-2``, which the
pipeline calls "evaluate the bundle", and ``summarise-run`` as exit handler. Recorded answers of a real Kubeflow are in
``recorded/``; these here are for what is hard to bring about.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

WORKFLOW = "train-c7mpl"
GROUP = "root.exit-handler-1"
ITERATION = f"{GROUP}.for-loop-1.iteration-iterations({{0}}:{{0}}).iteration-item"


def fnv32a(text: str) -> int:
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _driver(name: str, template: str, depends: str = "", **spec: Any) -> dict[str, Any]:
    task = {"name": f"{name}-driver", "template": template, "depends": depends}
    spec = {"taskInfo": {"name": name}, "componentRef": {"name": f"comp-{name}"}, **spec}
    return {**task, "arguments": {"parameters": [{"name": "task", "value": json.dumps(spec)}]}}


def make_step(name: str, depends: str = "", *, retries: bool = False, **spec: Any) -> list[dict[str, Any]]:
    executor = ("retry-" if retries else "") + "system-container-executor"
    return [
        _driver(name, "system-container-driver", depends, **spec),
        {"name": name, "template": executor, "depends": f"{name}-driver.Succeeded"},
    ]


def _group(name: str, template: str, **more: Any) -> list[dict[str, Any]]:
    inner = {"name": name, "template": template, "depends": f"{name}-driver.Succeeded", **more}
    return [_driver(name, "system-dag-driver"), inner]


TEMPLATES: dict[str, list[dict[str, Any]]] = {
    "entrypoint": _group("root", "root"),
    "root": _group(
        "exit-handler-1", "comp-exit-handler-1", hooks={"exit": {"template": "exit-hook-root-summarise-run"}}
    ),
    "comp-exit-handler-1": [
        *make_step("evaluate-2", "sft.Succeeded", taskInfo={"name": "evaluate the bundle"}),
        {"name": "for-loop-1", "template": "comp-for-loop-1-for-loop-1-iterator", "depends": "resolve-data.Succeeded"},
        *make_step("resolve-data"),
        *make_step("sft", "for-loop-1.Succeeded", retries=True),
    ],
    "comp-for-loop-1-for-loop-1-iterator": [
        _driver("iteration", "system-dag-driver"),
        {
            "name": "iteration-iterations",
            "template": "comp-for-loop-1-iteration",
            "depends": "iteration-driver.Succeeded",
        },
    ],
    "comp-for-loop-1-iteration": _group("iteration-item", "comp-for-loop-1"),
    "comp-for-loop-1": make_step("prealign-encoder"),
    "exit-hook-root-summarise-run": make_step("summarise-run"),
}


def node(name: str, phase: str, kind: str = "Pod", *, at: int = 0, took: int = 30, **fields: Any) -> dict[str, Any]:
    """One node; ``name`` without the workflow's. Argo's name for it and its id are made here."""
    whole = f"{WORKFLOW}.{name}" if name else WORKFLOW

    def moment(second: int) -> str:
        return f"2026-11-28T01:{second // 60:02}:{second % 60:02}Z"

    over = phase not in ("Pending", "Running")
    return {
        "id": f"{WORKFLOW}-{fnv32a(whole)}" if name else WORKFLOW,
        "name": whole,
        "type": kind,
        "phase": phase,
        "startedAt": moment(at),
        "finishedAt": moment(at + took) if over else None,
        **fields,
    }


def driver(
    name: str,
    phase: str = "Succeeded",
    *,
    at: int = 0,
    inputs: Mapping[str, Any] | None = None,
    cached: bool = False,
    memory: str = "4Gi",
    **fields: Any,
) -> dict[str, Any]:
    """The driver's pod of a step, with what it hands to the step's pod."""
    launch = ["/kfp-launcher/launch", "--executor_input", json.dumps({"inputs": {"parameterValues": inputs or {}}})]
    patch = {"containers": [{"name": "main", "command": launch, "resources": {"limits": {"memory": memory}}}]}
    outputs = [
        {"name": "pod-spec-patch", "value": "" if cached else json.dumps(patch)},
        {"name": "cached-decision", "value": "true" if cached else "false"},
        {"name": "condition", "value": "true"},
    ]
    more = {"outputs": {"parameters": outputs}} if phase == "Succeeded" else {}
    return node(f"{name}-driver", phase, at=at, took=10, templateName="system-container-driver", **more, **fields)


def step(
    name: str, phase: str, *, at: int = 20, took: int = 30, message: str = "", around: str = "", **given: Any
) -> list[dict[str, Any]]:
    """Driver, group and pod of a step without retries."""
    return [
        driver(name, at=at - 15, **given),
        node(name, around or phase, "DAG", at=at, took=took, templateName="system-container-executor"),
        node(f"{name}.executor", phase, at=at, took=took, message=message, templateName="system-container-impl"),
    ]


def cached_step(name: str, *, at: int = 20, **given: Any) -> list[dict[str, Any]]:
    return [
        driver(name, at=at - 15, cached=True, **given),
        node(name, "Succeeded", "DAG", at=at, took=0),
        node(f"{name}.executor", "Skipped", "Skipped", at=at, took=0, message="when 'true != true' evaluated false"),
    ]


def tried_step(
    name: str, phases: Sequence[str], *, at: int = 20, message: str = "", goes_on: bool = False, **given: Any
) -> list[dict[str, Any]]:
    """A step with retries: a node around the attempts."""
    around = "Running" if goes_on else phases[-1]
    attempts = [
        node(
            f"{name}.executor({number})",
            phase,
            at=at + 60 * number,
            message=message if phase in ("Failed", "Error", "Pending") else "",
            templateName="retry-system-container-impl",
        )
        for number, phase in enumerate(phases)
    ]
    return [
        driver(name, at=at - 15, **given),
        node(name, around, "DAG", at=at),
        node(f"{name}.executor", around, "Retry", at=at),
        *attempts,
    ]


def groups(phase: str = "Running") -> list[dict[str, Any]]:
    """What is around every step, Kubeflow's defaults for retries included: a node around each DAG."""
    return [
        node("", phase, "Retry"),
        node("root-driver", "Succeeded", templateName="system-dag-driver"),
        node("root", phase, "DAG"),
        node("root.exit-handler-1-driver", "Succeeded", templateName="system-dag-driver"),
        node("root.exit-handler-1", phase, "Retry"),
        node("root.exit-handler-1(0)", phase, "DAG"),
    ]


def manifest(
    nodes: Sequence[dict[str, Any]],
    *,
    phase: str = "Running",
    compressed: bool = False,
    shutdown: str = "",
    message: str = "",
) -> str:
    """``workflow_manifest`` as ``GET /apis/v1beta1/runs/ID`` hands it out."""
    by_id = {each["id"]: each for each in nodes}
    status: dict[str, Any] = {"phase": phase, "message": message, "startedAt": "2026-11-28T01:00:00Z"}
    if compressed:
        packed = gzip.compress(json.dumps(by_id).encode())
        status["compressedNodes"] = base64.b64encode(packed).decode()
    else:
        status["nodes"] = by_id
    templates = [{"name": name, "dag": {"tasks": tasks}} for name, tasks in TEMPLATES.items()]
    templates += [
        {"name": name, "dag": {"tasks": [{"name": "executor"}]}}
        for name in ("system-container-executor", "retry-system-container-executor")
    ]
    spec = {"entrypoint": "entrypoint", "templates": templates, **({"shutdown": shutdown} if shutdown else {})}
    return json.dumps({"metadata": {"name": WORKFLOW}, "spec": spec, "status": status})


SFT, BUNDLE = f"{GROUP}.sft", f"{GROUP}.evaluate-2"
RESOLVED = step(f"{GROUP}.resolve-data", "Succeeded")
ALIGNED = step(f"{ITERATION.format(0)}.prealign-encoder", "Succeeded", at=70, inputs={"encoder": "efficientnet"})
SUMMARY = step(f"{GROUP}.onExit.summarise-run", "Succeeded", at=400)
