"""A stand-in for the Kubernetes API with Kubeflow Trainer, on loopback.

It takes a TrainJob as the published schema says, plays what becomes of its pods, or really runs its nodes as processes
of this machine, and refuses, stalls, fails and evicts on demand.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

from tests.ports import free_port

NAMESPACE = "runs"
ROOT = Path(__file__).parents[1]
_JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


@cache
def trainjob_schema() -> dict[str, Any]:
    """The published schema, refusing unknown fields as ``fieldValidation=Strict`` does."""
    schema: dict[str, Any] = json.loads((ROOT / "tests/trainjob_crd.json").read_text(encoding="utf-8"))
    closed: dict[str, Any] = _closed(schema)
    return closed


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: _closed(value) for name, value in node.items()}
    if node.get("type") == "object" and isinstance(node.get("properties"), dict):
        node.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        node.pop("type", None)
    return node


def refused_fields(manifest: dict[str, Any]) -> list[str]:
    """What the schema, its rules on names and Trainer's webhook have against a TrainJob."""
    validator = jsonschema.Draft202012Validator(trainjob_schema())
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]
    name = manifest["metadata"]["name"]
    # The longest name that JobSet makes of it, with Trainer's own service name, has 63 characters at most.
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(f"{name}-node-0-99999") > 63:
        found.append(f"metadata.name: {name}")
    env = [variable["name"] for variable in manifest["spec"]["trainer"].get("env", [])]
    found += [f"spec.trainer.env: reserved {each}" for each in sorted(_RESERVED & set(env))]
    found += [f"spec.trainer.env: {each} twice" for each in sorted({each for each in env if env.count(each) > 1})]
    for patch in manifest["spec"].get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            pod = job["template"]["spec"]["template"]["spec"]
            if job["name"] != "node" or any(each["name"] != "node" or "env" in each for each in pod["containers"]):
                found.append("spec.runtimePatches: not of the runtime")
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
            found += [f"spec.runtimePatches: no volume {name}" for name in mounted - volumes]
    return found


@dataclass
class Pod:
    """What a node's pod is like, as the API tells it."""

    index: int
    status: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)

    def say(self, text: str, *, moment: str = "") -> None:
        self.lines.append((moment or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z"), text))

    def run(self) -> None:
        self.status = {"phase": "Running", "containerStatuses": [{"name": "node", "state": {"running": {}}}]}

    def wait(self, reason: str, message: str) -> None:
        state = {"waiting": {"reason": reason, "message": message}}
        self.status = {"phase": "Pending", "containerStatuses": [{"name": "node", "state": state}]}

    def end(self, code: int, reason: str = "") -> None:
        state = {"terminated": {"exitCode": code, "reason": reason or ("Error" if code else "Completed")}}
        phase = "Failed" if code else "Succeeded"
        self.status = {"phase": phase, "containerStatuses": [{"name": "node", "state": state}]}

    def mark_evicted(self, message: str = "The node was low on resource: memory.") -> None:
        self.status = {**self.status, "phase": "Failed", "reason": "Evicted", "message": message}


@dataclass
class Job:
    """A TrainJob and its pods."""

    manifest: dict[str, Any]
    pods: list[Pod] = field(default_factory=list)
    conditions: dict[str, dict[str, str]] = field(default_factory=dict)
    going_until: float | None = None

    def set(self, kind: str, reason: str = "", message: str = "") -> None:
        self.conditions[kind] = {"type": kind, "status": "True", "reason": reason or kind, "message": message}


@dataclass
class Fault:
    """What the next calls get in place of an answer."""

    method: str
    path: str
    status: int = 0
    message: str = ""
    times: int = 1
    # Whether the call does what it was for all the same: its answer is lost.
    done: bool = False
    stall_s: float = 0.0


@dataclass
class Stand:
    """State of the stand-in."""

    play: Callable[[Job], None]
    jobs: dict[str, Job] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=lambda: {"metadata": {"name": "step"}, "status": {}})
    faults: list[Fault] = field(default_factory=list)
    missing_rights: set[str] = field(default_factory=set)
    has_trainer: bool = True
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fault(self, method: str, path: str, **what: Any) -> None:
        self.faults.append(Fault(method, path, **what))

    def answer(self, method: str, url: str, body: dict[str, Any]) -> tuple[int, Any]:
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        with self.lock:
            fault = next(
                (each for each in self.faults if each.method == method and re.search(each.path, path) and each.times),
                None,
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            if fault.done:
                self._do(method, path, query, body)
            time.sleep(fault.stall_s)
            if fault.status:
                return fault.status, {"kind": "Status", "message": fault.message}
        return self._do(method, path, query, body)

    def _do(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            if path.endswith("/selfsubjectaccessreviews"):
                asked = body["spec"]["resourceAttributes"]
                right = f"{asked['verb']} {asked['resource']}" + (f"/{sub}" if (sub := asked["subresource"]) else "")
                return 201, {"status": {"allowed": right not in self.missing_rights}}
            if not self.has_trainer and "trainer.kubeflow.org" in path:
                return 404, {"message": "the server could not find the requested resource"}
            if path.startswith(_JOBS):
                return self._jobs(method, path.removeprefix(_JOBS).strip("/"), body)
            if path == _PODS:
                name = query["labelSelector"][0].removeprefix("jobset.sigs.k8s.io/jobset-name=")
                job = self.jobs.get(name)
                return 200, {"items": [_as_pod(name, pod) for pod in job.pods] if job else []}
            if path.endswith("/log"):
                return self._log(path.split("/")[-2], query)
            if path.startswith(f"{_PODS}/"):
                return 200, self.own
            return (200, self.objects[path]) if path in self.objects else (404, {"message": f"{path} not found"})

    def _jobs(self, method: str, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {"message": f'trainjobs.trainer.kubeflow.org "{name}" already exists'}
            wrong = refused_fields(body)
            if wrong:
                return 422, {"message": "; ".join(wrong)}
            self.made.append(name)
            self.jobs[name] = job = Job(body, [Pod(index) for index in range(body["spec"]["trainer"]["numNodes"])])
            self.play(job)
            return 201, body
        job_found = self.jobs.get(name)
        if job_found is not None and job_found.going_until is not None and time.monotonic() > job_found.going_until:
            del self.jobs[name]
            job_found = None
        if job_found is None:
            return 404, {"message": f'trainjobs.trainer.kubeflow.org "{name}" not found'}
        if method == "DELETE":
            self.deleted.append(name)
            # As with a finalizer: it is there for a while yet.
            job_found.going_until = time.monotonic() + 0.2
            return 200, {}
        metadata = dict(job_found.manifest["metadata"])
        if job_found.going_until is not None:
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        conditions = list(job_found.conditions.values())
        return 200, {**job_found.manifest, "metadata": metadata, "status": {"conditions": conditions}}

    def _log(self, pod_name: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        for name, job in self.jobs.items():
            for pod in job.pods:
                if pod_name == _pod_name(name, pod):
                    if pod.status.get("phase", "Pending") == "Pending":
                        return 400, {"message": f'container "node" in pod "{pod_name}" is waiting to start'}
                    since = query.get("sinceTime", [""])[0].removesuffix("Z")
                    return 200, "".join(f"{moment} {text}\n" for moment, text in pod.lines if moment[:19] >= since)
        return 404, {"message": f'pods "{pod_name}" not found'}


def _pod_name(job: str, pod: Pod) -> str:
    return f"{job}-node-0-{pod.index}-abcde"


def _as_pod(job: str, pod: Pod) -> dict[str, Any]:
    annotations = {"batch.kubernetes.io/job-completion-index": str(pod.index)}
    return {
        "metadata": {"name": _pod_name(job, pod), "annotations": annotations},
        "status": {"phase": "Pending", **pod.status},
    }


@contextmanager
def serving(play: Callable[[Job], None], folder: Path) -> Iterator[Stand]:
    """Answer on loopback; ``folder/kubeconfig`` says where.

    Args:
        play: Called with each new job: decides what becomes of it.
        folder: Where the kubeconfig is written.
    """
    stand = Stand(play)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, answer = stand.answer(self.command, self.path, json.loads(self.rfile.read(length) or "{}"))
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client waited no longer
                pass

        def do_POST(self) -> None:
            self.do_GET()

        def do_DELETE(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
        "current-context": "c",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        yield stand
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_nodes(job: Job) -> None:
    """Really run a job's nodes, each as a process of this machine with what Trainer's torch runtime gives it."""
    trainer = job.manifest["spec"]["trainer"]
    port = free_port()
    ours = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG", "MANYEYES_TRAINJOB")}
    given = {variable["name"]: variable["value"] for variable in trainer["env"] if "value" in variable}

    def watch(pod: Pod, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            pod.say(line.rstrip("\n"))
        process.stdout.close()
        pod.end(process.wait())
        if all("terminated" in each.status["containerStatuses"][0]["state"] for each in job.pods):
            failed = any(each.status["phase"] == "Failed" for each in job.pods)
            job.set("Failed" if failed else "Complete")

    started = []
    for pod in job.pods:
        pod.run()
        environment = {
            **ours,
            **given,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "models"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(pod.index),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        command = [sys.executable, *trainer["command"][1:]]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )
        started.append((pod, process))
    for pair in started:
        threading.Thread(target=watch, args=pair, daemon=True).start()
