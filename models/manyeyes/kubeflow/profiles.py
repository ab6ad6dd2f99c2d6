"""What a cluster needs of every pod, as data: ``infra/profiles/<name>.yaml``, applied to a compiled pipeline.

A profile changes no code and no cache key: Kubeflow's cache looks at image, command and inputs only.
"""

# kfp reads the annotations themselves: no future import here.

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from google.protobuf import json_format
from kfp import dsl, kubernetes
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from manyeyes.data.remote import is_remote_address
from manyeyes.errors import PipelineError, did_you_mean
from manyeyes.harness.base import RETRIES
from manyeyes.harness.cluster import NODE, TRAINER
from manyeyes.harness.trainjob import CLAIM, PLAN, POD_LABEL, RUNTIME, TrainJobPlan
from manyeyes.kubeflow.compact import step_of
from manyeyes.strict import StrictModel

FOLDER = Path("infra") / "profiles"
_QUANTITY = r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
# Steps that train, by stage.
_STAGES = {"prealign": "prealign_encoder", "pretrain": "pretrain_projector", "sft": "sft"}
# Values of such variables belong into a secret; a profile is committed.
_SECRET_WORDS = re.compile(r"(^|_)(PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIALS?|WEBHOOK_URL)(_|$)")


class Gpu(StrictModel):
    """Accelerators of a step."""

    resource: str = Field(default="nvidia.com/gpu", description="The extended resource's name on the cluster.")
    count: int = Field(ge=0, description="How many each pod of the step gets; 0 for none.")


class SecretEnv(StrictModel):
    """A Kubernetes secret or config map whose keys become environment variables."""

    name: str = Field(pattern=_NAME, description="Name of the secret or config map; its values never stand here.")
    env: dict[str, str] = Field(min_length=1, description="Environment variable -> key in the secret or config map.")
    optional: bool = Field(default=False, description="Whether a pod starts without it.")
    steps: list[str] = Field(default_factory=list, description="Steps that get it; empty: every step.")

    def is_for(self, step: str) -> bool:
        """Whether a step's pods get it."""
        return not self.steps or step in self.steps

    @model_validator(mode="after")
    def _one_variable_a_key(self) -> "SecretEnv":
        if len(set(self.env.values())) < len(self.env):
            raise ValueError("two variables come from one key; Kubeflow takes one variable a key")
        return self


class Volume(StrictModel):
    """A folder of every pod: an existing claim, or a disk that lives as long as the pod."""

    path: str = Field(pattern=r"^/", description="Where it is mounted.")
    claim: str | None = Field(default=None, pattern=_NAME, description="An existing PersistentVolumeClaim.")
    sub_path: str = Field(default="", description="Folder of the claim.")
    size: str | None = Field(default=None, pattern=_QUANTITY, description="Size of a disk made for each pod.")
    storage_class: str | None = Field(default=None, description="Storage class of that disk; the cluster's default.")

    @model_validator(mode="after")
    def _one_kind(self) -> "Volume":
        if (self.claim is None) == (self.size is None):
            raise ValueError("needs either claim (an existing one) or size (a disk for each pod)")
        return self


class Toleration(StrictModel):
    """A taint of nodes that pods put up with."""

    key: str = Field(description="The taint's key.")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="How value is compared.")
    value: str | None = Field(default=None, description="The taint's value, with Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="The taint's effect; all by default."
    )


class Retries(StrictModel):
    """How often a failed step is tried again."""

    count: int = Field(ge=0, le=10, description="Further attempts after the first.")
    backoff_s: int = Field(default=60, ge=0, description="Seconds before the second attempt.")
    factor: int = Field(default=2, ge=1, description="By how much the pause grows with each attempt.")

    @property
    def pauses(self) -> list[int]:
        """Seconds before each further attempt."""
        return [self.backoff_s * self.factor**attempt for attempt in range(self.count)]


class StepSettings(StrictModel):
    """What the pods of one step get. A field that a step leaves out is taken from ``defaults``."""

    cpu_request: str | None = Field(default=None, pattern=_QUANTITY, description="CPU cores asked for.")
    cpu_limit: str | None = Field(default=None, pattern=_QUANTITY, description="CPU cores at most.")
    memory_request: str | None = Field(default=None, pattern=_QUANTITY, description="Memory asked for.")
    memory_limit: str | None = Field(default=None, pattern=_QUANTITY, description="Memory at most.")
    gpu: Gpu | None = Field(default=None, description="Accelerators.")
    shared_memory: str | None = Field(
        default=None, pattern=_QUANTITY, description="Size of /dev/shm in memory; counts towards the memory limit."
    )
    node_selector: dict[str, str] | None = Field(default=None, description="Labels that a node must have.")
    tolerations: list[Toleration] | None = Field(default=None, description="Taints that pods put up with.")
    timeout_s: int | None = Field(
        default=None, gt=0, description="Seconds before Kubernetes ends a pod, with all attempts in it."
    )
    retries: Retries | None = Field(
        default=None,
        description="Attempts after a failure that is not the user's, in the step's own pod. Needs timeout_s.",
    )
    env: dict[str, str] = Field(default_factory=dict, description="Further environment variables.")
    launcher: Literal["inpod", "trainjob"] = Field(
        default="inpod",
        description="Where a step trains: in its own pod, or on nodes of a Kubeflow TrainJob that it makes. Then all "
        "that stands here is of each node, and the step's own pod is a small one.",
    )
    nodes: int = Field(default=1, ge=1, description="With launcher trainjob: pods that train together.")
    start_timeout_s: int = Field(
        default=3600, gt=0, description="With launcher trainjob: seconds until all nodes must run."
    )


class KeepRuns(StrictModel):
    """How long a finished run's pods and workflow stay, in seconds; Kubeflow's own record stays."""

    success_s: int | None = Field(default=None, ge=0, description="After a run that succeeded.")
    failure_s: int | None = Field(default=None, ge=0, description="After a run that failed: logs go with the pods.")


class RunAs(StrictModel):
    """User of the container's process."""

    user: int | None = Field(default=None, ge=0, description="Numeric user.")
    group: int | None = Field(default=None, ge=0, description="Numeric group.")
    non_root: bool = Field(default=True, description="Refuse to start as root.")


class Profile(StrictModel):
    """``infra/profiles/<name>.yaml``: everything that a cluster needs, and nothing of a model."""

    description: str = Field(description="Which cluster this is for.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of every step.")
    secrets: list[SecretEnv] = Field(default_factory=list, description="Secrets that become variables.")
    config_maps: list[SecretEnv] = Field(default_factory=list, description="Config maps that become variables.")
    volumes: list[Volume] = Field(default_factory=list, description="Folders of every step.")
    image_pull_secrets: list[str] = Field(default_factory=list, description="Secrets of the image registry.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="When a node pulls the image; the cluster's default."
    )
    run_as: RunAs | None = Field(default=None, description="User of the process; the image's own by default.")
    data_remote: str | None = Field(
        default=None,
        description="Where the cluster reads snapshots: s3://bucket/prefix, hub:OWNER/NAME@COMMIT (with HF_TOKEN "
        "from a secret), or a folder on one of volumes.",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Labels of every pod.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations of every pod.")
    run_timeout_s: int | None = Field(default=None, gt=0, description="Seconds before a whole run is ended.")
    keep_runs: KeepRuns | None = Field(default=None, description="How long finished runs stay.")
    defaults: StepSettings = Field(default_factory=StepSettings, description="Of every step.")
    steps: dict[str, StepSettings] = Field(default_factory=dict, description="By step: what differs from defaults.")

    @field_validator("data_remote")
    @classmethod
    def _readable(cls, url: str | None) -> str | None:
        if url is None or url.startswith("/") or is_remote_address(url):
            return url
        raise ValueError("s3://BUCKET/PREFIX, hub:OWNER/NAME@COMMIT, or the path of a folder on one of volumes")

    @model_validator(mode="after")
    def _sound(self) -> "Profile":
        places = {"env": self.env, **{f"steps.{name}.env": step.env for name, step in self.steps.items()}}
        for place, variables in {**places, "defaults.env": self.defaults.env}.items():
            for name in variables:
                if _SECRET_WORDS.search(name.upper()):
                    raise ValueError(f"{place}.{name} looks like a secret; name a Kubernetes secret under secrets")
        for step in self.steps or {"": StepSettings()}:
            settings = self.settings_of(step)
            if settings.retries is not None and settings.retries.count and settings.timeout_s is None:
                # Argo ends a task that it may retry after a limit for all attempts, an hour unless told otherwise.
                raise ValueError(f"{step or 'defaults'} has retries and no timeout_s, which one attempt may take")
        self._check_launchers()
        workdir = self.env.get("MANYEYES_WORKDIR")
        if workdir and not any(Path(workdir).is_relative_to(volume.path) for volume in self.volumes):
            raise ValueError(f"env.MANYEYES_WORKDIR is {workdir}, which lies on none of volumes: it would not last")
        return self

    def _check_launchers(self) -> None:
        for name, step in {"defaults": self.defaults, **self.steps}.items():
            if step.launcher == "inpod":
                if step.model_fields_set & {"nodes", "start_timeout_s"}:
                    raise ValueError(f"{name} has nodes or start_timeout_s, which are of launcher trainjob")
                continue
            if name not in _STAGES.values():
                raise ValueError(f"{name} has launcher trainjob, which is of {', '.join(_STAGES.values())} alone")
            if self.shared_claim(name) is None:
                raise ValueError(
                    f"steps.{name} has launcher trainjob, whose nodes and step need MANYEYES_WORKDIR on a claim of "
                    "volumes that all of them mount (ReadWriteMany)"
                )

    def shared_claim(self, step: str) -> str | None:
        """The claim on which the running checkpoints of a step lie, if they lie on one."""
        workdir = self.settings_of(step).env.get("MANYEYES_WORKDIR", "")
        around = [volume for volume in self.volumes if workdir and Path(workdir).is_relative_to(volume.path)]
        return max(around, key=lambda volume: len(volume.path)).claim if around else None

    def _for_preflight(self) -> dict[str, str]:
        """What preflight is told of the steps that train: devices by stage, and what TrainJobs need."""
        told, devices = {}, []
        for stage, step in _STAGES.items():
            settings = self.steps.get(step, StepSettings())
            if settings.launcher == "trainjob":
                told[CLAIM] = self.shared_claim(step) or ""
            if settings.gpu is not None and settings.gpu.count:
                devices.append(f"{stage}={settings.gpu.count * settings.nodes}")
        return {**told, **({"MANYEYES_DEVICES": ",".join(devices)} if devices else {})}

    def settings_of(self, step: str) -> StepSettings:
        """The settings of one step, with the defaults filled in."""
        own = self.steps.get(step, StepSettings())
        given = {name: getattr(own, name) for name in own.model_fields_set}
        env = {**self.env, **self.defaults.env, **own.env}
        if step == "preflight":
            env = {**self._for_preflight(), **env}
        return self.defaults.model_copy(update={**given, "env": env})


def list_profiles(root: Path = Path()) -> list[str]:
    """Names of the profiles of a checkout."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def load_profile(name_or_path: str, *, root: Path = Path()) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: A name in ``infra/profiles`` or the path of a YAML file.
        root: The checkout.

    Raises:
        PipelineError: No such profile, not YAML, an unknown field or a wrong value.
    """
    is_file = name_or_path.endswith((".yaml", ".yml"))
    path = Path(name_or_path) if is_file else root / FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        names = list_profiles(root)
        raise PipelineError(
            f'profile is "{name_or_path}"',
            f"one of {', '.join(names) or 'none here'}, or the path of a YAML file",
            f"{did_you_mean(name_or_path, names)}Profiles lie in {FOLDER}.",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PipelineError(f"{path} is not YAML ({error})", "a YAML file", "Fix the line that it names.") from error
    if not isinstance(tree, dict):
        raise PipelineError(f"{path} holds no fields", "a map of fields", "See infra/profiles/laptop.yaml.")
    try:
        profile = Profile.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, path) from error
    _check_step_names(profile, path, root)
    return profile


def _check_step_names(profile: Profile, path: Path, root: Path) -> None:
    known = sorted(folder.parent.name for folder in (root / "components").glob("*/component.py"))
    named = [(f"steps.{name}", name) for name in profile.steps]
    for kind, entries in (("secrets", profile.secrets), ("config_maps", profile.config_maps)):
        named += [(f"{kind}.{entry.name}.steps has {name}", name) for entry in entries for name in entry.steps]
    for place, name in named:
        if known and name not in known:
            raise PipelineError(
                f"{path}: {place}", f"one of {', '.join(known)}", f"{did_you_mean(name, known)}Rename it."
            )


def _explain(error: ValidationError, path: Path) -> PipelineError:
    problems = error.errors()
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"])
    where = f"{path}: {place}" if place else str(path)
    more = f" ({len(problems) - 1} more of its fields are wrong too.)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1])
        hint = did_you_mean(str(first["loc"][-1]), fields)
        return PipelineError(where, "no such field", f"{hint}The fields there are {', '.join(fields)}.{more}")
    if first["type"] == "missing":
        return PipelineError(f"{where} is missing", "this field has no default", f"Add it.{more}")
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict | BaseModel) else f" is {first['input']!r}"
    return PipelineError(f"{where}{shown}", message, f"Every field is described in docs/formats.md.{more}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    schema = Profile.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        node = _resolve(node, schema)
        inside = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        node = inside if inside is not None else node.get("additionalProperties", {})
    return sorted(_resolve(node, schema).get("properties", {}))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for choice in (node, *node.get("anyOf", [])):
        if "$ref" in choice:
            found: dict[str, Any] = schema["$defs"][choice["$ref"].split("/")[-1]]
            return found
        if choice.get("type") == "array":
            return dict(choice)
    return node


# kfp reads the annotations themselves: no future import here.


def apply_profile(documents: list[dict[str, Any]], profile: Profile) -> list[dict[str, Any]]:
    """Add a profile to a compiled pipeline, its nested pipelines included.

    The SDK itself says what each setting compiles to: a scratch pipeline of one task gets the settings by
    kfp-kubernetes, and its resources, environment, retries and platform part are taken over for every executor that
    runs the step.

    Args:
        documents: The YAML documents of a compiled pipeline.
        profile: What to add.

    Returns:
        Two documents: the pipeline and its Kubernetes part.
    """
    spec = documents[0]
    platform: dict[str, Any] = documents[1] if len(documents) > 1 else {}
    kubernetes = platform.setdefault("platforms", {}).setdefault("kubernetes", {})
    executors = kubernetes.setdefault("deploymentSpec", {}).setdefault("executors", {})
    retries: dict[str, dict[str, Any]] = {}
    compiled: dict[str, _Compiled] = {}
    for label, executor in sorted(spec["deploymentSpec"]["executors"].items()):
        if "container" not in executor:
            continue
        step = step_of(executor)
        if step not in compiled:
            compiled[step] = _compile_settings(profile, step)
        part = compiled[step]
        container = executor["container"]
        if part.resources:
            container["resources"] = part.resources
        env = list(part.env)
        if profile.settings_of(step).launcher == "trainjob":
            env.append({"name": PLAN, "value": trainjob_plan(profile, step, container["image"]).text()})
        names = {variable["name"] for variable in env}
        kept = [variable for variable in container.get("env", []) if variable["name"] not in names]
        if kept or env:
            container["env"] = sorted([*kept, *env], key=lambda variable: str(variable["name"]))
        executors[label] = part.executor
        if part.retry:
            retries[label] = part.retry
        kubernetes.update({key: value for key, value in part.whole_run.items() if value})
    _set_retries(spec, retries)
    return [spec, platform]


# Of a step's own pod while a TrainJob trains: torch is loaded, and files are copied.
_WAITING_POD = {"cpu_request": "500m", "cpu_limit": None, "memory_request": "2Gi", "memory_limit": "4Gi"}
_ELSEWHERE: dict[str, Any] = {"gpu": None, "shared_memory": None, "node_selector": None, "tolerations": None}


def _waiting_pod(settings: StepSettings) -> StepSettings:
    """What the pod of a step gets that trains on other nodes; it outlives its job, whose end it tells."""
    timeout = None if settings.timeout_s is None else settings.timeout_s + settings.start_timeout_s + 600
    return settings.model_copy(update={**_WAITING_POD, **_ELSEWHERE, "timeout_s": timeout})


def trainjob_plan(profile: Profile, step: str, image: str) -> TrainJobPlan:
    """The TrainJob of a step, but for its name and its command.

    Args:
        profile: Whose ``steps`` gives the step the launcher ``trainjob``.
        step: A step that trains.
        image: Of the step.
    """
    settings = profile.settings_of(step)
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(settings.env.items())]
    for kind, entries in (("secretKeyRef", profile.secrets), ("configMapKeyRef", profile.config_maps)):
        for entry in [entry for entry in entries if entry.is_for(step)]:
            for variable, key in sorted(entry.env.items()):
                optional = {"optional": True} if entry.optional else {}
                source = {kind: {"name": entry.name, "key": key, **optional}}
                env.append({"name": variable, "valueFrom": source})
    gpu = settings.gpu or Gpu(count=0)
    gpus = {gpu.resource: gpu.count} if gpu.count else {}
    requests = {"cpu": settings.cpu_request, "memory": settings.memory_request, **gpus}
    limits = {"cpu": settings.cpu_limit, "memory": settings.memory_limit, **gpus}
    resources = {"requests": _given(requests), "limits": _given(limits)}
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if settings.shared_memory is not None:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    for number, volume in enumerate(profile.volumes):
        source = {"persistentVolumeClaim": {"claimName": volume.claim}} if volume.claim else {}
        if volume.size is not None:
            asked = {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": volume.storage_class,
                "resources": {"requests": {"storage": volume.size}},
            }
            source = {"ephemeral": {"volumeClaimTemplate": {"spec": _given(asked)}}}
        volumes.append({"name": f"disk-{number}", **source})
        mounts.append(_given({"name": f"disk-{number}", "mountPath": volume.path, "subPath": volume.sub_path}))
    user = profile.run_as
    security = {"runAsUser": user.user, "runAsGroup": user.group, "runAsNonRoot": user.non_root} if user else {}
    pod = {
        "volumes": volumes,
        "containers": [{"name": NODE, "volumeMounts": mounts}] if mounts else [],
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
        "securityContext": _given(security),
        "nodeSelector": settings.node_selector,
        "tolerations": [each.model_dump(exclude_none=True) for each in settings.tolerations or []],
    }
    # The first label is that of all pods of a pipeline, by which network policies know them.
    labels = {"pipelines.kubeflow.org/v2_component": "true", POD_LABEL: "true", **profile.labels}
    template = {"metadata": _given({"labels": labels, "annotations": profile.annotations}), "spec": _given(pod)}
    node = {"name": NODE, "template": {"spec": {"template": template}}}
    processes = gpu.count or int(settings.env.get("MANYEYES_PROCESSES") or 1)
    spec = {
        "runtimeRef": {"apiGroup": TRAINER, "kind": "TrainingRuntime", "name": RUNTIME},
        "trainer": _given(
            {
                "image": image,
                "numNodes": settings.nodes,
                "numProcPerNode": processes,
                "resourcesPerNode": _given(resources),
                "env": env,
            }
        ),
        "runtimePatches": [
            {"manager": "manyeyes/step", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}}}
        ],
        "activeDeadlineSeconds": settings.timeout_s,
    }
    return TrainJobPlan(start_timeout_s=settings.start_timeout_s, spec=_given(spec))


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "", {}, [])}


def _set_retries(spec: dict[str, Any], retries: dict[str, dict[str, Any]]) -> None:
    graphs = [spec["root"], *spec["components"].values()]
    for graph in graphs:
        for task in graph.get("dag", {}).get("tasks", {}).values():
            label = spec["components"].get(task["componentRef"]["name"], {}).get("executorLabel")
            if label in retries:
                task["retryPolicy"] = dict(retries[label])


class _Compiled(BaseModel):
    """What one step's settings compile to."""

    resources: dict[str, Any]
    env: list[dict[str, Any]]
    retry: dict[str, Any]
    executor: dict[str, Any]
    whole_run: dict[str, Any]


def _compile_settings(profile: Profile, step: str) -> _Compiled:
    def image() -> dsl.ContainerSpec:
        return dsl.ContainerSpec(image="scratch", command=["true"])

    keep = profile.keep_runs or KeepRuns()
    whole_run = dsl.PipelineConfig(
        ttl_seconds_after_success=keep.success_s,
        ttl_seconds_after_failure=keep.failure_s,
        active_deadline_seconds=profile.run_timeout_s,
    )
    component = dsl.container_component(image)

    def scratch() -> None:
        _set_up(component(), profile, step)

    pipeline = dsl.pipeline(name="scratch", pipeline_config=whole_run)(scratch)
    spec = json_format.MessageToDict(pipeline.pipeline_spec)
    platform = json_format.MessageToDict(pipeline.platform_spec).get("platforms", {}).get("kubernetes", {})
    (executor,) = spec["deploymentSpec"]["executors"].values()
    (task,) = spec["root"]["dag"]["tasks"].values()
    parts = list(platform.get("deploymentSpec", {}).get("executors", {}).values())
    return _Compiled(
        resources=executor["container"].get("resources", {}),
        env=executor["container"].get("env", []),
        retry=task.get("retryPolicy", {}),
        executor=parts[0] if parts else {},
        whole_run={"pipelineConfig": platform.get("pipelineConfig", {})},
    )


def _set_up(task: Any, profile: Profile, step: str) -> None:
    settings = profile.settings_of(step)
    waits = settings.launcher == "trainjob"
    if waits:
        settings = _waiting_pod(settings)
    for name in ("cpu_request", "cpu_limit", "memory_request", "memory_limit"):
        value = getattr(settings, name)
        if value is not None:
            getattr(task, f"set_{name}")(value)
    if settings.gpu is not None and settings.gpu.count:
        task.set_accelerator_type(settings.gpu.resource).set_accelerator_limit(settings.gpu.count)
    env = dict(settings.env)
    if settings.retries is not None and settings.retries.count:
        retries = settings.retries
        # Argo counts this from the start of the first attempt and ends a running pod by it, and the SDK's default is an
        # hour (https://github.com/argoproj/argo-workflows/issues/13044): all attempts and pauses must fit in.
        longest = (retries.count + 1) * (settings.timeout_s or 0) + sum(retries.pauses)
        task.set_retry(retries.count, f"{retries.backoff_s}s", float(retries.factor), f"{longest}s")
        env.setdefault(RETRIES, ",".join(map(str, retries.pauses)))
    for name, value in sorted(env.items()):
        task.set_env_variable(name, value)
    if settings.timeout_s is not None:
        kubernetes.set_timeout(task, settings.timeout_s)
    if settings.shared_memory is not None:
        kubernetes.empty_dir_mount(
            task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=settings.shared_memory
        )
    for key, value in sorted((settings.node_selector or {}).items()):
        kubernetes.add_node_selector(task, key, value)
    for toleration in settings.tolerations or []:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
    for secret in [secret for secret in profile.secrets if secret.is_for(step)]:
        keys = {key: variable for variable, key in secret.env.items()}
        kubernetes.use_secret_as_env(task, secret.name, keys, optional=secret.optional)
    for config_map in [config_map for config_map in profile.config_maps if config_map.is_for(step)]:
        keys = {key: variable for variable, key in config_map.env.items()}
        kubernetes.use_config_map_as_env(task, config_map.name, keys, optional=config_map.optional)
    for number, volume in enumerate(profile.volumes):
        if volume.claim is None and waits:
            continue
        if volume.claim is not None:
            kubernetes.mount_pvc(task, volume.claim, volume.path, sub_path=volume.sub_path)
        else:
            kubernetes.add_ephemeral_volume(
                task, f"disk-{number}", volume.path, ["ReadWriteOnce"], str(volume.size), volume.storage_class
            )
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, profile.image_pull_secrets)
    if profile.image_pull_policy is not None:
        kubernetes.set_image_pull_policy(task, profile.image_pull_policy)
    if profile.run_as is not None:
        user = profile.run_as
        kubernetes.set_security_context(task, user.user, user.group, user.non_root)
    for key, value in sorted(profile.labels.items()):
        kubernetes.add_pod_label(task, key, value)
    for key, value in sorted(profile.annotations.items()):
        kubernetes.add_pod_annotation(task, key, value)
