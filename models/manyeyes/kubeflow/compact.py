"""Keeps compiled pipelines small: what a step's pod does not need is left out.

Kubeflow gives each step's pod its command, its component's definition and its inputs, and Argo keeps six copies of them
in the status of the workflow, which it compresses at one megabyte (``sizes.py``). So a component's docstring, and the
descriptions that kfp takes from it, stay in ``components/``; those of the pipeline's form stay in the compiled file.
"""

from __future__ import annotations

import ast
from typing import Any


def compact(spec: dict[str, Any]) -> None:
    """Take what no pod needs out of a compiled pipeline, in place.

    Args:
        spec: First document of a compiled pipeline.
    """
    for component in spec["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for kind in ("artifacts", "parameters"):
                for definition in definitions.get(kind, {}).values():
                    definition.pop("description", None)
    for group in [spec["root"], *spec["components"].values()]:
        _drop_indirect(group.get("dag", {}).get("tasks", {}))
    for executor in spec["deploymentSpec"]["executors"].values():
        if "command" in executor.get("container", {}):
            executor["container"]["command"] = [_compact_part(part) for part in executor["container"]["command"]]


def compact_for_cluster(documents: list[dict[str, Any]]) -> None:
    """Take out, in place, what the SDK needs or writes and Kubeflow 2.17 does not read.

    These are versions of artifact types, and the older of two spellings where the SDK writes both.

    Args:
        documents: A compiled pipeline, and its Kubernetes part where there is one.
    """
    for component in documents[0]["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for definition in definitions.get("artifacts", {}).values():
                definition["artifactType"].pop("schemaVersion", None)
    for executor in documents[0]["deploymentSpec"]["executors"].values():
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


def _compact_part(part: str) -> str:
    if part.lstrip().startswith(("import kfp\n", "from kfp import dsl\n")):
        return compact_source(part)
    # The shell command that kfp writes is indented by two dozen spaces a line.
    return "\n".join(" ".join(line.split()) for line in part.splitlines() if line.strip()) + "\n" * part.endswith("\n")


def compact_source(source: str) -> str:
    """A component's source as a pod runs it: no docstring, no comments, no import that is not used.

    Args:
        source: What kfp embeds: its own imports and the function.
    """
    module = ast.parse(source)
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef))
    if ast.get_docstring(function) is not None:
        del function.body[0]
    function.decorator_list = []
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    imports = ["from kfp import dsl"]
    if "NamedTuple" in names:
        imports.append("from typing import NamedTuple")
    return "\n".join([*imports, ast.unparse(function)]) + "\n"
