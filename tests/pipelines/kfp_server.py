"""The parts of Kubeflow Pipelines' v2beta1 API that ManyEyes uses, over real HTTP, with faults on demand.

Every request body and every reply is held against the SDK's generated models: a field that they do not know, or a value
of another type, is kept in ``violations``, which the fixture checks at the end.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml

EPOCH = "1970-01-01T00:00:00Z"
NATIVE: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "object": (object,),
}


def check_model(value: Any, kind: str, place: str) -> list[str]:
    """What is wrong with ``value`` as the generated type ``kind``."""
    if value is None:
        return []
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{place}: no list"]
        return [text for number, item in enumerate(value) for text in check_model(item, match[1], f"{place}[{number}]")]
    if match := re.fullmatch(r"dict\(([^,]*), (.*)\)", kind):
        if not isinstance(value, dict):
            return [f"{place}: no map"]
        return [text for key, item in value.items() for text in check_model(item, match[2], f"{place}.{key}")]
    if kind == "datetime":
        try:
            datetime.fromisoformat(value.replace("Z", "+00:00"))
        except (AttributeError, ValueError):
            return [f"{place}: {value!r} is no time"]
        return []
    if kind in NATIVE:
        right = isinstance(value, NATIVE[kind]) and not (isinstance(value, bool) and kind in ("int", "float"))
        return [] if right else [f"{place}: {value!r} is no {kind}"]
    model = getattr(kfp_server_api, kind)
    if not model.openapi_types:
        return [] if value in model.allowable_values else [f"{place}: {value!r} is no {kind}"]
    if not isinstance(value, dict):
        return [f"{place}: no {kind}"]
    names = {model.attribute_map[attribute]: attribute for attribute in model.openapi_types}
    problems = [f"{place}.{key}: {kind} has no such field" for key in value if key not in names]
    for key, item in value.items():
        if key in names:
            problems += check_model(item, model.openapi_types[names[key]], f"{place}.{key}")
    return problems


@dataclass
class Fault:
    """What goes wrong with the next requests of one kind.

    Args:
        method: HTTP method.
        path: Regular expression that the path matches.
        kind: A status, or "drop", "timeout", "page".
        times: How many requests.
        takes_effect: Whether the server does what was asked before it goes wrong.
    """

    method: str
    path: str
    kind: int | str
    times: int = 1
    takes_effect: bool = False


@dataclass
class Kubeflow:
    """The server's state."""

    url: str = ""
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[tuple[str, str], str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    workflows: dict[str, list[str]] = field(default_factory=dict)
    scripts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    only_ui: bool = False
    token: str = ""
    base: str = ""
    sleep_s: float = 1.5
    clock: int = 1_800_000_000
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> str:
        self.clock += 1
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock))

    def calls(self, method: str, path: str) -> int:
        """How many requests of this kind came."""
        return sum(1 for verb, where, _ in self.requests if verb == method and re.search(path, where))


def filtered(items: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    """The listing calls' filter, order and page."""
    if "filter" in query:
        for predicate in json.loads(query["filter"])["predicates"]:
            assert predicate["operation"] == "EQUALS"
            items = [item for item in items if item.get(predicate["key"]) == predicate["stringValue"]]
    if "namespace" in query:
        items = [item for item in items if item.get("namespace", query["namespace"]) == query["namespace"]]
    if query.get("sort_by") == "created_at desc":
        items = sorted(items, key=lambda item: str(item["created_at"]), reverse=True)
    return items[: int(query.get("page_size", 10))]


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def kubeflow(self) -> Kubeflow:
        return cast(Any, self.server).kubeflow

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    def answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        state = self.kubeflow
        with state.lock:
            state.requests.append((method, parts.path, dict(self.headers.items())))
            fault = next(
                (
                    each
                    for each in state.faults
                    if each.times and each.method == method and re.search(each.path, parts.path)
                ),
                None,
            )
            if fault is not None:
                fault.times -= 1
            if fault is None or fault.takes_effect:
                status, content, kind = self.handle_request(method, parts.path, parts.query, body)
            else:
                status, content, kind = 0, b"{}", "application/json"
        if fault is None:
            self.send(status, content, kind)
        else:
            self.go_wrong(fault, content)

    def handle_request(self, method: str, path: str, query: str, body: bytes) -> tuple[int, bytes, str]:
        state = self.kubeflow
        if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            return 401, b'{"error":"unauthenticated","code":16,"message":"no valid token"}', "application/json"
        if not path.startswith(state.base):
            return 404, b'{"message":"page not found"}', "application/json"
        path = path.removeprefix(state.base)
        flat = {key: values[0] for key, values in parse_qs(query).items()}
        try:
            for verb, pattern, handler in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and verb == method:
                    content, kind = handler(self, flat, body, *match.groups())
                    if kind in ("text", "page"):
                        return 200, content.encode(), "text/plain" if kind == "text" else "text/html"
                    if kind:
                        state.violations += check_model(content, kind, path)
                    return 200, json.dumps(content).encode(), "application/json"
        except RefusedError as refused:
            answer = {"error": refused.message, "code": 0, "message": refused.message + "\ngithub.com/kubeflow/..."}
            return refused.status, json.dumps(answer).encode(), "application/json"
        return 404, b'{"message":"page not found"}', "application/json"

    def go_wrong(self, fault: Fault, content: bytes) -> None:
        if fault.kind == "timeout":
            time.sleep(self.kubeflow.sleep_s)
            self.close_connection = True
        elif fault.kind == "drop":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) + 100))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault.kind == "page":
            self.send(200, b"<html><body>Log in to your account</body></html>", "text/html; charset=utf-8")
        elif fault.kind == 302:
            self.send(302, b"", "text/html", Location="/dex/auth")
        else:
            message = json.dumps({"message": f"fault {fault.kind}"}).encode()
            extra = {"Retry-After": "0"} if fault.kind == 429 else {}
            self.send(int(fault.kind), message, "application/json", **extra)

    def send(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def parse(self, body: bytes, kind: str) -> dict[str, Any]:
        value = json.loads(body)
        self.kubeflow.violations += check_model(value, kind, f"request {self.path}")
        return dict(value)


def find(items: list[dict[str, Any]], key: str, value: str) -> dict[str, Any]:
    for item in items:
        if item[key] == value:
            return item
    raise RefusedError(404, f"{key} {value} not found")


def refuse_twins(items: list[dict[str, Any]], name: str) -> None:
    if any(item["display_name"] == name for item in items):
        raise RefusedError(409, f"Already exist error: The name {name} already exists")


def list_pipelines(handler: Handler, query: dict[str, str], _body: bytes) -> tuple[Any, str]:
    found = filtered(handler.kubeflow.pipelines, query)
    return {"pipelines": found, "total_size": len(found)} if found else {}, "V2beta1ListPipelinesResponse"


def create_pipeline(handler: Handler, _query: dict[str, str], body: bytes) -> tuple[Any, str]:
    state = handler.kubeflow
    pipeline = handler.parse(body, "V2beta1Pipeline")
    refuse_twins(state.pipelines, pipeline["display_name"])
    pipeline |= {"pipeline_id": str(uuid.uuid4()), "created_at": state.now()}
    state.pipelines.append(pipeline)
    return pipeline, "V2beta1Pipeline"


def list_versions(handler: Handler, query: dict[str, str], _body: bytes, pipeline_id: str) -> tuple[Any, str]:
    own = [version for version in handler.kubeflow.versions if version["pipeline_id"] == pipeline_id]
    found = filtered(own, query)
    answer = {"pipeline_versions": found, "total_size": len(found)} if found else {}
    return answer, "V2beta1ListPipelineVersionsResponse"


def upload_version(handler: Handler, query: dict[str, str], body: bytes) -> tuple[Any, str]:
    state = handler.kubeflow
    find(state.pipelines, "pipeline_id", query["pipelineid"])
    own = [version for version in state.versions if version["pipeline_id"] == query["pipelineid"]]
    refuse_twins(own, query["name"])
    head = f"Content-Type: {handler.headers['Content-Type']}\r\n\r\n".encode()
    message = message_from_bytes(head + body)
    (part,) = cast(list[Any], message.get_payload())
    documents = list(yaml.safe_load_all(part.get_payload(decode=True)))
    spec = documents[0] if len(documents) == 1 else {"pipeline_spec": documents[0], "platform_spec": documents[1]}
    version = {
        "pipeline_id": query["pipelineid"],
        "pipeline_version_id": str(uuid.uuid4()),
        "display_name": query["name"],
        "name": query["name"],
        "description": query.get("description", ""),
        "created_at": state.now(),
        "pipeline_spec": spec,
    }
    state.versions.append(version)
    return version, "V2beta1PipelineVersion"


def list_experiments(handler: Handler, query: dict[str, str], _body: bytes) -> tuple[Any, str]:
    found = filtered(handler.kubeflow.experiments, query)
    return {"experiments": found, "total_size": len(found)} if found else {}, "V2beta1ListExperimentsResponse"


def create_experiment(handler: Handler, _query: dict[str, str], body: bytes) -> tuple[Any, str]:
    state = handler.kubeflow
    experiment = handler.parse(body, "V2beta1Experiment")
    refuse_twins(state.experiments, experiment["display_name"])
    experiment |= {"experiment_id": str(uuid.uuid4()), "created_at": state.now(), "storage_state": "AVAILABLE"}
    state.experiments.append(experiment)
    return experiment, "V2beta1Experiment"


def list_runs(handler: Handler, query: dict[str, str], _body: bytes) -> tuple[Any, str]:
    found = filtered(handler.kubeflow.runs, query)
    return {"runs": found, "total_size": len(found)} if found else {}, "V2beta1ListRunsResponse"


def create_run(handler: Handler, _query: dict[str, str], body: bytes) -> tuple[Any, str]:
    state = handler.kubeflow
    run = handler.parse(body, "V2beta1Run")
    find(state.experiments, "experiment_id", run["experiment_id"])
    find(state.versions, "pipeline_version_id", run["pipeline_version_reference"]["pipeline_version_id"])
    run |= {"run_id": str(uuid.uuid4()), "created_at": state.now(), "state": "PENDING", "storage_state": "AVAILABLE"}
    state.runs.append(run)
    return run, "V2beta1Run"


def get_run(handler: Handler, _query: dict[str, str], _body: bytes, run_id: str) -> tuple[Any, str]:
    run = find(handler.kubeflow.runs, "run_id", run_id)
    script = handler.kubeflow.scripts.get(run_id)
    if script:
        run |= script.pop(0) if len(script) > 1 else script[0]
    return run, "V2beta1Run"


def get_run_of_older_api(handler: Handler, _query: dict[str, str], _body: bytes, run_id: str) -> tuple[Any, str]:
    """Only what the newer API has not: the workflow. kfp_server_api has no models of this one."""
    find(handler.kubeflow.runs, "run_id", run_id)
    manifests = handler.kubeflow.workflows.get(run_id)
    if manifests is None:
        raise RefusedError(404, "Not Found")
    manifest = manifests.pop(0) if len(manifests) > 1 else manifests[0]
    return {"run": {"id": run_id}, "pipeline_runtime": {"workflow_manifest": manifest}}, ""


def retry_run(handler: Handler, _query: dict[str, str], _body: bytes, run_id: str) -> tuple[Any, str]:
    run = find(handler.kubeflow.runs, "run_id", run_id)
    if run["state"] != "FAILED":
        raise RefusedError(500, "Workflow must be Failed/Error to retry")
    run["state"] = "RUNNING"
    return {}, ""


def list_schedules(handler: Handler, query: dict[str, str], _body: bytes) -> tuple[Any, str]:
    found = filtered(handler.kubeflow.schedules, query)
    answer = {"recurringRuns": found, "total_size": len(found)} if found else {}
    return answer, "V2beta1ListRecurringRunsResponse"


def create_schedule(handler: Handler, _query: dict[str, str], body: bytes) -> tuple[Any, str]:
    state = handler.kubeflow
    schedule = handler.parse(body, "V2beta1RecurringRun")
    schedule |= {"recurring_run_id": str(uuid.uuid4()), "created_at": state.now(), "status": "ENABLED"}
    state.schedules.append(schedule)
    return schedule, "V2beta1RecurringRun"


def switch_schedule(handler: Handler, _q: dict[str, str], _b: bytes, which: str, mode: str) -> tuple[Any, str]:
    schedule = find(handler.kubeflow.schedules, "recurring_run_id", which)
    schedule["status"] = f"{mode.upper()}D"
    schedule["mode"] = mode.upper()
    return {}, ""


def delete_schedule(handler: Handler, _query: dict[str, str], _body: bytes, which: str) -> tuple[Any, str]:
    state = handler.kubeflow
    state.schedules.remove(find(state.schedules, "recurring_run_id", which))
    return {}, ""


def read_log(handler: Handler, _query: dict[str, str], _body: bytes, run_id: str, pod: str) -> tuple[Any, str]:
    find(handler.kubeflow.runs, "run_id", run_id)
    if handler.kubeflow.only_ui:
        return "<!doctype html><title>Kubeflow Pipelines</title>", "page"
    return log_text(handler, run_id, pod)


def read_log_through_ui(handler: Handler, query: dict[str, str], _body: bytes) -> tuple[Any, str]:
    return log_text(handler, query["runid"], query["podname"])


def log_text(handler: Handler, run_id: str, pod: str) -> tuple[Any, str]:
    if (run_id, pod) not in handler.kubeflow.logs:
        raise RefusedError(500, f"Failed to read logs for run {run_id}")
    return handler.kubeflow.logs[run_id, pod], "text"


API = "/apis/v2beta1"
ROUTES: list[tuple[str, str, Callable[..., tuple[Any, str]]]] = [
    ("GET", f"{API}/pipelines", list_pipelines),
    ("POST", f"{API}/pipelines", create_pipeline),
    ("GET", f"{API}/pipelines/([^/]+)/versions", list_versions),
    ("POST", f"{API}/pipelines/upload_version", upload_version),
    ("GET", f"{API}/experiments", list_experiments),
    ("POST", f"{API}/experiments", create_experiment),
    ("GET", f"{API}/runs", list_runs),
    ("POST", f"{API}/runs", create_run),
    ("GET", f"{API}/runs/([^/:]+)", get_run),
    ("GET", "/apis/v1beta1/runs/([^/:]+)", get_run_of_older_api),
    ("GET", f"{API}/recurringruns", list_schedules),
    ("POST", f"{API}/recurringruns", create_schedule),
    ("POST", f"{API}/recurringruns/([^/:]+):(enable|disable)", switch_schedule),
    ("POST", f"{API}/runs/([^/:]+):retry", retry_run),
    ("DELETE", f"{API}/recurringruns/([^/:]+)", delete_schedule),
    ("GET", "/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", read_log),
    ("GET", "/k8s/pod/logs", read_log_through_ui),
]


def start_server() -> tuple[ThreadingHTTPServer, Kubeflow]:
    """A server on a free port of the loopback; the caller shuts it down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    kubeflow = Kubeflow(url=f"http://127.0.0.1:{server.server_port}")
    cast(Any, server).kubeflow = kubeflow
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server, kubeflow
