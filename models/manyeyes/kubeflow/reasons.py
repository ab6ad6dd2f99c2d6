"""What Argo says of a pod that waits or failed, in plain words: what was found, what is needed, what to do.

Argo's messages are made by ``getPendingReason`` and ``inferFailedReason`` (workflow/controller/operator.go).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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
    return Reason(
        f"the account {found[1].rpartition(':')[2]} may not {found[2]} {found[3]}",
        "an account with the rights that a run's pods need",
        "Start it with --service-account manyeyes-runs, or give this account the role of "
        "infra/k8s/base/runs/access.yaml.",
        error="Forbidden",
        user_error=True,
    )
