"""A training step with a TrainJob, against a stand-in for the Kubernetes API that refuses, stalls, fails and evicts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyeyes.children import pickle_error
from manyeyes.errors import PipelineError, ProcessLostError, RecordError
from manyeyes.harness import cluster as cluster_module
from manyeyes.harness import trainjob as trainjob_module
from manyeyes.harness.base import Reporter
from manyeyes.harness.cluster import ClusterAwayError
from manyeyes.harness.trainjob import CLAIM, PLAN, TrainJobPlan, check_trainjobs, job_name, train_in_trainjob
from manyeyes.kubeflow.profiles import Profile, trainjob_plan
from manyeyes.steps import preflight
from manyeyes.training.loop import Progress
from manyeyes.training.stage import STAGE_REPORT, StageReport
from tests.trainjob_server import NAMESPACE, Job, Stand, refused_fields, serving

IMAGE = "registry.example/manyeyes-steps@sha256:" + "0" * 64
JOBS = f"/namespaces/{NAMESPACE}/trainjobs"
REPORT = StageReport(
    stage="sft",
    encoder=None,
    stage_digest="d",
    steps=3,
    samples=12,
    seconds=1.0,
    resumed_from_step=None,
    first_loss=2.0,
    final_loss=1.0,
    checkpoint_digest="c",
    trainable_parameters={},
    history=(),
)
PROGRESS = Progress(
    stage="sft",
    encoder=None,
    step=2,
    steps=3,
    loss=1.5,
    learning_rate=0.1,
    grad_norm=1.0,
    samples_per_s=8.0,
    data_wait=0.0,
    checkpoint_stall=0.0,
    tokens_per_s=100.0,
    padding=0.0,
    supervised=0.5,
    mfu=0.3,
    peak_memory_gb=1.5,
    eta_s=1.0,
    seconds=1.0,
)


def profile(folder: Path, **step: Any) -> Profile:
    """A cluster with everything that a profile can say."""
    return Profile.model_validate(
        {
            "description": "a test",
            "env": {"MANYEYES_WORKDIR": f"{folder}/work", "MANYEYES_CACHE": "/cache"},
            "secrets": [
                {"name": "s3", "env": {"AWS_ACCESS_KEY_ID": "id"}},
                {"name": "hub", "env": {"HF_TOKEN": "token"}, "optional": True, "steps": ["sft"]},
                {"name": "hook", "env": {"MANYEYES_WEBHOOK_URL": "url"}, "steps": ["summarise_run"]},
            ],
            "config_maps": [{"name": "settings", "env": {"NCCL_DEBUG": "debug"}}],
            "volumes": [
                {"path": str(folder), "claim": "shared", "sub_path": "team"},
                {"path": "/cache", "size": "200Gi", "storage_class": "fast"},
            ],
            "image_pull_secrets": ["registry"],
            "run_as": {"user": 10001, "group": 10001},
            "labels": {"team": "vision"},
            "annotations": {"sidecar.istio.io/inject": "false"},
            "steps": {
                "sft": {
                    "launcher": "trainjob",
                    "nodes": 2,
                    "start_timeout_s": 60,
                    "timeout_s": 7200,
                    "gpu": {"count": 8},
                    "cpu_request": "48",
                    "memory_request": "384Gi",
                    "memory_limit": "480Gi",
                    "shared_memory": "128Gi",
                    "node_selector": {"gpu": "yes"},
                    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
                    **step,
                }
            },
        }
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cluster_module, trainjob_module):
        monkeypatch.setattr(module, "_POLL_S", 0.05)
    monkeypatch.setattr(trainjob_module, "_FILES_S", 0.3)
    monkeypatch.setattr(cluster_module, "_ANSWER_S", (1.0, 1.0))
    monkeypatch.setattr(cluster_module, "_MARK_S", 0.5)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


class Step:
    """A step that trains with a TrainJob in ``folder``."""

    def __init__(self, folder: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.stand, self._patch = folder, stand, monkeypatch
        self.progress: list[Progress] = []
        self.waits: list[str] = []
        self.ended_by_signal = False
        (folder / "pretrained").mkdir()
        (folder / "pretrained" / "weights").write_text("w", encoding="utf-8")
        monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
        monkeypatch.setenv("HOSTNAME", "step")
        monkeypatch.setenv("MANYEYES_PIPELINE_RUN", "run-1")
        monkeypatch.setenv("MANYEYES_WORKDIR", f"{folder}/work")
        self.plan()

    def plan(self, **step: Any) -> None:
        self._patch.setenv(PLAN, trainjob_plan(profile(self.folder, **step), "sft", IMAGE).text())

    @property
    def name(self) -> str:
        return job_name("sft", "pinned", encoder=None)

    def _show(self, progress: Progress) -> None:
        self.progress.append(progress)
        if self.ended_by_signal:
            raise KeyboardInterrupt  # as run_step's handler of SIGTERM does

    def run(self) -> StageReport:
        return train_in_trainjob(
            "sft",
            pinned="pinned",
            out=self.folder / "out",
            encoder=None,
            encoder_checkpoints={},
            checkpoint=self.folder / "pretrained",
            quarantine=frozenset({"b", "a"}),
            on_progress=self._show,
            on_wait=self.waits.append,
        )


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Step]:
    with serving(succeed, tmp_path) as stand:
        yield Step(tmp_path, stand, monkeypatch)


def folder_of(job: Job) -> Path:
    return Path(job.manifest["spec"]["trainer"]["command"][-1])


def write_result(job: Job) -> None:
    result = folder_of(job) / "result"
    result.mkdir(parents=True)
    (result / STAGE_REPORT).write_text(REPORT.model_dump_json(), encoding="utf-8")
    (result / "model.safetensors").write_bytes(b"weights")


def succeed(job: Job) -> None:
    run(job)
    job.pods[0].say("Loading weights")
    job.pods[0].say(f"manyeyes-progress: {PROGRESS.model_dump_json()}")
    job.pods[1].say("nobody reads this")
    complete(job)


def complete(job: Job) -> None:
    write_result(job)
    job.set("Complete")


def run(job: Job) -> None:
    for pod in job.pods:
        pod.run()


def run_and_tell(job: Job) -> None:
    run(job)
    job.pods[0].say(f"manyeyes-progress: {PROGRESS.model_dump_json()}")


def later(seconds: float, then: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, then)
    timer.daemon = True
    timer.start()


def fail(job: Job, *, message: str = "jobset failed") -> None:
    job.set("Failed", "JobsFailed", message)


# --- the object ----------------------------------------------------------------------------------------------------


def test_the_step_makes_a_trainjob_that_the_published_schema_takes_and_hands_out_its_result(
    step: Step, capsys: pytest.CaptureFixture[str]
) -> None:
    step.stand.own["metadata"]["ownerReferences"] = [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u", "controller": True}
    ]
    seen: list[Job] = []
    inputs: dict[str, Any] = {}

    def play(job: Job) -> None:
        seen.append(job)
        inputs.update(json.loads((folder_of(job) / "inputs" / "task.json").read_text(encoding="utf-8")))
        assert (folder_of(job) / "inputs" / "checkpoint" / "weights").read_text(encoding="utf-8") == "w"
        succeed(job)

    step.stand.play = play
    assert step.run() == REPORT
    assert (step.folder / "out" / "model.safetensors").read_bytes() == b"weights"
    (job,) = seen
    assert inputs == {
        "pinned": "pinned",
        "stage": "sft",
        "encoder": None,
        "encoder_checkpoints": [],
        "checkpoint": True,
        "quarantine": ["a", "b"],
    }
    assert refused_fields(job.manifest) == []
    assert job.manifest["metadata"]["ownerReferences"] == [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"}
    ]
    spec = job.manifest["spec"]
    assert spec["activeDeadlineSeconds"] == 7200
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "manyeyes"}
    trainer = spec["trainer"]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == (IMAGE, 2, 8)
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "48", "memory": "384Gi", "nvidia.com/gpu": 8},
        "limits": {"memory": "480Gi", "nvidia.com/gpu": 8},
    }
    env = {variable["name"]: variable.get("value") or variable["valueFrom"] for variable in trainer["env"]}
    assert env == {
        "MANYEYES_WORKDIR": f"{step.folder}/work",
        "MANYEYES_CACHE": "/cache",
        "MANYEYES_PIPELINE_RUN": "run-1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110",
        "AWS_ACCESS_KEY_ID": {"secretKeyRef": {"name": "s3", "key": "id"}},
        "HF_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}},
        "NCCL_DEBUG": {"configMapKeyRef": {"name": "settings", "key": "debug"}},
    }
    template = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    pod = template["spec"]["template"]
    assert pod["metadata"]["labels"]["team"] == "vision"
    assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert pod["spec"]["nodeSelector"] == {"gpu": "yes"}
    assert pod["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["spec"]["securityContext"] == {"runAsUser": 10001, "runAsGroup": 10001, "runAsNonRoot": True}
    mounts = {mount["mountPath"]: mount for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    shared = mounts[str(step.folder)]
    assert shared["subPath"] == "team"
    assert volumes[shared["name"]]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "128Gi"}
    disk = volumes[mounts["/cache"]["name"]]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert disk == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "200Gi"}},
    }
    # It tells what the first node tells, and leaves nothing behind.
    assert step.progress == [PROGRESS]
    log = capsys.readouterr().err
    assert "Loading weights\n" in log
    assert "nobody reads this" not in log
    assert "manyeyes-progress" not in log
    assert step.stand.deleted == [step.name]
    assert not folder_of(job).exists()


def test_the_published_schema_refuses_what_no_trainjob_has(tmp_path: Path) -> None:
    plan = trainjob_plan(profile(tmp_path), "sft", IMAGE)
    manifest = {"metadata": {"name": "manyeyes-sft-1"}, "spec": {**plan.spec, "nodes": 2}}
    assert refused_fields(manifest)
    bad = {**plan.spec, "trainer": {**plan.spec["trainer"], "numNodes": "two"}}
    assert refused_fields({"metadata": {"name": "manyeyes-sft-1"}, "spec": bad})
    assert refused_fields({"metadata": {"name": "manyeyes-" + "s" * 60}, "spec": plan.spec})
    assert not refused_fields({"metadata": {"name": "manyeyes-sft-1"}, "spec": plan.spec})


def test_a_plan_without_gpus_or_limits_asks_for_none(tmp_path: Path) -> None:
    simple = Profile.model_validate(
        {
            "description": "",
            "env": {"MANYEYES_WORKDIR": "/work", "MANYEYES_PROCESSES": "2"},
            "volumes": [{"path": "/work", "claim": "c"}],
            "steps": {"prealign_encoder": {"launcher": "trainjob"}},
        }
    )
    plan = trainjob_plan(simple, "prealign_encoder", IMAGE)
    assert not refused_fields({"metadata": {"name": "m"}, "spec": plan.spec})
    assert (plan.nodes, plan.spec["trainer"]["numProcPerNode"]) == (1, 2)
    assert "resourcesPerNode" not in plan.spec["trainer"]
    assert TrainJobPlan.model_validate(yaml.safe_load(plan.text())) == plan


def test_names_tell_runs_stages_and_recipes_apart_and_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [job_name("sft", "a", encoder=None), job_name("sft", "b", encoder=None)]
    names += [job_name("prealign", "a", encoder="left"), job_name("prealign", "a", encoder="right")]
    monkeypatch.setenv("MANYEYES_PIPELINE_RUN", "another")
    names += [job_name("sft", "a", encoder=None)]
    assert len(set(names)) == 5
    assert max(map(len, names)) <= 40


# --- attaching -----------------------------------------------------------------------------------------------------


def test_a_step_that_comes_again_goes_on_with_the_job_that_runs(step: Step) -> None:
    first: list[Job] = []

    def play(job: Job) -> None:
        first.append(job)
        run_and_tell(job)

    step.stand.play = play
    step.stand.own["status"] = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    step.ended_by_signal = True
    with pytest.raises(KeyboardInterrupt):
        step.run()
    step.ended_by_signal = False
    assert step.stand.deleted == [], "its pod is evicted: the job goes on"
    later(0.3, lambda: complete(first[0]))
    assert step.run() == REPORT
    assert step.stand.made == [step.name]


def test_a_step_that_comes_again_takes_the_result_of_a_job_that_ended_meanwhile(step: Step) -> None:
    step.stand.fault("DELETE", JOBS, status=403, message="no", times=1)
    step.run()
    assert step.stand.deleted == []
    write_result(step.stand.jobs[step.name])
    step.run()
    assert step.stand.made == [step.name]


def test_a_job_that_failed_or_has_no_result_is_made_anew(step: Step) -> None:
    step.stand.fault("DELETE", JOBS, status=403, message="no", times=1)
    step.run()
    step.run()
    assert step.stand.made == [step.name] * 2, "the result is gone"
    step.stand.fault("DELETE", JOBS, status=403, message="no", times=1)
    step.stand.play = fail
    with pytest.raises(PipelineError):
        step.run()
    step.stand.play = succeed
    assert step.run() == REPORT
    assert step.stand.made == [step.name] * 4


def test_an_answer_that_is_lost_makes_no_second_job(step: Step) -> None:
    step.stand.fault("POST", JOBS, status=500, message="etcd", done=True)
    assert step.run() == REPORT
    assert step.stand.made == [step.name]


def test_a_stopped_step_deletes_its_job(step: Step) -> None:
    step.stand.play = run_and_tell
    step.ended_by_signal = True
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert step.stand.deleted == [step.name]


# --- an API that refuses, fails and stalls -------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_api_that_fails_now_and_then_is_asked_again(
    step: Step, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, path in (("GET", JOBS), ("POST", JOBS), ("GET", "/pods$"), ("GET", "/log$"), ("DELETE", JOBS)):
        step.stand.fault(method, path, status=status, message="later", times=2)
    assert step.run() == REPORT
    assert "waiting for it" in capsys.readouterr().err


def test_an_api_that_stalls_is_asked_again(step: Step) -> None:
    step.stand.fault("GET", JOBS, stall_s=1.5, status=500)
    step.stand.fault("GET", "/log$", stall_s=1.5, status=500)
    assert step.run() == REPORT
    assert step.progress == [PROGRESS]


def test_an_api_that_stays_away_ends_the_step_and_keeps_the_job(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_SILENCE_S", 0.3)
    step.stand.play = lambda _: step.stand.fault("GET", ".", status=503, times=10**6)
    with pytest.raises(ClusterAwayError, match="has not answered") as caught:
        step.run()
    assert caught.value.retry
    assert step.stand.deleted == []


@pytest.mark.parametrize(
    ("status", "message", "found", "do"),
    [
        (
            403,
            'trainjobs.trainer.kubeflow.org is forbidden: User "system:serviceaccount:runs:default" cannot create '
            'resource "trainjobs" in API group "trainer.kubeflow.org" in the namespace "runs"',
            "the account default may not create trainjobs",
            "infra/k8s/components/trainjob",
        ),
        (422, "spec.trainer.image: Too long: may not be more than 500", "with 422: spec.trainer.image", "profile"),
        (400, 'strict decoding error: unknown field "spec.runtimePatches"', "older than this one", "Upgrade"),
        (404, "the server could not find the requested resource", "no trainjobs.trainer.kubeflow.org", "Install"),
    ],
)
def test_a_refusal_is_told_with_what_to_do(step: Step, status: int, message: str, found: str, do: str) -> None:
    step.stand.fault("POST", JOBS, status=status, message=message, times=9)
    with pytest.raises(PipelineError) as caught:
        step.run()
    assert found in caught.value.found
    assert do in caught.value.do
    assert not caught.value.retry


def test_a_step_without_a_shared_volume_says_so(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_WORKDIR", "/cache/work")
    with pytest.raises(PipelineError, match="on no volume that several pods share") as caught:
        step.run()
    assert "launcher: inpod" in caught.value.do
    assert step.stand.made == []


# --- nodes that cannot start, or end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "message", "found"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "x"', "its image cannot be pulled: Back-off"),
        ("CreateContainerConfigError", 'secret "s3" not found', 'secret "s3" is missing in the namespace'),
    ],
)
def test_a_node_that_cannot_start_is_told_while_it_waits_and_when_time_is_over(
    step: Step, reason: str, message: str, found: str
) -> None:
    step.plan(start_timeout_s=1)

    def play(job: Job) -> None:
        job.pods[0].run()
        job.pods[1].wait(reason, message)

    step.stand.play = play
    with pytest.raises(PipelineError) as caught:
        step.run()
    assert caught.value.found.startswith(f"node 2 of 2 ({step.name}-node-0-1-abcde): {found}")
    assert not caught.value.retry
    assert step.waits[0].startswith(f"waiting: node 2: {found}")
    assert step.stand.deleted == [step.name]


def test_no_node_that_fits_is_told(step: Step) -> None:
    step.plan(start_timeout_s=1)

    def play(job: Job) -> None:
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        job.pods[0].status = {"phase": "Pending", "conditions": [condition]}

    step.stand.play = play
    with pytest.raises(PipelineError, match="no node fits: 0/3 nodes are available"):
        step.run()


def test_a_job_without_pods_says_where_to_look(step: Step) -> None:
    step.plan(start_timeout_s=1)
    step.stand.play = lambda job: job.pods.clear()
    with pytest.raises(PipelineError, match="0 of 2 nodes of TrainJob") as caught:
        step.run()
    assert "kubectl describe" in caught.value.do


def test_a_job_that_a_queue_holds_back_waits_as_long_as_the_queue_does(step: Step) -> None:
    step.plan(start_timeout_s=1)

    def play(job: Job) -> None:
        job.set("Suspended", "Suspended", "TrainJob is suspended")
        later(1.6, lambda: go_on(job))

    def go_on(job: Job) -> None:
        job.conditions.clear()
        succeed(job)

    step.stand.play = play
    assert step.run() == REPORT
    assert step.waits[0] == "waiting: TrainJob is suspended"


@pytest.mark.parametrize(
    ("end", "found", "retry"),
    [
        (lambda pod: pod.end(137, "OOMKilled"), "out of memory: limit 480Gi", False),
        (lambda pod: pod.mark_evicted(), "evicted: The node was low on resource: memory.", True),
        (lambda pod: pod.end(1), "exit code 1", True),
        (lambda pod: pod.end(143), "its pod was deleted or evicted", True),
    ],
    ids=["out of memory", "evicted", "exit code", "deleted"],
)
def test_the_node_that_failed_says_why(
    step: Step, end: Callable[[Any], None], found: str, retry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(job: Job) -> None:
        run(job)
        job.pods[1].say("node 1 said this last")
        end(job.pods[1])
        later(0.3, lambda: fail(job))

    step.stand.play = play
    with pytest.raises(PipelineError) as caught:
        step.run()
    assert f"node 2 of 2 ({step.name}-node-0-1-abcde): {found}" in caught.value.found
    assert caught.value.retry is retry
    assert "node 1 said this last" in capsys.readouterr().err
    assert step.stand.deleted == [step.name]


def test_an_eviction_by_the_api_is_one(step: Step) -> None:
    def play(job: Job) -> None:
        job.pods[0].end(143)
        mark = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "PreemptionByScheduler",
            "message": "preempting",
        }
        job.pods[0].status["conditions"] = [mark]
        fail(job)

    step.stand.play = play
    with pytest.raises(PipelineError, match=r"evicted: eviction \(PreemptionByScheduler\)") as caught:
        step.run()
    assert caught.value.retry


def test_what_a_process_failed_with_is_what_the_step_fails_with(step: Step) -> None:
    def play(job: Job) -> None:
        folder = folder_of(job) / "failed"
        folder.mkdir()
        errors = [
            ProcessLostError("process 2 does not answer", "all", "Again."),
            RecordError("toy/7 has no image", "one", "Fix it."),
        ]
        for rank, error in enumerate(errors):
            pickled, text = pickle_error(error)
            assert pickled is not None
            told = {"pickled": pickled.hex(), "text": text}
            (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        for pod in job.pods:
            pod.end(1)
        fail(job)

    step.stand.play = play
    with pytest.raises(RecordError, match="toy/7 has no image"):
        step.run()
    assert step.stand.deleted == [step.name]


def test_a_job_out_of_time_says_so(step: Step) -> None:
    def play(job: Job) -> None:
        job.set("Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline")

    step.stand.play = play
    with pytest.raises(PipelineError, match="out of time: DeadlineExceeded") as caught:
        step.run()
    assert "timeout_s" in caught.value.do


def test_a_job_that_nobody_ends_in_time_is_ended(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainjob_module, "_LATE_S", 0.0)
    step.plan(timeout_s=1)
    step.stand.play = run
    with pytest.raises(PipelineError, match="out of time"):
        step.run()
    assert step.stand.deleted == [step.name]


def test_a_job_that_somebody_deletes_ends_the_step(step: Step) -> None:
    def play(job: Job) -> None:
        run(job)
        later(0.4, step.stand.jobs.clear)

    step.stand.play = play
    with pytest.raises(PipelineError, match="was deleted before its end") as caught:
        step.run()
    assert caught.value.retry


def test_a_log_that_is_read_in_pieces_is_told_once(step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    moments = ["2026-01-01T00:00:00.100000000Z", "2026-01-01T00:00:00.100000000Z", "2026-01-01T00:00:01.000000000Z"]

    def play(job: Job) -> None:
        run(job)
        job.pods[0].say("one", moment=moments[0])

        def go_on() -> None:
            job.pods[0].say("two", moment=moments[1])
            time.sleep(0.3)
            job.pods[0].say("three", moment=moments[2])
            complete(job)

        later(0.4, go_on)

    step.stand.play = play
    step.run()
    said = [line for line in capsys.readouterr().err.splitlines() if line in ("one", "two", "three")]
    assert said == ["one", "two", "three"]


# --- preflight -----------------------------------------------------------------------------------------------------


def claims(*modes: str) -> dict[str, Any]:
    return {f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims/shared": {"spec": {"accessModes": list(modes)}}}


API = {"/apis/trainer.kubeflow.org/v1alpha1": {"resources": [{"name": "trainjobs"}]}}
RUNTIMES = {f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainingruntimes/manyeyes": {"kind": "x"}}


def test_preflight_finds_nothing_wrong_where_all_is_there(step: Step) -> None:
    step.stand.objects = {**API, **RUNTIMES, **claims("ReadWriteMany")}
    assert check_trainjobs("shared") == []


def test_preflight_names_the_missing_crd_rights_runtime_and_claim(step: Step) -> None:
    (error,) = check_trainjobs("shared")
    assert "no trainjobs.trainer.kubeflow.org" in error.found
    step.stand.objects = {**API, **claims("ReadWriteOnce")}
    step.stand.missing_rights = {"create trainjobs", "get pods/log"}
    found = [error.found for error in check_trainjobs("shared")]
    assert found == [
        "this pod's account may not create trainjobs, get pods/log",
        "namespace runs has no TrainingRuntime manyeyes",
        "claim shared is ReadWriteOnce",
    ]


def test_a_row_of_preflight_tells_what_trainjobs_lack(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLAIM, "shared")
    step.stand.has_trainer = False
    found = preflight._Findings()
    preflight._look(found, Reporter("preflight"), "no such recipe", "", "", str(step.folder), "")
    (row,) = [check for check in found.checks if check.subject == "TrainJob"]
    assert (row.state, row.found) == ("problem", "the cluster has no trainjobs.trainer.kubeflow.org")
    step.stand.has_trainer = True
    step.stand.objects = {**API, **RUNTIMES, **claims("ReadWriteMany")}
    found = preflight._Findings()
    preflight._look(found, Reporter("preflight"), "no such recipe", "", "", str(step.folder), "")
    assert [check.state for check in found.checks if check.subject == "TrainJob"] == ["ok"]


def test_preflight_says_where_there_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    (error,) = check_trainjobs("shared")
    assert "cannot reach the Kubernetes API" in error.found
