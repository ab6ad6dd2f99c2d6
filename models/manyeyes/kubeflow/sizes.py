"""How large the status of a run's workflow becomes on Kubeflow, from the compiled pipeline and its inputs.

Argo keeps a workflow, with the state of each of its nodes, in one object of Kubernetes. A task of Kubeflow is six
nodes, and each of them holds the whole patch of the task's pod: its command, its inputs as JSON in JSON, the definition
of its component, its environment. At one megabyte Argo compresses the nodes, and Kubeflow's own list of tasks stops;
where they are larger than a megabyte even so, Argo ends the run.

The nodes are built here as Kubeflow 2.17 (backend/src/v2/compiler/argocompiler and driver) and Argo 4.0 make them, and
counted. docs/figures.md compares the result with real runs.

A run that is started from the form meets nothing of ours before the pod of its first step, which has no compiled
pipeline: how its size follows from the recipe goes there as a few numbers (``SIZES``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manyeyes.data.curation.parts import MAX_PARTS
from manyeyes.errors import ManyEyesError, PipelineError
from manyeyes.harness.inputs import Pinned
from manyeyes.kubeflow.compact import step_of
from manyeyes.recipe import Recipe, write_recipe_text
from manyeyes.search.variant import MAX_BATCHES, Variant, balance_grid, in_batches, read_grid
from manyeyes.steps.resolve_data import pin_steps, read_recipe

# Argo ends a run whose nodes are larger than 1 MB compressed; ours shrink to a ninth, so this leaves a third free.
MOST_BYTES = 6_000_000
# Linux takes no longer argument of a command, and Kubeflow passes all inputs of a task as one.
MOST_INPUT_BYTES = 131_072

_RUN, _UUID = "w" * 20, "0" * 36
# What run_step leaves on an artifact that other steps take.
_METADATA = {"display_name": "x" * 12, "store_session_info": ""}
# Environment of a pipeline's first step: what growth gave.
SIZES = "MANYEYES_WORKFLOW_SIZES"
# Recipes of which growth learns: encoders, how many of them are prealigned, benchmarks.
_PROBES = (
    *((6, 1, 1), (7, 1, 1), (8, 1, 1), (16, 1, 1), (7, 2, 1), (12, 4, 1), (16, 11, 1)),
    *((6, 1, 10), (6, 1, 20), (8, 1, 10)),
)
# A value of which nothing is known before the run: a name, a digest.
# Longer than any text that names a part of a snapshot of ordinary names.
_PARTS = ["x" * 200] * MAX_PARTS
_UNKNOWN = "0" * 64
_ADDRESSES = (
    *("--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local", "--ml_pipeline_server_port", "8887"),
    *("--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local", "--mlmd_server_port", "8080"),
    *("--publish_logs", "true", "--publish_logs", "true"),
)
_GROUP = {"execution-id": "1234", "iteration-count": "0", "condition": "true"}
_DECISIONS = {"cached-decision": "false", "condition": "true"}
_RETRIES = {
    "cached-decision": "false",
    "retry-max-count": "1",
    "retry-backoff-duration": "60",
    "retry-backoff-factor": "2.000000",
    "retry-backoff-max-duration": "14400",
}
# Kubeflow keeps a step's log as one more output.
_LOGS = {"executor-logs": {"artifactType": {"schemaTitle": "system.Artifact"}}}
# What Kubeflow's MLflow integration adds to each step, where it is on.
_MLFLOW = (
    {"name": "MLFLOW_RUN_ID", "value": "0" * 32},
    {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow.manyeyes.svc:5000"},
    {"name": "MLFLOW_EXPERIMENT_ID", "value": "1234"},
)
_AS_ENV = {
    "secretAsEnv": ("secretKeyRef", "secretName", "secretKey"),
    "configMapAsEnv": ("configMapKeyRef", "configMapName", "configMapKey"),
}
_FROM = {"path": "/tmp/outputs/pod-spec-patch", "default": ""}
# Of each node: phase, times, progress, resources, children, the address of its log.
_NODE_BYTES = 700
# The fixed templates of drivers and launchers, labels, conditions.
_SPEC_BYTES = 30_000


@dataclass(frozen=True)
class TaskSize:
    """One task of a run.

    Attributes:
        name: Where it is in the pipeline, for instance ``train/stages/for-loop-1[0]/prealign-encoder``.
        step: The step that it runs; empty for a group of tasks.
        status_bytes: What its nodes take in the status of the workflow.
        input_bytes: Its inputs and outputs, which are one argument of its command; 0 for a group.
    """

    name: str
    step: str
    status_bytes: int
    input_bytes: int = 0


@dataclass
class WorkflowSize:
    """All tasks of a run.

    Attributes:
        spec_bytes: The workflow without its status.
        tasks: Its tasks and groups.
    """

    spec_bytes: int
    tasks: list[TaskSize] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """The whole object."""
        return self.spec_bytes + sum(task.status_bytes for task in self.tasks)

    def check(self, what: str) -> None:
        """Refuse a run that could not end.

        Args:
            what: What is run, for people.

        Raises:
            PipelineError: The workflow, or one task's inputs, would be too large.
        """
        if self.total_bytes > MOST_BYTES:
            steps = sum(1 for task in self.tasks if task.step)
            raise _too_large(f"{what} would be a workflow of {self.total_bytes / 1e6:.1f} MB ({steps} tasks)")
        widest = max(self.tasks, key=lambda task: task.input_bytes)
        if widest.input_bytes > MOST_INPUT_BYTES:
            raise PipelineError(
                f"the inputs of {widest.name} in {what} would be {widest.input_bytes / 1000:.0f} kB",
                f"at most {MOST_INPUT_BYTES / 1000:.0f} kB, the longest argument that Linux passes to a command",
                "Take a shorter recipe, or a smaller grid.",
            )


def workflow_size(
    documents: list[dict[str, Any]],
    *,
    parameters: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
) -> WorkflowSize:
    """The size of a run's workflow at its end, when every step ran and none was cached.

    Args:
        documents: The compiled pipeline, and its Kubernetes part where a profile was applied.
        parameters: The pipeline's own parameters.
        outputs: Step -> output parameter -> value, where it is known before the run; the length of a list says how
            often a loop runs. A nested pipeline counts as a step, too.
    """
    return _Workflow(documents, outputs).size(parameters)


def check_size(documents: list[dict[str, Any]], parameters: Mapping[str, Any]) -> None:
    """Refuse a run whose workflow would become too large, as far as that is known before it starts.

    Args:
        documents: The compiled pipeline, and its Kubernetes part where a profile was applied.
        parameters: The pipeline's own parameters that were given.

    Raises:
        PipelineError: Argo or Linux would end it.
    """
    if not {"components", "deploymentSpec"} <= set(documents[0]):  # somebody's own, with nothing in it
        return
    form = documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})
    values = {name: definition.get("defaultValue", "") for name, definition in form.items()} | dict(parameters)
    name = documents[0]["pipelineInfo"]["name"]
    what = f"{name} of {values['recipe']}" if "recipe" in values else name
    workflow_size(documents, parameters=values, outputs=known_outputs(values)).check(what)


def known_outputs(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What steps will give to others, where the pipeline's parameters say it; a step is not judged here.

    Args:
        values: The pipeline's parameters.
    """
    if "curate_recipe" in values:
        return {"plan_curation": {"parts": _PARTS}}
    recipe = _recipe_of(values)
    return {} if recipe is None else _outputs_of(recipe, values)


def growth(documents: list[dict[str, Any]], recipe: Recipe) -> str:
    """How the size of a pipeline's workflow follows from the recipe, for a pod that has no compiled pipeline.

    Args:
        documents: The compiled pipeline, and its Kubernetes part where a profile was applied.
        recipe: Whose encoders and benchmarks the ones of a larger recipe are like.

    Returns:
        The factors of ``_terms``, separated by spaces; they hold for each recipe of encoders like these.
    """
    form = documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})
    defaults = {name: definition.get("defaultValue", "") for name, definition in form.items()}
    totals = []
    for encoders, prealigned, benchmarks in _PROBES:
        larger = _larger(recipe, encoders=encoders, prealigned=prealigned, benchmarks=benchmarks)
        values = {**defaults, "recipe_text": write_recipe_text(larger), "evaluate_benchmarks": ""}
        totals.append(workflow_size(documents, parameters=values, outputs=_outputs_of(larger, values)).total_bytes)
    factors = np.linalg.solve(np.array([_terms(*probe) for probe in _PROBES], dtype=np.float64), np.array(totals))
    return " ".join(str(round(factor)) for factor in factors)


def check_growth(text: str, parameters: Mapping[str, Any], *, what: str) -> None:
    """Refuse a run whose workflow would become too large, in the pod of its first step.

    Args:
        text: What ``growth`` gave.
        parameters: The step's own, which are the pipeline's.
        what: What is run, for people.

    Raises:
        PipelineError: Argo would end it.
    """
    recipe = _recipe_of(parameters)
    if recipe is None:
        return
    encoders, prealigned = len(recipe.model.encoders), len(recipe.prealigned_encoders())
    benchmarks = len(_benchmarks_of(recipe, parameters))
    terms = _terms(encoders, prealigned or 1, benchmarks)
    total = sum(int(factor) * term for factor, term in zip(text.split(), terms, strict=True))
    if total > MOST_BYTES:
        raise _too_large(
            f"{what} would be a workflow of about {total / 1e6:.1f} MB "
            f"({encoders} encoders, {prealigned} of them prealigned, {benchmarks} benchmarks)"
        )


def _terms(encoders: int, prealigned: int, benchmarks: int) -> tuple[int, ...]:
    # What a prealigned encoder takes, and each of so many trials in a round of a search, holds a text about all
    # encoders; each trial, and what scores a benchmark, the names of all benchmarks.
    trials = min(encoders, MAX_BATCHES)
    by_trials = tuple(trials * each for each in (1, encoders, prealigned, benchmarks))
    return (1, encoders, prealigned, benchmarks, *by_trials, encoders * prealigned, benchmarks * benchmarks)


def _larger(recipe: Recipe, *, encoders: int, prealigned: int, benchmarks: int) -> Recipe:
    """A recipe with as many encoders as wanted, the further ones like its longest: for its length alone."""
    given = recipe.model.encoders
    longest = max(given, key=lambda encoder: len(encoder.model_dump_json(exclude_defaults=True)))
    further = [longest.model_copy(update={"name": f"{longest.name}-{n}"}) for n in range(len(given), encoders)]
    names = tuple(encoder.name for encoder in further[len(further) - prealigned :])
    prealign = recipe.stages.prealign
    chosen = None if prealign is None else prealign.model_copy(update={"encoders": names})
    asked = tuple(f"benchmark-{number:04}" for number in range(benchmarks))
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"encoders": (*given, *further)}),
            "stages": recipe.stages.model_copy(update={"prealign": chosen}),
            "evaluation": recipe.evaluation.model_copy(update={"benchmarks": asked}),
        }
    )


def _recipe_of(values: Mapping[str, Any]) -> Recipe | None:
    if "recipe" not in values:
        return None
    try:
        _grid_of(values)
        return read_recipe(values.get("recipe_text") or values["recipe"], values.get("recipe_overrides") or "")
    except ManyEyesError:  # preflight says what is wrong with it, for this recipe may be newer than this checkout
        return None


def _grid_of(values: Mapping[str, Any]) -> str:
    """The grid of an ablation or of draws; empty where a pipeline has none, or it was not given.

    Raises:
        RecipeError: A wrong one.
    """
    grid: str = values.get("ablate_grid") or ""
    if values.get("balance_draws"):
        grid = balance_grid(values["balance_draws"], stage=values.get("balance_stage") or "sft")
    if grid:
        read_grid(grid)
    return grid


def _benchmarks_of(recipe: Recipe, values: Mapping[str, Any]) -> list[str]:
    given = str(values.get("evaluate_benchmarks") or "").replace(",", " ").split()
    return given or list(recipe.evaluation.benchmarks)


def _outputs_of(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    pinned = Pinned(recipe, data_md5="0" * 32, data_remote=values.get("data_remote") or _UNKNOWN, code_digest=_UNKNOWN)
    steps = pin_steps(pinned)
    grid = _grid_of(values)
    batches = in_batches(read_grid(grid)) if grid else [""] * MAX_BATCHES
    candidates = in_batches([Variant(encoders=(encoder.name,)) for encoder in recipe.model.encoders])
    return {
        "preflight": {**steps, "registry_model": recipe.registry.model},
        "plan_evaluation": {
            "benchmarks": _benchmarks_of(recipe, values),
            **dict.fromkeys(("score_benchmark", "merge_scorecards"), steps["evaluate"]),
        },
        "plan_validation": {"parts": _PARTS, "validate_data": steps["validate_data"]},
        "plan_ablation": {"batches": batches},
        "plan_balance": {"batches": batches, "grid": grid},
        "start_search": {"candidates": candidates[:1]},
        "search_round": {"candidates": candidates},
    }


def _too_large(found: str) -> PipelineError:
    return PipelineError(
        found,
        f"at most {MOST_BYTES / 1e6:.0f} MB: Argo ends a run at 1 MB compressed",
        "Split it into several runs: fewer encoders, fewer benchmarks, or a smaller grid.",
    )


@dataclass(frozen=True)
class _Inputs:
    """What a group of tasks was given: its parameters, and how many artifacts each of its artifacts is."""

    values: Mapping[str, Any]
    copies: Mapping[str, int] = field(default_factory=dict)


class _Workflow:
    def __init__(self, documents: list[dict[str, Any]], outputs: Mapping[str, Mapping[str, Any]]) -> None:
        self.spec = documents[0]
        platforms = documents[1].get("platforms", {}) if len(documents) > 1 else {}
        self.kubernetes = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
        self.outputs = outputs
        self.name = self.spec["pipelineInfo"]["name"]
        self.found: list[TaskSize] = []

    def size(self, parameters: Mapping[str, Any]) -> WorkflowSize:
        root = self.spec["root"]
        form = root.get("inputDefinitions", {}).get("parameters", {})
        values = {name: definition.get("defaultValue", "") for name, definition in form.items()} | dict(parameters)
        given = {"component": _json(root), "runtime-config": _json({"parameterValues": values})}
        nodes = _node("entrypoint", {}) + _node("root-driver", given, _GROUP) + _node("root", _GROUP)
        self.found.append(TaskSize(self.name, "", 2 * nodes))
        self._add_tasks(root, _Inputs(values), path=self.name)
        return WorkflowSize(self._spec_bytes(), self.found)

    def _spec_bytes(self) -> int:
        components = self.spec["components"].values()
        # The definitions once each, the tasks in the templates.
        parts = [self.spec["root"], *components, *self.kubernetes.values()]
        parts += [executor.get("container", {}) for executor in self.spec["deploymentSpec"]["executors"].values()]
        parts += [task for part in [self.spec["root"], *components] for task in _tasks(part).values()]
        return sum(len(_json(_json(part))) for part in parts) + _SPEC_BYTES

    def _add_tasks(self, group: dict[str, Any], inputs: _Inputs, *, path: str) -> None:
        loops = {name: self._items(task, inputs) for name, task in _tasks(group).items() if "parameterIterator" in task}
        lengths = {name: len(items) for name, items in loops.items()}
        for name, task in _tasks(group).items():
            if name not in loops:
                self._add_task(name, task, inputs, lengths, path=path)
                continue
            nodes = _node("loop", {}) + _node("iteration-driver", self._definition(name, task), _GROUP)
            self.found.append(TaskSize(f"{path}/{name}", "", 2 * nodes + _node("iteration-iterations", {})))
            for number, item in enumerate(loops[name]):
                once = {task["parameterIterator"]["itemInput"]: item}
                self.found.append(TaskSize(f"{path}/{name}[{number}]", "", 2 * _node("iteration-iterations", {})))
                self._add_task(name, task, inputs, lengths, path=path, mark=f"[{number}]", item=once)

    def _add_task(
        self,
        name: str,
        task: dict[str, Any],
        inputs: _Inputs,
        lengths: Mapping[str, int],
        *,
        path: str,
        mark: str = "",
        item: Mapping[str, Any] | None = None,
    ) -> None:
        component = self.spec["components"][task["componentRef"]["name"]]
        where = f"{path}/{name}{mark}"
        own = self._own_inputs(task, inputs, lengths)
        own = _Inputs({**own.values, **(item or {})}, own.copies)
        if "dag" in component:
            nodes = _node(f"{name}-driver", self._definition(name, task), _GROUP) + _node(name, _GROUP)
            self.found.append(TaskSize(where, "", 2 * nodes))
            self._add_tasks(component, own, path=where)
            return
        label = component["executorLabel"]
        executor = self.spec["deploymentSpec"]["executors"][label]
        kubernetes = self.kubernetes.get(label, {})
        given = _json(self._executor_input(name, component, own))
        patch = _json(self._pod(executor["container"], component, given, kubernetes))
        definition = {
            **self._definition(name, task),
            "container": _json(executor["container"]),
            "kubernetes-config": _json(kubernetes) if kubernetes else "",
        }
        nodes = _node(f"{name}-driver", definition, {"pod-spec-patch": patch, **_DECISIONS})
        nodes += _node(name, {"pod-spec-patch": patch, **_RETRIES})
        nodes += _node("executor", {"pod-spec-patch": patch, **_RETRIES})
        self.found.append(TaskSize(where, step_of(executor), 2 * nodes, len(given.encode())))

    def _definition(self, name: str, task: dict[str, Any]) -> dict[str, str]:
        component = self.spec["components"][task["componentRef"]["name"]]
        return {
            "component": _json(component),
            "task": _json(task),
            "task-name": name,
            "parent-dag-id": "1234",
            "iteration-index": "-1",
        }

    def _items(self, task: dict[str, Any], inputs: _Inputs) -> list[Any]:
        items = task["parameterIterator"]["items"]
        found = (
            json.loads(items["raw"])
            if "raw" in items
            else self._own_inputs(task, inputs, {}).values.get(items["inputParameter"], _UNKNOWN)
        )
        return found if isinstance(found, list) else [found]

    def _own_inputs(self, task: dict[str, Any], inputs: _Inputs, lengths: Mapping[str, int]) -> _Inputs:
        given = task.get("inputs", {})
        copies = {}
        for name, source in given.get("artifacts", {}).items():
            if "componentInputArtifact" in source:
                copies[name] = inputs.copies.get(source["componentInputArtifact"], 1)
            else:
                copies[name] = lengths.get(source["taskOutputArtifact"]["producerTask"], 1)
        values = {name: self._value(source, inputs) for name, source in given.get("parameters", {}).items()}
        return _Inputs(values, copies)

    def _value(self, source: dict[str, Any], inputs: _Inputs) -> Any:
        if "runtimeValue" in source:
            return source["runtimeValue"]["constant"]
        if "componentInputParameter" in source:
            found = inputs.values.get(source["componentInputParameter"], _UNKNOWN)
            # parseJson(string_value)["encoder"]: one field of a loop's item.
            selected = re.search(r'\["(\w+)"\]', source.get("parameterExpressionSelector", ""))
            return found.get(selected[1], _UNKNOWN) if selected and isinstance(found, dict) else found
        output = source.get("taskOutputParameter")
        if output is None:
            return _UNKNOWN
        producer = re.sub(r"-\d+$", "", output["producerTask"]).replace("-", "_")
        return self.outputs.get(producer, {}).get(output["outputParameterKey"], _UNKNOWN)

    def _executor_input(self, name: str, component: dict[str, Any], inputs: _Inputs) -> dict[str, Any]:
        taken = component.get("inputDefinitions", {}).get("artifacts", {})
        made = component.get("outputDefinitions", {})
        root = f"{{}}/v2/artifacts/{self.name}/{_UUID}/{name}/{_UUID}/"
        place, folder = root.format("minio://mlpipeline"), root.format("/minio/mlpipeline")
        artifacts = {
            key: [{"name": "1234", "uri": place + key, "metadata": _METADATA}] * inputs.copies[key]
            for key in taken
            if key in inputs.copies
        }
        provisioned = {
            key: [{"name": key, "type": definition["artifactType"], "uri": place + key}]
            for key, definition in {**made.get("artifacts", {}), **_LOGS}.items()
        }
        return {
            "inputs": {
                "parameterValues": dict(inputs.values),
                "artifacts": {key: {"artifacts": found} for key, found in artifacts.items()},
            },
            "outputs": {
                "parameters": {key: {"outputFile": f"/tmp/kfp/outputs/{key}"} for key in made.get("parameters", {})},
                "artifacts": {key: {"artifacts": found} for key, found in provisioned.items()},
                "outputFile": f"{folder}output_metadata.json",
            },
        }

    def _pod(
        self, container: dict[str, Any], component: dict[str, Any], executor_input: str, kubernetes: dict[str, Any]
    ) -> dict[str, Any]:
        """The patch of a step's pod."""
        launcher = ["/kfp-launcher/launch", "--pipeline_name", self.name, "--run_id", _UUID, "--execution_id", "1234"]
        launcher += ["--executor_input", executor_input, "--component_spec", _json({**component, "logs": _LOGS})]
        launcher += ["--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)", *_ADDRESSES, "--"]
        main = {
            "name": "main",
            "image": container["image"],
            "command": launcher,
            "args": [*container.get("command", []), *container.get("args", [])],
            "env": [*container.get("env", []), *_MLFLOW, *_env_of_secrets(kubernetes)],
            "resources": container.get("resources", {}),
        }
        # Volumes and the rest are other words for the same, about as long.
        rest = {key: value for key, value in kubernetes.items() if key not in _AS_ENV}
        return {"containers": [main], **rest}


def _env_of_secrets(kubernetes: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": pair["envVar"],
            "valueFrom": {
                reference: {
                    "name": kept[f"{name}Parameter"]["runtimeValue"]["constant"],
                    "key": pair[key],
                    "optional": kept["optional"],
                }
            },
        }
        for kind, (reference, name, key) in _AS_ENV.items()
        for kept in kubernetes.get(kind, [])
        for pair in kept["keyToEnv"]
    ]


def _tasks(component: dict[str, Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = component.get("dag", {}).get("tasks", {})
    return tasks


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _node(name: str, inputs: Mapping[str, str], outputs: Mapping[str, str] | None = None) -> int:
    """Bytes of one node of Argo."""
    node = {
        "id": f"{_RUN}-1234567890",
        "name": f"{_RUN}.root.exit-handler-1.{name}.executor(0)",
        "displayName": name,
        "inputs": {"parameters": [{"name": key, "value": value} for key, value in inputs.items()]},
    }
    if outputs:
        node["outputs"] = {
            "parameters": [{"name": key, "value": value, "valueFrom": _FROM} for key, value in outputs.items()]
        }
    # Go writes these three as six characters each.
    text = _json(node)
    return len(text.encode()) + 5 * sum(text.count(character) for character in "<>&") + _NODE_BYTES
