"""A profile on a compiled pipeline; see ``profiles.py`` for what a profile is."""

# kfp reads the annotations themselves: no future import here.
from typing import Any

from google.protobuf import json_format
from kfp import dsl, kubernetes
from pydantic import BaseModel

from manyeyes.harness.refusals import WINDOW
from manyeyes.kubeflow.profiles import KeepRuns, Profile, StepSettings

# Between the end of a pause and the first line of the next attempt.
_POD_START_S = 600


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
            compiled[step] = _compile_settings(profile, profile.settings_of(step))
        part = compiled[step]
        container = executor["container"]
        if part.resources:
            container["resources"] = part.resources
        names = {variable["name"] for variable in part.env}
        kept = [variable for variable in container.get("env", []) if variable["name"] not in names]
        if kept or part.env:
            container["env"] = sorted([*kept, *part.env], key=lambda variable: str(variable["name"]))
        executors[label] = part.executor
        if part.retry:
            retries[label] = part.retry
        kubernetes.update({key: value for key, value in part.whole_run.items() if value})
    _set_retries(spec, retries)
    return [spec, platform]


def step_of(executor: dict[str, Any]) -> str:
    """Name of the step that an executor runs: the function that its command line names."""
    arguments = [*executor["container"].get("command", []), *executor["container"].get("args", [])]
    if "--function_to_execute" not in arguments:
        return ""
    return str(arguments[arguments.index("--function_to_execute") + 1])


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


def _compile_settings(profile: Profile, settings: StepSettings) -> _Compiled:
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
        _set_up(component(), profile, settings)

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


def _set_up(task: Any, profile: Profile, settings: StepSettings) -> None:
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
        longest = (retries.count + 1) * (settings.timeout_s or 0) + retries.pauses_s
        task.set_retry(retries.count, f"{retries.backoff_s}s", float(retries.factor), f"{longest}s")
        env.setdefault(WINDOW, str(retries.pauses_s + _POD_START_S))
    for name, value in sorted(env.items()):
        task.set_env_variable(name, value)
    # Steps of one run find each other's traces by it; see steps/traces.py.
    kubernetes.use_field_path_as_env(task, "MANYEYES_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
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
    for secret in profile.secrets:
        keys = {key: variable for variable, key in secret.env.items()}
        kubernetes.use_secret_as_env(task, secret.name, keys, optional=secret.optional)
    for config_map in profile.config_maps:
        keys = {key: variable for variable, key in config_map.env.items()}
        kubernetes.use_config_map_as_env(task, config_map.name, keys, optional=config_map.optional)
    for number, volume in enumerate(profile.volumes):
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
