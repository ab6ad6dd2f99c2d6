"""Keeps compiled pipelines small: what a step's pod does not need is left out.

Kubeflow gives each step's pod its command, its component's definition and its inputs, and Argo keeps six copies of them
in the status of the workflow, which it compresses at one megabyte (``sizes.py``). So a component's docstring, and the
descriptions that kfp takes from it, stay in ``components/``; those of the pipeline's form stay in the compiled file.
"""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from manyeyes.harness.inputs import SLICES
from manyeyes.kubeflow.component import PRELUDE


def compact(spec: dict[str, Any]) -> None:
    """Take what no pod needs out of a compiled pipeline, in place.

    Args:
        spec: First document of a compiled pipeline.
    """
    _rename(spec)
    for component in spec["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for kind in ("artifacts", "parameters"):
                for definition in definitions.get(kind, {}).values():
                    definition.pop("description", None)
    for group in [spec["root"], *spec["components"].values()]:
        _drop_indirect(group.get("dag", {}).get("tasks", {}))
    unread = _drop_unread(spec)
    for label, executor in spec["deploymentSpec"]["executors"].items():
        if "command" in executor.get("container", {}):
            command = [_compact_part(part, unread.get(label, set())) for part in executor["container"]["command"]]
            executor["container"]["command"] = command


def compact_for_cluster(documents: list[dict[str, Any]]) -> None:
    """Take out, in place, what the SDK needs or writes and Kubeflow 2.17 does not read.

    These are versions of artifact types, and the older of two spellings where the SDK writes both. What the shell
    command of the SDK does, the library does in fewer words (``component.py``).

    Args:
        documents: A compiled pipeline, and its Kubernetes part where there is one.
    """
    for component in documents[0]["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for definition in definitions.get("artifacts", {}).values():
                definition["artifactType"].pop("schemaVersion", None)
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        command = executor.get("container", {}).get("command", [])
        if command[:2] == ["sh", "-ec"]:
            source = _source_for_pod(command[-1])
            executor["container"]["command"] = ["python3", "-m", "manyeyes.kubeflow.component", source]
        resources = executor.get("container", {}).get("resources", {})
        for older in ("cpuRequest", "cpuLimit", "memoryRequest", "memoryLimit"):
            if f"resource{older[0].upper()}{older[1:]}" in resources:
                resources.pop(older, None)
    platform = documents[1] if len(documents) > 1 else {}
    kubernetes = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {})
    for pod in kubernetes.get("executors", {}).values():
        for secret in [*pod.get("secretAsEnv", []), *pod.get("configMapAsEnv", [])]:
            for older in ("secretName", "configMapName"):
                if f"{older}Parameter" in secret:
                    secret.pop(older, None)


def _rename(spec: dict[str, Any]) -> None:
    """Give each task a component and an executor of its own, numbered in the order of the pipeline.

    kfp shares and numbers those of nested pipelines in the order of a set, which is another one in each process.
    """
    components, executors = spec["components"], spec["deploymentSpec"]["executors"]
    numbers: Counter[str] = Counter()
    spec["components"], spec["deploymentSpec"]["executors"] = {}, {}

    def visit(group: dict[str, Any]) -> None:
        for name, task in sorted(group.get("dag", {}).get("tasks", {}).items()):
            base = re.sub(r"(-\d+)+$", "", name)
            numbers[base] += 1
            own = base if numbers[base] == 1 else f"{base}-{numbers[base]}"
            component = copy.deepcopy(components[task["componentRef"]["name"]])
            task["componentRef"]["name"] = f"comp-{own}"
            spec["components"][f"comp-{own}"] = component
            if "executorLabel" in component:
                spec["deploymentSpec"]["executors"][f"exec-{own}"] = copy.deepcopy(
                    executors[component["executorLabel"]]
                )
                component["executorLabel"] = f"exec-{own}"
            visit(component)

    visit(spec["root"])


def _drop_unread(spec: dict[str, Any]) -> dict[str, set[str]]:
    """Leave out what a step pins for steps that this pipeline has not; by executor, what was left out."""
    read: dict[str, set[str]] = {}
    for group in [spec["root"], *spec["components"].values()]:
        dag = group.get("dag", {})
        tasks = dag.get("tasks", {})
        sources = [given for task in tasks.values() for given in task.get("inputs", {}).get("parameters", {}).values()]
        wanted = [source["taskOutputParameter"] for source in sources if "taskOutputParameter" in source]
        given_on = dag.get("outputs", {}).get("parameters", {}).values()
        wanted += [output["valueFromParameter"] for output in given_on if "valueFromParameter" in output]
        for output in wanted:
            producer = tasks[output.get("producerTask") or output["producerSubtask"]]["componentRef"]["name"]
            read.setdefault(producer, set()).add(output["outputParameterKey"])
    unread = {}
    for name, component in spec["components"].items():
        outputs = component.get("outputDefinitions", {}).get("parameters", {})
        dropped = (set(outputs) & set(SLICES)) - read.get(name, set())
        if "executorLabel" in component and dropped:
            unread[component["executorLabel"]] = dropped
            for output in dropped:
                del outputs[output]
    return unread


def _drop_indirect(tasks: dict[str, Any]) -> None:
    """Leave out what a task waits for in any case, because another one that it waits for does.

    Kubeflow's page draws an arrow for each: a long one makes the graph wide.
    """
    direct = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}

    def before(name: str) -> set[str]:
        return direct[name].union(*(before(earlier) for earlier in direct[name]))

    for name, task in tasks.items():
        indirect = set().union(*(before(earlier) for earlier in direct[name]))
        if direct[name] & indirect:
            task["dependentTasks"] = sorted(direct[name] - indirect)


def _compact_part(part: str, unread: Collection[str]) -> str:
    if part.lstrip().startswith(("import kfp\n", "from kfp import dsl\n")):
        return compact_source(part, unread)
    # The shell command that kfp writes is indented by two dozen spaces a line.
    return "\n".join(" ".join(line.split()) for line in part.splitlines() if line.strip()) + "\n" * part.endswith("\n")


def compact_source(source: str, unread: Collection[str] = ()) -> str:
    """A component's source as a pod runs it: no docstring, no comments, no import that is not used.

    Args:
        source: What kfp embeds: its own imports and the function.
        unread: Output parameters that are left out.
    """
    module = ast.parse(source)
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef))
    if ast.get_docstring(function) is not None:
        del function.body[0]
    function.decorator_list = []
    if unread and isinstance(function.returns, ast.Call):
        fields = function.returns.args[1]
        assert isinstance(fields, ast.List)
        fields.elts = [field for field in fields.elts if _field_name(field) not in unread]
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    imports = ["from kfp import dsl"]
    if "NamedTuple" in names:
        imports.append("from typing import NamedTuple")
    return "\n".join([*imports, ast.unparse(function)]) + "\n"


def _source_for_pod(source: str) -> str:
    """A component's function alone: what all of them import, ``component.py`` puts before it."""
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    known = {ast.unparse(line) for line in ast.parse(PRELUDE).body}
    function.body = [line for line in function.body if ast.unparse(line) not in known]
    if isinstance(function.returns, ast.Constant):
        function.returns = None
    return ast.unparse(function) + "\n"


def _field_name(field: ast.expr) -> str:
    assert isinstance(field, ast.Tuple)
    return str(ast.literal_eval(field.elts[0]))


def step_of(executor: dict[str, Any]) -> str:
    """Name of the step that an executor runs: the function that its command line names."""
    arguments = [*executor["container"].get("command", []), *executor["container"].get("args", [])]
    if "--function_to_execute" not in arguments:
        return ""
    return str(arguments[arguments.index("--function_to_execute") + 1])
