"""What a run's Argo workflow says of its steps.

The API's ``task_details`` stop once Argo compresses the status of a workflow (at 1 MB), leave a pod's message out, and
list Argo's own nodes between the steps. ``GET /apis/v1beta1/runs/ID`` has the whole workflow: the templates say which
steps there are, the nodes what became of them. Names of templates and nodes are those of ``backend/src/v2/compiler/
argocompiler`` in kubeflow/pipelines 2.17:

- a step ``NAME`` of a group is a pod ``NAME-driver`` and a group ``NAME`` with one pod, ``executor``;
- a nested group is a pod ``NAME-driver`` and a group ``NAME``; a loop ``iteration-iterations(0:0)``, ``(1:1)``, ...;
- an exit handler is the group's hook, ``onExit``;
- a node that Argo may repeat is a node of type ``Retry`` around ``NAME(0)``, ``NAME(1)``, ...

Why a pod waits or failed is put in plain words: what was found, what is needed, what to do. Argo's
messages are made by ``getPendingReason`` and ``inferFailedReason`` (workflow/controller/operator.go).
"""

from __future__ import annotations

import base64
import binascii
import gzip
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from manyeyes.data.curation.parts import part_key
from manyeyes.errors import ManyEyesError
from manyeyes.harness.cluster import Reason, explain
from manyeyes.harness.inputs import PINNING_STEPS
from manyeyes.steps.plan_evaluation import named_benchmarks
from manyeyes.steps.resolve_data import read_recipe

State = Literal["not started", "starting", "waiting", "running", "succeeded", "cached", "skipped", "failed", "stopped"]
OVER = ("succeeded", "cached", "skipped", "failed", "stopped")

_ATTEMPT = re.compile(r"(\(\d+\))+$")
_ITERATION = re.compile(r"\((\d+):[^)]*\)")
_NUMBER = re.compile(r"\((\d+)\)$")
_DRIVERS = ("system-container-driver", "system-dag-driver")
# How people call a step that is told apart by what it works on: the parameter that says so, and the words around it.
_TOLD_APART = {
    "prealign_encoder": (("encoder",), "prealign {}"),
    "score_benchmark": (("benchmark",), "score {}"),
    # One variant each, in versions before batches.
    "train_trial": (("variants", "variant"), "train {}"),
    "advance_search": (("round_number",), "advance search, round {}"),
    "gather_facts": (("part",), "gather facts of {}"),
    "profile_shards": (("part",), "profile shards of {}"),
}

# In the API's list of tasks, which has every node of the workflow.
_MACHINERY = re.compile(
    r"^(root|entrypoint|.*-driver|executor|iteration-.*|for-loop-\d+|exit-handler-\d+|condition-.*-\d+|.*\.onExit"
    r"|.*\(\d+(:.*)?\)|[0-9a-f-]{36})$"
)

Node = Mapping[str, Any]
Path = tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    """One pod of a step.

    Attributes:
        pod: Its name.
        state: What became of it.
        started: When Argo made it; None where it did not.
        ended: When it ended.
        reason: Why it waits or failed; None where there is nothing to say.
        is_driver: Whether it is Kubeflow's own pod, which prepares the step's.
    """

    pod: str
    state: State
    started: datetime | None = None
    ended: datetime | None = None
    reason: Reason | None = None
    is_driver: bool = False


@dataclass(frozen=True)
class StepStatus:
    """One step of a run.

    Attributes:
        key: Where it is in the workflow; stays the same while the run goes on.
        name: As people know it.
        component: Its folder in ``components/``; empty for what is Kubeflow's own.
        state: What became of it.
        attempts: Its pods, the first one first; without pods for a step from the cache.
        started: When its driver started: before that, nothing was done for it.
        ended: When its last attempt ended.
        reason: Why it waits or failed.
    """

    key: str
    name: str
    component: str
    state: State
    attempts: Sequence[Attempt] = ()
    started: datetime | None = None
    ended: datetime | None = None
    reason: Reason | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took or, while it goes on, None."""
        if self.started is None or self.ended is None or self.state not in OVER:
            return None
        return (self.ended - self.started).total_seconds()


@dataclass(frozen=True)
class _Planned:
    path: Path
    task: Mapping[str, Any]
    is_driver: bool = False


@dataclass(frozen=True)
class Workflow:
    """A workflow, as far as its steps need it."""

    name: str
    templates: Mapping[str, Mapping[str, Any]]
    entrypoint: str
    nodes: Mapping[Path, Sequence[Node]]
    over: bool
    stopped: bool
    message: str = ""
    names_are_ids: bool = False
    retries_off: bool = False


def read_workflow(text: str) -> Workflow | None:
    """The workflow of a ``workflow_manifest``; None where it is none, or holds no status that can be read."""
    try:
        manifest = json.loads(text)
        metadata, spec, status = manifest["metadata"], manifest["spec"], manifest.get("status") or {}
        name = metadata["name"]
        nodes = status.get("nodes") or _decompress(status.get("compressedNodes") or "")
        entrypoint = spec["entrypoint"]
        templates = {template["name"]: template for template in spec["templates"]}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, binascii.Error):
        return None
    by_path: dict[Path, list[Node]] = {}
    for node in nodes.values():
        by_path.setdefault(_path_of(node.get("name", ""), name), []).append(node)
    for same in by_path.values():
        same.sort(key=lambda node: (node.get("startedAt") or "", node["id"]))
    annotations = metadata.get("annotations") or {}
    return Workflow(
        name=name,
        templates=templates,
        entrypoint=entrypoint,
        nodes=by_path,
        over=status.get("phase") in ("Succeeded", "Failed", "Error"),
        # Kubeflow ends a run by giving it no time at all.
        stopped=bool(spec.get("shutdown")) or spec.get("activeDeadlineSeconds") == 0,
        message=str(status.get("message") or ""),
        names_are_ids=annotations.get("workflows.argoproj.io/pod-name-format") == "v1",
        retries_off=_retries_off(spec),
    )


def _retries_off(spec: Mapping[str, Any]) -> bool:
    """Whether the controller's settings, merged into every template, keep failed pods from being tried again."""
    strategy = (spec.get("templateDefaults") or {}).get("retryStrategy") or {}
    return strategy.get("retryPolicy") in ("OnError", "OnTransientError")


def _decompress(text: str) -> dict[str, Any]:
    nodes: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(text))) if text else {}
    return nodes


def _path_of(name: str, workflow: str) -> Path:
    """A node's place, attempts of it and of its groups aside; of an iteration, its number."""
    rest = name.removeprefix(workflow)
    parts = [_ATTEMPT.sub("", part) for part in rest.split(".")]
    return tuple(_ITERATION.sub(r"(\1)", part) for part in parts if part)


def steps_of(workflow: Workflow) -> list[StepStatus]:
    """The steps of a run: those that started in order of their start, then the others in the order of the pipeline.

    Groups, drivers and Argo's other nodes are left out, but for a driver that failed or has a reason to wait.
    """
    found = []
    instances = _instances(workflow)
    plan = _plan(workflow, workflow.entrypoint, (), set())
    items = _items_of_loops(workflow, plan)
    for planned in plan:
        paths = instances.get(planned.path, ())
        if planned.is_driver:
            found += [step for path in paths if (step := _driver_status(workflow, path, planned)) is not None]
        elif paths:
            found += [_step_status(workflow, path, planned, items) for path in paths]
        else:
            name, folder = _plain_name(planned.path[-1], planned.task), _folder(planned.task)
            found.append(StepStatus("/".join(planned.path), name, folder, "not started"))
    started = sorted((step for step in found if step.started), key=lambda step: step.started or datetime.max)
    return tell_apart([*started, *(step for step in found if not step.started)])


def _plan(workflow: Workflow, template: str, path: Path, above: set[str]) -> list[_Planned]:
    """The steps and the groups' drivers below a template, in an order in which they can run."""
    tasks = {task["name"]: task for task in (workflow.templates.get(template, {}).get("dag") or {}).get("tasks") or ()}
    if template in above:
        return []
    specs = {
        _without_driver(name): _task_spec(task) for name, task in tasks.items() if task.get("template") in _DRIVERS
    }
    planned = []
    for name in _in_order(tasks):
        task, place = tasks[name], (*path, name)
        kind = task.get("template", "")
        if kind == "system-dag-driver":
            planned.append(_Planned(place, specs[_without_driver(name)], is_driver=True))
        elif "system-container-executor" in kind or kind == "system-importer":
            planned.append(_Planned(place, specs.get(name, {})))
        elif kind not in _DRIVERS:
            planned += _plan(workflow, kind, place, above | {template})
        for hook in (task.get("hooks") or {}).values():
            planned += _plan(workflow, hook.get("template", ""), (*place, "onExit"), above | {template})
    return planned


def _in_order(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of a group's tasks: each behind its driver, both behind what they need."""
    parts: dict[str, list[str]] = {}
    for name in sorted(tasks, key=lambda name: (not name.endswith("-driver"), name)):
        parts.setdefault(_without_driver(name), []).append(name)
    needs = {
        unit: {
            _without_driver(other)
            for name in names
            for other in re.findall(r"[a-z0-9][-a-z0-9]*", tasks[name].get("depends") or "")
            if other in tasks
        }
        - {unit}
        for unit, names in parts.items()
    }
    ordered: list[str] = []
    while needs:
        unit = min((unit for unit in needs if not needs[unit] & set(needs)), default=min(needs))
        ordered += parts[unit]
        del needs[unit]
    return ordered


def _without_driver(name: str) -> str:
    return name.removesuffix("-driver")


def _task_spec(task: Mapping[str, Any]) -> Mapping[str, Any]:
    for parameter in (task.get("arguments") or {}).get("parameters") or ():
        if parameter.get("name") == "task":
            try:
                spec = json.loads(parameter.get("value") or "{}")
            except ValueError:
                return {}
            return spec if isinstance(spec, dict) else {}
    return {}


def _instances(workflow: Workflow) -> dict[Path, list[Path]]:
    """Where each step of the plan stands among the nodes: once, or once an iteration of the loops around it.

    A step whose driver is there is there itself.
    """
    found: dict[Path, list[Path]] = {}
    for path in {*workflow.nodes, *((*path[:-1], _without_driver(path[-1])) for path in workflow.nodes if path)}:
        found.setdefault(tuple(_NUMBER.sub("", part) for part in path), []).append(path)
    for paths in found.values():
        paths.sort(key=lambda path: [int(number[1]) for part in path if (number := _NUMBER.search(part))])
    return found


def _pods(workflow: Workflow, path: Path) -> list[Node]:
    return [node for node in workflow.nodes.get(path, ()) if node.get("type") == "Pod"]


def _items_of_loops(workflow: Workflow, plan: Sequence[_Planned]) -> Mapping[str, Sequence[str]]:
    """By step, what a loop runs it for: a step from the cache has no pod, whose arguments would say it.

    Known from the arguments of the step that pins the recipe, which is never from the cache.
    """
    for planned in plan:
        if planned.is_driver or _folder(planned.task) not in PINNING_STEPS:
            continue
        drivers = _drivers(workflow, planned.path)
        given = _arguments(_container(_outputs(drivers[-1]).get("pod-spec-patch", ""))) if drivers else {}
        if not given:
            continue
        try:
            recipe = read_recipe(
                str(given.get("recipe_text") or given.get("recipe") or ""), str(given.get("recipe_overrides") or "")
            )
        except ManyEyesError:  # of another version
            return {}
        benchmarks = named_benchmarks(str(given.get("evaluate_benchmarks") or "")) or recipe.evaluation.benchmarks
        return {"prealign_encoder": recipe.prealigned_encoders(), "score_benchmark": benchmarks}
    return {}


def _drivers(workflow: Workflow, path: Path) -> list[Node]:
    return _pods(workflow, (*path[:-1], f"{path[-1]}-driver"))


def _step_status(workflow: Workflow, path: Path, planned: _Planned, items: Mapping[str, Sequence[str]]) -> StepStatus:
    drivers = _drivers(workflow, path)
    # An importer has one pod and no driver.
    pods = _pods(workflow, (*path, "executor")) or _pods(workflow, path)
    given = _outputs(drivers[-1]) if drivers else {}
    patch = _container(given.get("pod-spec-patch", ""))
    limit = str(((patch.get("resources") or {}).get("limits") or {}).get("memory") or "")
    attempts = [_attempt(workflow, pod, limit) for pod in pods]
    around = {node.get("phase") for node in workflow.nodes.get(path, ()) if node.get("type") != "Pod"}
    goes_on = any(
        node.get("type") == "Retry" and node.get("phase") == "Running"
        for node in workflow.nodes.get((*path, "executor"), ())
    )
    component = _folder(planned.task)

    reason: Reason | None = None
    state: State
    if attempts:
        last = attempts[-1]
        state, reason = last.state, last.reason
        if state == "failed" and goes_on and not workflow.over:
            state = "waiting"
            reason = Reason(f"for another attempt; this one failed: {reason.text if reason else 'without a word'}")
    elif drivers and (last := _attempt(workflow, drivers[-1], "")).state != "succeeded":
        state, reason = ("starting" if last.state == "running" else last.state), last.reason
        attempts = [last] if state in ("failed", "stopped") else []
        if state == "failed" and reason is not None:
            reason = replace(reason, text=f"Kubeflow's driver failed: {reason.text}")
    elif given.get("condition") == "false" or "Skipped" in around:
        state = "skipped"
    elif given.get("cached-decision") == "true":
        state = "cached"
    elif not drivers or workflow.over:
        state = "not started"
    else:
        state = "starting"
    moments = [attempt.ended for attempt in attempts] or [_moment(node.get("finishedAt")) for node in drivers]
    started = _moment(drivers[0].get("startedAt")) if drivers else attempts[0].started if attempts else None
    return StepStatus(
        key="/".join(path),
        name=_name(path, planned.task, component, _arguments(patch), items.get(component, ())),
        component=component,
        state=state,
        attempts=tuple(attempts),
        started=started if state != "not started" else None,
        ended=moments[-1] if moments and state in OVER else None,
        reason=reason,
    )


def _driver_status(workflow: Workflow, path: Path, planned: _Planned) -> StepStatus | None:
    """The driver of a group, where there is something to say of it."""
    pods = _pods(workflow, path)
    last = _attempt(workflow, pods[-1], "") if pods else None
    if last is None or not (last.state == "failed" or (last.state == "waiting" and last.reason)):
        return None
    group = "the run" if path == ("root-driver",) else _plain_name(_without_driver(path[-1]), planned.task)
    return StepStatus(
        key="/".join(path),
        name=f"Kubeflow's driver of {group}",
        component="",
        state=last.state,
        attempts=tuple(_attempt(workflow, pod, "") for pod in pods),
        started=_moment(pods[0].get("startedAt")),
        ended=last.ended,
        reason=last.reason,
    )


def _attempt(workflow: Workflow, node: Node, limit: str) -> Attempt:
    message = str(node.get("message") or "")
    shut_down = "shutdown with strategy" in message or "Stopped with strategy" in message
    phase = node.get("phase")
    reason = explain(message, memory_limit=limit) if message and phase != "Succeeded" else None
    state: State
    if phase == "Succeeded":
        state = "succeeded"
    elif phase in ("Failed", "Error"):
        # A pod of a run that is being ended gets SIGTERM.
        state = "stopped" if shut_down or (workflow.stopped and reason and reason.from_outside) else "failed"
        reason = None if state == "stopped" else reason or Reason("it ended without a word", error="TaskFailed")
    elif phase in ("Skipped", "Omitted"):
        state = "skipped"
    elif workflow.over:
        # What Argo had no time to see the end of.
        state, reason = "stopped", None
    elif phase == "Running":
        state, reason = "running", None
    else:
        state = "waiting" if reason else "starting"
    ended = _moment(node.get("finishedAt")) if phase not in ("Running", "Pending") else None
    is_driver = node.get("templateName") in _DRIVERS
    return Attempt(_pod_name(workflow, node), state, _moment(node.get("startedAt")), ended, reason, is_driver)


def _pod_name(workflow: Workflow, node: Node) -> str:
    """As ``GeneratePodName`` of Argo (workflow/util/pod_name.go) makes it; its hash also ends the node's id."""
    identity = str(node.get("id", ""))
    if workflow.names_are_ids or node.get("name") == workflow.name:
        return identity
    prefix = "-".join(part for part in (workflow.name, str(node.get("templateName") or "")) if part)
    # Kubernetes allows 253 characters, of which Argo keeps ten for the hash and one for the hyphen.
    return f"{prefix[:242]}-{identity.rpartition('-')[2]}"


def _outputs(node: Node) -> dict[str, str]:
    parameters = (node.get("outputs") or {}).get("parameters") or ()
    return {str(each.get("name")): str(each.get("value", "")) for each in parameters}


def _container(patch: str) -> Mapping[str, Any]:
    """The main container of a driver's ``pod-spec-patch``."""
    try:
        containers = json.loads(patch or "{}").get("containers") or [{}]
    except (ValueError, AttributeError):
        return {}
    return containers[0] if isinstance(containers[0], dict) else {}


def _arguments(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters that a step gets: on the launcher's command line, as JSON."""
    words = [*(container.get("command") or ()), *(container.get("args") or ())]
    for name, value in itertools.pairwise(words):
        if name == "--executor_input":
            try:
                values: Mapping[str, Any] = json.loads(value)["inputs"]["parameterValues"]
            except (ValueError, KeyError, TypeError):
                return {}
            return values
    return {}


def _folder(task: Mapping[str, Any]) -> str:
    reference = str((task.get("componentRef") or {}).get("name", ""))
    return re.sub(r"-\d+$", "", reference.removeprefix("comp-")).replace("-", "_")


def _plain_name(own: str, task: Mapping[str, Any]) -> str:
    return plain(str((task.get("taskInfo") or {}).get("name") or own))


def plain(name: str) -> str:
    """A task's name for people: kfp makes one of the component's, with hyphens; one that a pipeline gives stays."""
    return name.replace("-", " ") if re.fullmatch(r"[a-z0-9-]+", name) else name


def is_machinery(task: str) -> bool:
    """Whether a task of the API is one of Argo's own nodes and no step: groups, drivers, hooks."""
    return bool(_MACHINERY.match(task))


def _name(
    path: Path, task: Mapping[str, Any], component: str, arguments: Mapping[str, Any], items: Sequence[str]
) -> str:
    name = _plain_name(path[-1], task)
    iterations = [int(number[1]) + 1 for part in path if (number := _NUMBER.search(part))]
    parameters, words = _TOLD_APART.get(component, ((), ""))
    parameter = next((each for each in parameters if each in arguments), "")
    value = arguments.get(parameter)
    if not arguments and iterations and iterations[-1] <= len(items):
        value = items[iterations[-1] - 1]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if component == "train_trial" and value:
        value = _variants(value)
    if component in ("gather_facts", "profile_shards") and value:
        with suppress(ManyEyesError):  # of a later version
            value = part_key(str(value))
    if value not in (None, ""):
        return words.format(value)
    if parameter in arguments:
        # A loop of nothing has one item, which is empty.
        return f"{name} (nothing to do)"
    return " ".join([name, *(str(number) for number in iterations)])


def _variants(text: str) -> str:
    """Variants in a few characters; they travel as JSON, one a line."""
    from manyeyes.search.variant import parse_variant

    first, *more = str(text).split("\n")
    try:
        name = parse_variant(first).label if first else ""
    except ManyEyesError:  # of a later version
        name = first[:40]
    return f"{name} and {len(more)} more" if more else name


def tell_apart(steps: Sequence[StepStatus]) -> list[StepStatus]:
    """Two steps of one name get a number: the second is ``NAME #2``."""
    times: Counter[str] = Counter()
    named = []
    for step in steps:
        times[step.name] += 1
        number = times[step.name]
        named.append(step if number == 1 else replace(step, name=f"{step.name} #{number}"))
    return named


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00")) if text else None
    except ValueError:
        return None
    # Argo and the backend write "not yet" as 1970.
    return moment.astimezone(UTC) if moment is not None and moment.year > 1970 else None
