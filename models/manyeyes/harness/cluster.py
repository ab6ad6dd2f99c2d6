"""The few calls that a step makes to the Kubernetes API, and why pods wait or fail, in words.

The words are the same for the pods of a pipeline, of which Argo tells (``kubeflow/workflow.py``), and for those of a
TrainJob (``trainjob.py``), whose state is put as Argo would put it first.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from manyeyes.errors import PipelineError

TRAINER = "trainer.kubeflow.org"
# Container, and replicated job, of a node in Trainer's torch runtimes.
NODE = "node"
TRAINJOB_ROLE = "infra/k8s/components/trainjob"
_TRAINER_PATH = f"/apis/{TRAINER}/v1alpha1"
_INDEX = "batch.kubernetes.io/job-completion-index"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_POLL_S = 2.0
_ANSWER_S = (5.0, 20.0)  # to connect, to answer
# How long a step goes on without an answer; training goes on whatever it does.
_SILENCE_S = 1800.0
# Of the 30 seconds that a pod has to end; the mark of an eviction may be written after the signal.
_MARK_S = 3.0


@dataclass(frozen=True)
class Reason:
    """Why a pod waits or failed.

    Attributes:
        text: What was found, in words.
        needed: What was needed instead.
        do: What to do about it; empty where nobody knows.
        error: A name for the kind of failure.
        user_error: Whether whoever started the run can fix it.
        retry: Whether the same may work another time.
        from_outside: Whether somebody ended the pod, and not the step itself.
    """

    text: str
    needed: str = "a pod that ends well"
    do: str = ""
    error: str = "PodFailed"
    user_error: bool = False
    retry: bool = False
    from_outside: bool = False


_ALL_IS_WELL = ("ContainerCreating", "PodInitializing")
_NO_IMAGE = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_EXIT = re.compile(r"\(exit code (\d+)\)")
_FORBIDDEN = re.compile(r'is forbidden: User "([^"]+)" cannot (\w+) resource "([^"]+)"')
_KILLED, _TERMINATED = "137", "143"


def explain(message: str, *, memory_limit: str = "") -> Reason | None:
    """Put a node's message into words; None where it says that all is well.

    Args:
        message: Of an Argo node.
        memory_limit: Of the pod, where that is known.
    """
    message = " ".join(message.split())
    code = found[1] if (found := _EXIT.search(message)) else ""
    # "Pod failed before main container starts due to REASON: ..." has the reason in the middle.
    started = re.sub(r"^Pod failed before \S+ container starts due to ", "", message)
    kind, _, detail = started.partition(": ")
    if kind in _ALL_IS_WELL:
        return None
    if kind in _NO_IMAGE:
        return Reason(
            f"its image cannot be pulled: {detail or kind}",
            "an image that the cluster can pull",
            "Check the image that the version was uploaded with (--image), and image_pull_secrets and "
            "image_pull_policy in the profile.",
            error="ImageNotPulled",
            user_error=True,
        )
    if kind == "Unschedulable":
        return Reason(
            f"no node fits: {detail or kind}",
            "a node with what the step asks for",
            "Where other pods hold it, it starts once they end. Else ask for less in the profile (cpu_request, "
            "memory_request, gpu, node_selector, tolerations, volumes), or add such a node.",
            error="NoNodeFits",
            user_error=True,
        )
    if kind in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        missing = re.search(r'(secret|configmap) "([^"]+)" not found', detail)
        no_key = re.search(r"couldn't find key (\S+) in (Secret|ConfigMap) (?:\S+/)?(\S+)", detail)
        text = f"its container cannot be started: {detail or kind}"
        if missing:
            text = f'{missing[1]} "{missing[2]}" is missing in the namespace of the runs'
        elif no_key:
            text = f'{no_key[2].lower()} "{no_key[3]}" has no key {no_key[1]}'
        return Reason(
            text,
            "every secret and config map that the profile names",
            "Create it in that namespace (docs/endpoint.md lists them), or mark it optional in the profile.",
            error="ContainerNotStarted",
            user_error=True,
        )
    if "OOMKilled" in message:
        return Reason(
            f"out of memory: limit {memory_limit}" if memory_limit else "out of memory: killed by the kernel",
            "more memory than that",
            "Raise memory_limit of the step in the profile, upload the pipeline with it, and run it again.",
            error="OutOfMemory",
            user_error=True,
        )
    if re.search(r"low on resource|\bevict", message, re.IGNORECASE):
        return Reason(
            f"evicted: {message}",
            "a node that keeps the pod until it ends",
            "Run it again. Where a node ran out of memory, raise memory_request in the profile to what the step uses.",
            error="Evicted",
            retry=True,
            from_outside=True,
        )
    if message == "pod deleted" or code == _TERMINATED:
        return Reason(
            "its pod was deleted or evicted" + (f" (exit code {code})" if code else ""),
            "a pod that is left alone until it ends",
            "Run it again: steps that went well come from the cache. On nodes that can be taken away, put running "
            "checkpoints on a claim of the profile.",
            error="PodDeleted",
            retry=True,
            from_outside=True,
        )
    if forbidden := find_forbidden(message):
        return forbidden
    if re.search(r"longer than the specified deadline|exceeded (its|workflow) deadline|DeadlineExceeded", message):
        return Reason(
            f"out of time: {message}",
            "an end within the time that the profile gives",
            "Raise timeout_s of the step (or run_timeout_s) in the profile.",
            error="OutOfTime",
            user_error=True,
            from_outside=True,
        )
    if code == _KILLED:
        return Reason(
            "killed (exit code 137)",
            "a process that ends by itself",
            "Either its memory ran out (memory_limit in the profile) or its pod was deleted or evicted.",
            error="Killed",
            retry=True,
            from_outside=True,
        )
    # "main: Error (exit code 1)" says no more than this.
    text = re.sub(r"^(main: )?Error \(exit code (\d+)\)", r"exit code \2", message)
    return Reason(text, error="TaskFailed")


def find_forbidden(text: str) -> Reason | None:
    """The right that the pods' account lacks, as Kubernetes says it somewhere in a message or a log."""
    found = _FORBIDDEN.search(text)
    if not found:
        return None
    role = TRAINJOB_ROLE if found[3] in ("trainjobs", "pods/log") else "infra/k8s/base/runs/access.yaml"
    return Reason(
        f"the account {found[1].rpartition(':')[2]} may not {found[2]} {found[3]}",
        "an account with the rights that a run's pods need",
        f"Start it with --service-account manyeyes-runs, or give this account the role of {role}.",
        error="Forbidden",
        user_error=True,
    )


def pod_index(pod: Mapping[str, Any]) -> int:
    """Which node of its job a pod is, from 0."""
    return int(pod["metadata"].get("annotations", {}).get(_INDEX, 0))


def _container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """State of a pod's container that trains."""
    for status in pod["status"].get("containerStatuses", ()):
        if status["name"] == NODE:
            state: Mapping[str, Any] = status.get("state", {})
            return state
    return {}


def why_waiting(pod: Mapping[str, Any]) -> str | None:
    """What a pod waits for, as Argo writes it; None where it runs or has ended."""
    waiting = _container(pod).get("waiting")
    if waiting:
        return f"{waiting.get('reason', '')}: {waiting.get('message', '')}"
    for condition in pod["status"].get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return None


def why_ended(pod: Mapping[str, Any]) -> str | None:
    """Why a pod ended badly, as Argo writes it; None where it did not."""
    status = pod["status"]
    for condition in status.get("conditions", ()):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"eviction ({condition.get('reason', '')}): {condition.get('message', '')}"
    if status.get("reason") == "Evicted":
        return status.get("message") or "evicted"
    ended = _container(pod).get("terminated")
    if ended and ended.get("exitCode"):
        return f"{ended.get('reason') or 'Error'} (exit code {ended['exitCode']})"
    if status.get("phase") == "Failed":
        return f"{status.get('reason', 'Failed')}: {status.get('message', '')}"
    return None


class ClusterAwayError(PipelineError):
    """The Kubernetes API does not answer."""

    retry_by_default = True


class Cluster:
    """The few calls that a step makes to the Kubernetes API, each again while it is away or busy.

    In a pod with the account's token; where ``KUBECONFIG`` is set, as that file says.
    """

    def __init__(self) -> None:
        from kubernetes import client, config

        settings = client.Configuration()
        file = os.environ.get("KUBECONFIG")
        if file:
            config.load_kube_config(config_file=file, client_configuration=settings)
            _, context = config.list_kube_config_contexts(config_file=file)
            self.namespace = context["context"].get("namespace", "default")
        else:
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException as error:
                raise PipelineError(
                    f"this pod cannot reach the Kubernetes API ({error})",
                    "a pod with a token of its account",
                    "Leave automountServiceAccountToken on, or train in the step's own pod (launcher: inpod).",
                ) from error
            self.namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        settings.retries = False
        self.patience_s = _SILENCE_S
        self._client = client.ApiClient(settings)

    @property
    def trainjobs(self) -> str:
        """Path of the namespace's TrainJobs."""
        return f"{_TRAINER_PATH}/namespaces/{self.namespace}/trainjobs"

    @property
    def _pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    def get(self, path: str) -> dict[str, Any] | None:
        """An object, or None where it is not there."""
        _, answer = self._call("GET", path, expected=(404,))
        return answer

    def create(self, path: str, manifest: Mapping[str, Any]) -> bool:
        """Make an object; False where one of that name is there, for instance since an answer was lost."""
        status, _ = self._call("POST", f"{path}?fieldValidation=Strict", body=manifest, expected=(409,))
        return status != 409

    def delete(self, path: str) -> None:
        """Delete an object with all that it made, should it still be there."""
        self._call("DELETE", path, body={"propagationPolicy": "Background"}, expected=(404,))

    def pods(self, job: str) -> list[dict[str, Any]]:
        """The pods of a TrainJob's nodes."""
        query = urlencode({"labelSelector": f"jobset.sigs.k8s.io/jobset-name={job}"})
        _, answer = self._call("GET", f"{self._pods}?{query}")
        return list((answer or {}).get("items", ()))

    def log(self, pod: str, query: Mapping[str, str]) -> str:
        """Lines of a pod's log with their times; nothing where it has not begun or is gone."""
        query = {"container": NODE, "timestamps": "true", "limitBytes": "4000000", **query}
        _, answer = self._call("GET", f"{self._pods}/{pod}/log?{urlencode(query)}", expected=(400, 404), raw=True)
        return str((answer or {}).get("text", ""))

    def own_pod(self) -> dict[str, Any]:
        """The pod that this step runs in; empty where nobody says which."""
        name = os.environ.get("HOSTNAME", "")
        try:
            return (self.get(f"{self._pods}/{name}") if name else None) or {}
        except PipelineError:  # then nothing is known of it
            return {}

    def is_evicted(self) -> bool:
        """Whether Kubernetes itself takes this step's pod away, and not somebody who wants it to end."""
        self.patience_s = _MARK_S
        deadline = time.monotonic() + _MARK_S
        while True:
            status = self.own_pod().get("status", {})
            marks = [condition for condition in status.get("conditions", ()) if condition["type"] == "DisruptionTarget"]
            if status.get("reason") == "Evicted" or any(mark["status"] == "True" for mark in marks):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def may(self, verb: str, resource: str, *, group: str = "", subresource: str = "") -> bool:
        """Whether this pod's account has a right."""
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {**attributes, "subresource": subresource}},
        }
        _, answer = self._call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review)
        return bool((answer or {}).get("status", {}).get("allowed"))

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        expected: tuple[int, ...] = (),
        raw: bool = False,
    ) -> tuple[int, dict[str, Any] | None]:
        """Status and answer; None for an expected refusal.

        Raises:
            ClusterAwayError: No answer for ``patience_s``.
            PipelineError: A refusal.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        silent_since, told = time.monotonic(), False
        while True:
            try:
                answer = self._client.call_api(
                    path,
                    method,
                    header_params={"Accept": "*/*" if raw else "application/json"},
                    body=body,
                    auth_settings=["BearerToken"],
                    _return_http_data_only=True,
                    _preload_content=False,
                    _request_timeout=_ANSWER_S,
                )
                data = answer.data
                return answer.status, {"text": data.decode(errors="replace")} if raw else json.loads(data)
            except ApiException as error:
                if error.status in expected:
                    return error.status, None
                if error.status not in (429, 500, 502, 503, 504):
                    said = error.body or error.reason
                    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
                    raise _refusal(method, path, error.status, text) from error
                found = f"{error.status} {error.reason}"
            except (HTTPError, OSError, ValueError) as error:
                found = type(error).__name__
            if time.monotonic() - silent_since > self.patience_s:
                raise ClusterAwayError(
                    f"the Kubernetes API has not answered for {self.patience_s:,.0f} s ({found})",
                    "an answer of the Kubernetes API",
                    "Run it again: a TrainJob that still trains is gone on with.",
                )
            if not told:
                sys.stderr.write(f"the Kubernetes API does not answer ({found}): waiting for it\n")
                told = True
            time.sleep(_POLL_S)


def _refusal(method: str, path: str, status: int, body: str) -> PipelineError:
    with suppress(ValueError, AttributeError):
        body = json.loads(body).get("message") or body
    forbidden = find_forbidden(body)
    if forbidden:
        return PipelineError(forbidden.text, forbidden.needed, forbidden.do)
    if status == 404 and TRAINER in path:
        return no_trainer()
    if "unknown field" in body:
        return PipelineError(
            f"the cluster's TrainJob is older than this one ({body})", "Kubeflow Trainer 2.2 or newer", "Upgrade it."
        )
    return PipelineError(
        f"the Kubernetes API answered {method} {path.partition('?')[0]} with {status}: {body}",
        "a TrainJob that the cluster takes",
        "Correct the profile as it says; docs/endpoint.md has what a TrainJob needs.",
    )


def no_trainer() -> PipelineError:
    """That the cluster knows no TrainJobs."""
    return PipelineError(
        f"the cluster has no trainjobs.{TRAINER}",
        "Kubeflow Trainer 2.2 or newer, with its CRDs",
        "Install it (https://www.kubeflow.org/docs/components/trainer/), or train in the step's own pod "
        "(launcher: inpod in the profile).",
    )


class PodLog:
    """How far a pod's log has been read."""

    def __init__(self) -> None:
        self._pod, self._time, self._count = "", "", 0

    def read(self, cluster: Cluster, pod: str) -> list[str]:
        """Lines that have come since; none of a pod that has not begun."""
        if pod != self._pod:
            self._pod, self._time, self._count = pod, "", 0
        # By the second, which is all that the API knows.
        since = {"sinceTime": re.sub(r"\.\d+", "", self._time)} if self._time else {}
        text = cluster.log(pod, since)
        lines, new = [line.partition(" ") for line in text.split("\n")[:-1]], []
        seen, skip = self._time, self._count
        for moment, _, line in lines:
            if moment < seen or (moment == seen and skip):
                skip -= moment == seen
                continue
            self._count = self._count + 1 if moment == self._time else 1
            self._time = moment
            new.append(line)
        return new
