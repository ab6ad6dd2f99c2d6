"""Trains a stage on several nodes: the step, a small pod, makes a Kubeflow Trainer ``TrainJob`` and waits for it.

The job's name is made from the run, the stage and what it trains, so a step that comes again goes on with the job that
is there. Inputs, the result and errors travel through a folder beside the running checkpoints, on a volume that the
step and all nodes mount. The job's pods run this very file under ``torch.distributed.run``, which reads from Trainer's
``PET_*`` variables who takes part. A job restarts nothing by itself (``infra/k8s/components/trainjob``): a node that
fails ends the job, and the step's own retries make the next one, which goes on from the last running checkpoint.

The step leaves no job behind: it deletes it when it ends, fails, is out of time or is stopped. It keeps it when its own
pod is evicted, which Kubernetes marks with the condition ``DisruptionTarget`` (since 1.26); whatever ends the pod
without that mark (the run is terminated, somebody deletes the pod, its time is over) counts as stopping. A step whose
node is lost hears nothing, and so keeps it too.

Why pods wait or fail is put in the same words for a TrainJob's pods and for those of a pipeline (``explain``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from manyeyes.children import pickle_error, unpickle_error
from manyeyes.errors import ManyEyesError, PipelineError, ProcessLostError
from manyeyes.harness.base import num_threads
from manyeyes.harness.cluster import (
    TRAINER,
    TRAINJOB_ROLE,
    Cluster,
    ClusterAwayError,
    PodLog,
    Reason,
    explain,
    no_trainer,
    pod_index,
    why_ended,
    why_waiting,
)
from manyeyes.harness.inputs import parse_pinned, work_dir
from manyeyes.recipe import StageName
from manyeyes.storage import link_or_copy, new_folder, write_file
from manyeyes.strict import StrictModel

if TYPE_CHECKING:
    from manyeyes.training.loop import Progress
    from manyeyes.training.stage import StageReport

# What the cluster profile says of a step's TrainJob, as ``TrainJobPlan.text`` writes it.
PLAN = "MANYEYES_TRAINJOB"
# The shared claim, for preflight: there where a step of the profile makes TrainJobs.
CLAIM = "MANYEYES_TRAINJOB_CLAIM"
RUNTIME = "manyeyes"
POD_LABEL = "manyeyes/trainjob"

_PROGRESS_LINE = "manyeyes-progress: "
_TASK, _FAILED, _RESULT = "task.json", "failed", "result"

_POLL_S = 2.0
# A shared volume may show what another node wrote a little later.
_FILES_S = 30.0
# How much later than the job's own deadline the step ends it.
_LATE_S = 60.0
# How long the deletion of a job is tried, by a pod that has 30 seconds to end, and how long preflight asks.
_FAREWELL_S = 15.0
# What torch.distributed.run gives its processes to save before it kills them: ten seconds less than a node has.
_SAVING = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}


class TrainJobPlan(StrictModel):
    """What the cluster profile says of one step's TrainJobs."""

    start_timeout_s: int = Field(description="Seconds until every node must run.")
    spec: dict[str, Any] = Field(description="Of the TrainJob, without its command.")

    def text(self) -> str:
        """YAML in one line, which is short where it is written as JSON in JSON."""
        tree = self.model_dump(mode="json")
        return yaml.dump(tree, Dumper=yaml.SafeDumper, default_flow_style=True, width=10**9).strip()

    @property
    def nodes(self) -> int:
        """How many pods take part."""
        return int(self.spec["trainer"]["numNodes"])

    @property
    def memory_limit(self) -> str:
        """Of each of them."""
        return str(self.spec["trainer"].get("resourcesPerNode", {}).get("limits", {}).get("memory", ""))

    @property
    def timeout_s(self) -> float:
        """Seconds that the job may take."""
        return float(self.spec.get("activeDeadlineSeconds", float("inf")))

    def pod(self) -> dict[str, Any]:
        """What it asks for of the pods of its nodes."""
        (patch,) = self.spec["runtimePatches"]
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod: dict[str, Any] = job["template"]["spec"]["template"]["spec"]
        return pod


class _Task(StrictModel):
    """``task.json``: what the nodes train, beside copies of their inputs."""

    pinned: str
    stage: StageName
    encoder: str | None
    encoder_checkpoints: list[str] = Field(description="Names; each a folder beside this file.")
    checkpoint: bool = Field(description="Whether there is one, in the folder of that name.")
    quarantine: list[str]


def uses_trainjob() -> bool:
    """Whether this step trains on nodes of its own."""
    return bool(os.environ.get(PLAN))


def job_name(stage: StageName, pinned: str, *, encoder: str | None) -> str:
    """Name of the job that trains this: of this run, this stage and what is pinned for it.

    JobSet appends ``-node-0-NUMBER`` to the names of pods, which may have 63 characters.
    """
    made_of = [os.environ.get("MANYEYES_PIPELINE_RUN", ""), stage, encoder, pinned]
    return f"manyeyes-{stage}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"


def train_in_trainjob(
    stage: StageName,
    *,
    pinned: str,
    out: Path,
    encoder: str | None,
    encoder_checkpoints: Mapping[str, Path],
    checkpoint: Path | None,
    quarantine: frozenset[str],
    on_progress: Callable[[Progress], None],
    on_wait: Callable[[str], None],
) -> StageReport:
    """Train a stage on the nodes that the cluster profile gives it; arguments as for ``run_stage``.

    Args:
        stage: What to train.
        pinned: What preflight pinned for the step.
        out: Folder to write.
        encoder: For ``prealign``.
        encoder_checkpoints: Results of ``prealign``.
        checkpoint: Result of the stage before.
        quarantine: Rows to leave out.
        on_progress: Called when the first node says how far it is.
        on_wait: Called with what the nodes wait for, before all of them run.

    Raises:
        PipelineError: No shared volume; the cluster refuses the job; a node cannot start, or ended before its time.
        ManyEyesError: Any other error of a process that trains, as it is.
    """
    from manyeyes.training.stage import read_stage_report

    plan = TrainJobPlan.model_validate(yaml.safe_load(os.environ[PLAN]))
    name = job_name(stage, pinned, encoder=encoder)
    folder = _shared_folder(plan) / name
    task = _Task(
        pinned=pinned,
        stage=stage,
        encoder=encoder,
        encoder_checkpoints=list(encoder_checkpoints),
        checkpoint=checkpoint is not None,
        quarantine=sorted(quarantine),
    )
    given = {**encoder_checkpoints, **({"checkpoint": checkpoint} if checkpoint is not None else {})}
    job = _Job(Cluster(), name=name, plan=plan, folder=folder, on_progress=on_progress, on_wait=on_wait)
    try:
        job.begin(lambda: _hand_over(task, given, folder))
        job.follow()
    except ClusterAwayError:
        raise  # the next attempt goes on with it
    except KeyboardInterrupt:
        if job.cluster.is_evicted():
            sys.stderr.write(f"this pod is evicted: TrainJob {name} goes on, and so does the next attempt with it\n")
        else:
            job.delete()
        raise
    except Exception:
        job.delete()
        raise
    with new_folder(out) as new:
        shutil.copytree(folder / _RESULT, new, copy_function=link_or_copy, dirs_exist_ok=True)
    job.delete()
    shutil.rmtree(folder, ignore_errors=True)
    return read_stage_report(out)


def _shared_folder(plan: TrainJobPlan) -> Path:
    """Where a job's folder lies: beside the running checkpoints, where all nodes have the same volume."""
    pod, here = plan.pod(), work_dir().absolute()
    claims = {volume["name"] for volume in pod.get("volumes", ()) if "persistentVolumeClaim" in volume}
    (container,) = pod["containers"]
    shared = [mount["mountPath"] for mount in container.get("volumeMounts", ()) if mount["name"] in claims]
    if not any(here.is_relative_to(path) for path in shared):
        raise PipelineError(
            f"running checkpoints lie in {here}, which is on no volume that several pods share "
            f"({', '.join(shared) or 'the profile has none'})",
            "a claim (ReadWriteMany) in the profile's volumes, with MANYEYES_WORKDIR on it",
            "Add it to the profile and upload the pipeline again, or train in the step's own pod (launcher: inpod).",
        )
    return here / "trainjobs"


def _hand_over(task: _Task, given: Mapping[str, Path], folder: Path) -> None:
    """Put a job's inputs where its nodes find them; what lies there already is of this very job."""
    shutil.rmtree(folder / _FAILED, ignore_errors=True)
    shutil.rmtree(folder / _RESULT, ignore_errors=True)
    if (folder / "inputs").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with new_folder(folder / "inputs") as new:
        for name, path in given.items():
            shutil.copytree(path, new / name, copy_function=link_or_copy)
        (new / _TASK).write_text(task.model_dump_json(), encoding="utf-8")


# --- the job, as the step sees it ----------------------------------------------------------------------------------


@dataclass
class _Job:
    """One TrainJob, from its making to its end."""

    cluster: Cluster
    name: str
    plan: TrainJobPlan
    folder: Path
    on_progress: Callable[[Progress], None]
    on_wait: Callable[[str], None]
    # Why a pod of it ended, by the pod's name: a failed job's pods are soon gone.
    ends: dict[str, _End] = field(default_factory=dict)
    _log: PodLog = field(default_factory=PodLog)

    @property
    def _path(self) -> str:
        return f"{self.cluster.trainjobs}/{self.name}"

    def begin(self, hand_over: Callable[[], None]) -> None:
        """Go on with the job of this name, or make it; one that failed, or whose result is gone, is made anew."""
        while True:
            found = self.cluster.get(self._path)
            if found is None:
                hand_over()
                if self.cluster.create(self.cluster.trainjobs, self._manifest()):
                    sys.stderr.write(f"TrainJob {self.name}: {self.plan.nodes} nodes\n")
                    return
                continue
            if "deletionTimestamp" in found["metadata"]:
                time.sleep(_POLL_S)
                continue
            conditions = _conditions(found)
            if "Failed" in conditions or ("Complete" in conditions and not _appears(self.folder / _RESULT)):
                self.cluster.delete(self._path)
                continue
            return

    def follow(self) -> None:
        """Return when the job is complete, with its result in the folder.

        Raises:
            PipelineError: It failed, did not start, is out of time, or is gone.
        """
        waiting_since, running_since = time.monotonic(), float("inf")
        while True:
            job = self.cluster.get(self._path)
            pods = self._look()
            if job is None or "deletionTimestamp" in job["metadata"]:
                raise PipelineError(
                    f"TrainJob {self.name} was deleted before its end",
                    "a job that is left alone until it ends",
                    "Run it again; it goes on from the last running checkpoint.",
                    retry=True,
                )
            conditions = _conditions(job)
            if "Complete" in conditions:
                if _appears(self.folder / _RESULT):
                    return
                raise PipelineError(
                    f"TrainJob {self.name} is complete, and {self.folder / _RESULT} is not there",
                    "one volume in the step and in all nodes",
                    "Check that the claim of MANYEYES_WORKDIR is the same file system on all nodes.",
                )
            if "Failed" in conditions:
                raise self._failure(conditions["Failed"])
            if "Suspended" in conditions:
                waiting_since = time.monotonic()  # a queue holds it back, as long as it likes
                self.on_wait(f"waiting: {conditions['Suspended'].get('message') or 'the job is suspended'}")
            running = sum(pod["status"].get("phase") in ("Running", "Succeeded") for pod in pods)
            if running >= self.plan.nodes:
                running_since = min(running_since, time.monotonic())
            elif running_since == float("inf") and "Suspended" not in conditions:
                self._wait_for_nodes(pods, running, time.monotonic() - waiting_since)
            # Trainer ends it by itself, unless its controller is away.
            if time.monotonic() - running_since > self.plan.timeout_s + _LATE_S:
                raise _as_error(explain("DeadlineExceeded: TrainJob exceeded its active deadline"), self.name)
            time.sleep(_POLL_S)

    def delete(self) -> None:
        """Delete it with its pods; what cannot be deleted now is said, and keeps no error from being told."""
        self.cluster.patience_s = _FAREWELL_S
        try:
            self.cluster.delete(self._path)
        except ManyEyesError as error:
            sys.stderr.write(f"TrainJob {self.name} could not be deleted: {error}\n")

    def _manifest(self) -> dict[str, Any]:
        command = [
            *("python", "-P", "-m", "torch.distributed.run"),
            *("--rdzv-conf", f"timeout={self.plan.start_timeout_s}"),
            *("-m", "manyeyes.harness.trainjob", str(self.folder)),
        ]
        run = os.environ.get("MANYEYES_PIPELINE_RUN")
        trainer = {**self.plan.spec["trainer"], "command": command}
        env = {**_SAVING, **({"MANYEYES_PIPELINE_RUN": run} if run else {})}
        trainer["env"] = [*trainer["env"], *({"name": name, "value": value} for name, value in env.items())]
        labels = {"app.kubernetes.io/part-of": "manyeyes", **({"pipeline/runid": run} if run else {})}
        metadata: dict[str, Any] = {"name": self.name, "labels": labels}
        owners = self.cluster.own_pod().get("metadata", {}).get("ownerReferences", [])
        if owners:
            # With the run's workflow the job goes, too, should no step come to delete it.
            facts = ("apiVersion", "kind", "name", "uid")
            metadata["ownerReferences"] = [{fact: owner[fact] for fact in facts} for owner in owners]
        return {
            "apiVersion": f"{TRAINER}/v1alpha1",
            "kind": "TrainJob",
            "metadata": metadata,
            "spec": {**self.plan.spec, "trainer": trainer},
        }

    def _look(self) -> list[dict[str, Any]]:
        """The job's pods; what ended is remembered, and what the first node says is read on."""
        pods = self.cluster.pods(self.name)
        for pod in pods:
            message = why_ended(pod)
            reason = explain(message, memory_limit=self.plan.memory_limit) if message is not None else None
            if reason is not None:
                self.ends[pod["metadata"]["name"]] = _End(pod_index(pod), pod["metadata"]["name"], reason)
        first = [pod for pod in pods if pod_index(pod) == 0]
        if first:
            newest = max(first, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
            for line in self._log.read(self.cluster, newest["metadata"]["name"]):
                self._tell(line)
        return pods

    def _tell(self, line: str) -> None:
        if not line.startswith(_PROGRESS_LINE):
            sys.stderr.write(f"{line}\n")
            return
        from manyeyes.training.loop import Progress

        with suppress(ValueError):  # two processes may write into one line
            self.on_progress(Progress.model_validate_json(line.removeprefix(_PROGRESS_LINE)))

    def _wait_for_nodes(self, pods: Sequence[dict[str, Any]], running: int, waited_s: float) -> None:
        reasons = [(pod, explain(message)) for pod in pods if (message := why_waiting(pod)) is not None]
        known = [(pod, reason) for pod, reason in reasons if reason is not None]
        late = waited_s > self.plan.start_timeout_s
        if known:
            pod, reason = known[0]
            if late:
                raise _as_error(reason, self._node(pod_index(pod), pod["metadata"]["name"]), after_s=waited_s)
            self.on_wait(f"waiting: node {pod_index(pod) + 1}: {reason.text}")
            return
        if late:
            raise PipelineError(
                f"{running} of {self.plan.nodes} nodes of TrainJob {self.name} run after {waited_s:,.0f} s",
                f"all of them within {self.plan.start_timeout_s:,} s (start_timeout_s in the profile)",
                f"kubectl describe jobset,job,pod of {self.name} says why: a quota, a volume that only one node can "
                "mount (it must be ReadWriteMany), or no controller of Kubeflow Trainer.",
            )
        self.on_wait(f"waiting: {running} of {self.plan.nodes} nodes run")

    def _failure(self, condition: Mapping[str, Any]) -> BaseException:
        self._look()
        ended = sorted(self.ends.values(), key=lambda end: end.node)
        outside = [end for end in ended if end.reason.error not in _SAY_LITTLE]
        told = _told_errors(self.folder / _FAILED, expected=bool(ended) and not outside)
        for end in outside or ([] if told else ended):
            if end.node:
                self._show_log_of(end)
            return _as_error(end.reason, self._node(end.node, end.pod))
        if told:
            # A process that only lost the others says less than the one that failed.
            return min(told, key=lambda error: isinstance(error, ProcessLostError))
        message = f"{condition.get('reason', '')}: {condition.get('message', '')}"
        return _as_error(explain(message), f"TrainJob {self.name}")

    def _node(self, node: int, pod: str) -> str:
        return f"node {node + 1} of {self.plan.nodes} ({pod})"

    def _show_log_of(self, end: _End) -> None:
        with suppress(ManyEyesError):
            for line in [*PodLog().read(self.cluster, end.pod)][-20:]:
                sys.stderr.write(f"[{end.pod}] {line}\n")


@dataclass(frozen=True)
class _End:
    """Why a pod ended."""

    node: int
    pod: str
    reason: Reason


# What a pod ends with when another one failed, or a process of it told its error.
_SAY_LITTLE = ("TaskFailed", "PodDeleted", "Killed")


def _conditions(job: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Conditions of a job that hold, by type."""
    found = job.get("status", {}).get("conditions", ())
    return {condition["type"]: condition for condition in found if condition["status"] == "True"}


def _as_error(reason: Reason | None, what: str, *, after_s: float | None = None) -> PipelineError:
    reason = reason or Reason("it ended without a word")
    waited = "" if after_s is None else f" (for {after_s:,.0f} s)"
    do = reason.do or "The log has what it said; the same command goes on from the last running checkpoint."
    retry = reason.retry or not reason.user_error
    return PipelineError(f"{what}: {reason.text}{waited}", reason.needed, do, retry=retry)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _FILES_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(min(_POLL_S, 1.0))
        with suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208 (NFS asks the server again only when the folder is read)
    return True


def _told_errors(folder: Path, *, expected: bool) -> list[BaseException]:
    """What the processes that train failed with."""
    if expected:
        _appears(folder)
    errors = []
    for file in sorted(folder.glob("*.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        pickled = None if told["pickled"] is None else bytes.fromhex(told["pickled"])
        errors.append(unpickle_error(pickled, told["text"], where=f"training process {int(file.stem) + 1}"))
    return errors


# --- whether the cluster takes such jobs ----------------------------------------------------------------------------

RIGHTS = (
    *((verb, "trainjobs", TRAINER, "") for verb in ("create", "get", "delete")),
    ("get", "trainingruntimes", TRAINER, ""),
    ("get", "pods", "", ""),
    ("list", "pods", "", ""),
    ("get", "pods", "", "log"),
)


def check_trainjobs(claim: str) -> list[PipelineError]:
    """What TrainJobs lack in this cluster, all of it at once.

    Args:
        claim: The volume that the step and the nodes share.
    """
    try:
        cluster = Cluster()
        cluster.patience_s = _FAREWELL_S
        known = cluster.get(f"/apis/{TRAINER}/v1alpha1") or {}
        if "trainjobs" not in [resource["name"] for resource in known.get("resources", ())]:
            return [no_trainer()]
        missing = [
            f"{verb} {resource}{'/' if sub else ''}{sub}"
            for verb, resource, group, sub in RIGHTS
            if not cluster.may(verb, resource, group=group, subresource=sub)
        ]
        wrong: list[PipelineError] = []
        if missing:
            wrong.append(
                PipelineError(
                    f"this pod's account may not {', '.join(missing)}",
                    "an account that may make TrainJobs and read their pods",
                    f"Add {TRAINJOB_ROLE} to components of the overlay and apply it, or start the run with "
                    "--service-account manyeyes-runs.",
                )
            )
        runtimes = cluster.trainjobs.removesuffix("trainjobs") + "trainingruntimes"
        if "get trainingruntimes" not in missing and cluster.get(f"{runtimes}/{RUNTIME}") is None:
            wrong.append(
                PipelineError(
                    f"namespace {cluster.namespace} has no TrainingRuntime {RUNTIME}",
                    "the runtime that TrainJobs name",
                    f"Add {TRAINJOB_ROLE} to components of the overlay and apply it.",
                )
            )
        if cluster.may("get", "persistentvolumeclaims"):
            found = cluster.get(f"/api/v1/namespaces/{cluster.namespace}/persistentvolumeclaims/{claim}")
            modes = (found or {}).get("spec", {}).get("accessModes", [])
            if "ReadWriteMany" not in modes:
                wrong.append(
                    PipelineError(
                        f"claim {claim} is {', '.join(modes) if found else 'not there'}",
                        "a claim that several nodes can mount (ReadWriteMany)",
                        "Make it on a storage class that can (NFS, CephFS, Lustre, ...).",
                    )
                )
    except PipelineError as error:
        return [error]
    return wrong


# --- what a process of a node does ---------------------------------------------------------------------------------


def train_share(folder: Path) -> None:
    """Train a share of the stage; ``torch.distributed.run`` has put into the environment which.

    Args:
        folder: Of the job, on the shared volume.
    """
    import torch

    from manyeyes.harness.stage import num_data_workers
    from manyeyes.training.launch import launch_stage

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    task = _Task.model_validate_json((folder / "inputs" / _TASK).read_text(encoding="utf-8"))
    threads = max(1, num_threads() // local)

    def tell(progress: Progress) -> None:
        sys.stderr.write(f"{_PROGRESS_LINE}{progress.model_dump_json()}\n")
        sys.stderr.flush()

    try:
        inputs = parse_pinned(task.pinned)
        launch_stage(
            inputs.recipe,
            task.stage,
            processes=1,
            threads=threads,
            snapshot=inputs.snapshot,
            code_digest=inputs.code_digest,
            out=folder / _RESULT,
            work_dir=work_dir(),
            encoder=task.encoder,
            encoder_checkpoints={name: folder / "inputs" / name for name in task.encoder_checkpoints},
            checkpoint=folder / "inputs" / "checkpoint" if task.checkpoint else None,
            quarantine=frozenset(task.quarantine),
            data_workers=num_data_workers(threads=threads, gpus=torch.cuda.device_count()),
            on_progress=tell,
        )
    except Exception as error:
        pickled, text = pickle_error(error)
        told = {"pickled": None if pickled is None else pickled.hex(), "text": text}
        with suppress(OSError, ManyEyesError):  # the disk that made it fail; the log has it
            write_file(folder / _FAILED / f"{rank}.json", json.dumps(told))
        raise


if __name__ == "__main__":
    train_share(Path(sys.argv[1]))
