"""Profiles: what they refuse, and what they add to every pod of a compiled pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from manyeyes.errors import PipelineError
from manyeyes.harness.trainjob import TrainJobPlan
from manyeyes.kubeflow.compact import compact_for_cluster, step_of
from manyeyes.kubeflow.pipeline import PIPELINES, compile_pipeline
from manyeyes.kubeflow.profiles import Profile, apply_profile, list_profiles, load_profile
from tests.pipelines.checkout import ROOT
from tests.pipelines.profile_pipeline import GOLDEN, PROFILES, compile_golden, compile_plain

IMAGE = "registry.example/manyeyes-steps@sha256:" + "0" * 64


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compile_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Train with each profile, and without one under the empty name."""
    folder = tmp_path_factory.mktemp("compiled")
    profiles = {"": None, **{name: load_profile(name, root=ROOT) for name in PROFILES}}
    return {
        name: read(
            compile_pipeline(
                "train", folder / f"{name}.yaml", root=ROOT, image=IMAGE if profile else "", profile=profile
            )
        )
        for name, profile in profiles.items()
    }


def read(path: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))


def profile_file(folder: Path, **fields: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"description": "a test", **fields}), encoding="utf-8")
    return str(path)


def executors_by_step(documents: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Step -> its container and its Kubernetes part."""
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        step_of(executor): (executor["container"], platform[label])
        for label, executor in documents[0]["deploymentSpec"]["executors"].items()
    }


def retry_counts(documents: list[dict[str, Any]]) -> dict[str, int]:
    """Step -> attempts after the first, over the pipeline and every nested one."""
    spec = documents[0]
    counts = {}
    for graph in (spec["root"], *spec["components"].values()):
        for task in graph.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label:
                step = step_of(spec["deploymentSpec"]["executors"][label])
                counts[step] = task.get("retryPolicy", {}).get("maxRetryCount", 0)
    return counts


def test_both_profiles_ship() -> None:
    assert list_profiles(ROOT) == list(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_profile_compiles_to_its_golden_file(name: str, tmp_path: Path) -> None:
    fresh = compile_golden(name, tmp_path)
    assert fresh == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8"), (
        "run: python -m tests.pipelines.profile_pipeline"
    )


@pytest.mark.parametrize("name", PROFILES)
def test_every_pod_of_train_gets_the_profile(name: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    documents = compiled[name]
    # What the backend reads: protobuf refuses a field that it does not know.
    json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
    steps = executors_by_step(documents)
    assert {"preflight", "prealign_encoder", "sft", "evaluate", "register"} <= set(steps)
    for step, (container, kubernetes) in steps.items():
        json_format.ParseDict(kubernetes, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert env["MLFLOW_TRACKING_URI"].startswith("http://mlflow."), step
        assert env.get("MANYEYES_IMAGE_DIGEST") == ("sha256:" + "0" * 64 if step == "preflight" else None), step
        assert container["image"] == IMAGE, step
        secrets = [secret["secretNameParameter"]["runtimeValue"]["constant"] for secret in kubernetes["secretAsEnv"]]
        assert secrets[:2] == ["manyeyes-s3", "manyeyes-mlflow"]
        assert ("manyeyes-webhook" in secrets) == (step == "summarise_run"), step
        assert ("manyeyes-hub" in secrets) == (step != "summarise_run"), step
        assert int(kubernetes["activeDeadlineSeconds"]) > 0, step
    retries = retry_counts(documents)
    assert retries["register"] == 0
    assert retries["sft"] > 0


def test_accelerators_go_to_the_stages_that_train_and_to_nothing_else(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    steps = executors_by_step(compiled["cluster"])
    counts = {
        step: int(container["resources"].get("accelerator", {}).get("resourceCount", 0))
        for step, (container, _) in steps.items()
    }
    wanted = {"prealign_encoder": 1, "pretrain_projector": 8, "sft": 8, "evaluate": 1}
    assert {step: count for step, count in counts.items() if count} == wanted
    for step in wanted:
        kubernetes = steps[step][1]
        assert kubernetes["nodeSelector"]["labels"] == {"nvidia.com/gpu.present": "true"}
        assert [each["key"] for each in kubernetes["tolerations"]] == ["nvidia.com/gpu"]
        (shared,) = kubernetes["emptyDirMounts"]
        assert (shared["mountPath"], shared["medium"]) == ("/dev/shm", "Memory")
    assert "tolerations" not in steps["register"][1]


@pytest.mark.parametrize("name", PROFILES)
def test_profile_and_image_change_nothing_that_a_cache_key_is_made_of_but_the_image(
    name: str, compiled: dict[str, list[dict[str, Any]]]
) -> None:
    """Inputs, outputs, commands and arguments are the same; so is the form."""
    before, after = copy.deepcopy(compiled[""][0]), copy.deepcopy(compiled[name][0])
    # Only the SDK reads the versions of artifact types that are left out for a cluster.
    compact_for_cluster([before])
    for executor in (*before["deploymentSpec"]["executors"].values(), *after["deploymentSpec"]["executors"].values()):
        for key in ("image", "env", "resources"):
            executor["container"].pop(key, None)
    for spec in (before, after):
        for graph in (spec["root"], *spec["components"].values()):
            for task in graph.get("dag", {}).get("tasks", {}).values():
                task.pop("retryPolicy", None)
    assert before == after


def test_retries_leave_time_for_every_attempt(plain: list[dict[str, Any]]) -> None:
    """Argo ends a running pod when the time for all attempts is over; the SDK's default is an hour."""
    settings = {"timeout_s": 7200, "retries": {"count": 2, "backoff_s": 60, "factor": 3}}
    profile = Profile.model_validate({"description": "", "defaults": settings})
    spec = apply_profile(copy.deepcopy(plain), profile)[0]
    policy = spec["root"]["dag"]["tasks"]["preflight"]["retryPolicy"]
    assert policy["backoffMaxDuration"] == f"{3 * 7200 + 60 + 180}s"
    nested = spec["components"]["comp-stages"]["dag"]["tasks"]["sft-2"]
    assert nested["retryPolicy"] == policy


def test_step_takes_what_it_leaves_out_from_the_defaults() -> None:
    profile = Profile.model_validate(
        {
            "description": "",
            "env": {"A": "1"},
            "defaults": {"cpu_request": "1", "memory_request": "2Gi", "env": {"B": "2"}},
            "steps": {"sft": {"cpu_request": "8", "env": {"B": "3"}}},
        }
    )
    settings = profile.settings_of("sft")
    assert (settings.cpu_request, settings.memory_request) == ("8", "2Gi")
    assert settings.env == {"A": "1", "B": "3"}
    assert profile.settings_of("gate").env == {"A": "1", "B": "2"}


@pytest.mark.parametrize(
    ("fields", "found", "do"),
    [
        ({"secretz": []}, "secretz", 'Did you mean "secrets"?'),
        ({"defaults": {"memory_limits": "1Gi"}}, "defaults.memory_limits", 'Did you mean "memory_limit"?'),
        ({"steps": {"sft": {"gpu": {"cuont": 1, "count": 1}}}}, "steps.sft.gpu.cuont", 'Did you mean "count"?'),
        ({"volumes": [{"path": "/work", "claim": "a", "sizes": "1Gi"}]}, "sizes", 'Did you mean "size"?'),
        ({"steps": {"stf": {}}}, "steps.stf", 'Did you mean "sft"?'),
        ({"defaults": {"memory_limit": "lots"}}, "defaults.memory_limit is 'lots'", "docs/formats.md"),
        ({"volumes": [{"path": "/work"}]}, "volumes.0", "docs/formats.md"),
        ({"secrets": [{"name": "s", "env": {"A": "k", "B": "k"}}]}, "secrets.0", "docs/formats.md"),
        ({"defaults": {"retries": {"count": 1}}}, "mine.yaml", "docs/formats.md"),
    ],
)
def test_wrong_field_is_named_with_the_right_one(tmp_path: Path, fields: dict[str, Any], found: str, do: str) -> None:
    with pytest.raises(PipelineError) as caught:
        load_profile(profile_file(tmp_path, **fields), root=ROOT)
    assert found in caught.value.found
    assert do in caught.value.do


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "MANYEYES_WEBHOOK_URL"]
)
def test_value_of_a_secret_is_refused(tmp_path: Path, name: str) -> None:
    for fields in ({"env": {name: "x"}}, {"steps": {"sft": {"env": {name: "x"}}}}):
        with pytest.raises(PipelineError, match="looks like a secret"):
            load_profile(profile_file(tmp_path, **fields), root=ROOT)


def test_plain_variables_are_no_secrets(tmp_path: Path) -> None:
    load_profile(profile_file(tmp_path, env={"TOKENIZERS_PARALLELISM": "false", "MONKEYS": "7"}), root=ROOT)


def test_running_checkpoints_must_lie_on_a_volume(tmp_path: Path) -> None:
    env = {"MANYEYES_WORKDIR": "/work/work"}
    with pytest.raises(PipelineError, match="none of volumes"):
        load_profile(profile_file(tmp_path, env=env), root=ROOT)
    load_profile(profile_file(tmp_path, env=env, volumes=[{"path": "/work", "claim": "disk"}]), root=ROOT)


def test_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(PipelineError, match='Did you mean "cluster"'):
        load_profile("clutser", root=ROOT)


def test_every_field_of_a_profile_is_described() -> None:
    schema = Profile.model_json_schema()
    for name, model in {"Profile": schema, **schema["$defs"]}.items():
        for field, definition in model["properties"].items():
            assert definition.get("description"), f"{name}.{field}"


@pytest.mark.parametrize("name", PIPELINES)
def test_profiles_fit_every_pipeline(name: str, tmp_path: Path) -> None:
    profile = load_profile("cluster", root=ROOT)
    path = compile_pipeline(name, tmp_path / f"{name}.yaml", root=ROOT, image=IMAGE, profile=profile)
    steps = executors_by_step(read(path))
    assert steps
    assert "" not in steps


NODES: dict[str, Any] = {
    "env": {"MANYEYES_WORKDIR": "/work/work"},
    "volumes": [{"path": "/work/work", "claim": "shared"}, {"path": "/work/cache", "size": "200Gi"}],
    "defaults": {"memory_request": "8Gi", "shared_memory": "1Gi", "timeout_s": 600, "retries": {"count": 1}},
    "steps": {
        "sft": {
            "launcher": "trainjob",
            "nodes": 4,
            "start_timeout_s": 900,
            "gpu": {"count": 8},
            "memory_request": "384Gi",
            "node_selector": {"gpu": "yes"},
            "tolerations": [{"key": "gpu"}],
            "timeout_s": 7200,
        }
    },
}


def test_a_step_with_a_trainjob_waits_in_a_small_pod_and_knows_what_its_nodes_get(plain: list[dict[str, Any]]) -> None:
    profile = Profile.model_validate({"description": "", **NODES})
    steps = executors_by_step(apply_profile(copy.deepcopy(plain), profile))
    container, pod = steps["sft"]
    assert "accelerator" not in container["resources"]
    assert container["resources"]["resourceMemoryRequest"] == "2Gi"
    assert not {"nodeSelector", "tolerations", "emptyDirMounts", "genericEphemeralVolume"} & set(pod)
    assert [mount["mountPath"] for mount in pod["pvcMount"]] == ["/work/work"]
    assert int(pod["activeDeadlineSeconds"]) == 7200 + 900 + 600
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    plan = TrainJobPlan.model_validate(yaml.safe_load(env["MANYEYES_TRAINJOB"]))
    assert (plan.nodes, plan.timeout_s, plan.start_timeout_s) == (4, 7200, 900)
    assert plan.spec["trainer"]["image"] == container["image"]
    told = {variable["name"]: variable["value"] for variable in steps["preflight"][0]["env"]}
    assert (told["MANYEYES_DEVICES"], told["MANYEYES_TRAINJOB_CLAIM"]) == ("sft=32", "shared")
    assert "MANYEYES_TRAINJOB" not in told


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"steps": {"evaluate": {"launcher": "trainjob"}}},
            "which is of prealign_encoder, pretrain_projector, sft alone",
        ),
        ({"defaults": {"launcher": "trainjob"}}, "defaults has launcher trainjob"),
        ({"steps": {"sft": {"nodes": 2}}}, "are of launcher trainjob"),
        ({"volumes": [{"path": "/work/work", "size": "9Gi"}]}, "MANYEYES_WORKDIR on a claim"),
        ({"env": {}}, "MANYEYES_WORKDIR on a claim"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    with pytest.raises(PipelineError) as caught:
        load_profile(profile_file(tmp_path, **{**NODES, **change}), root=ROOT)
    assert found in str(caught.value)
