"""What becomes of a run on an endpoint: its steps, following them, why they failed, and all of it as one page."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from kfp_server_api import models

from manyeyes.errors import EndpointError
from manyeyes.harness.base import attempts_in
from manyeyes.harness.cluster import find_forbidden
from manyeyes.harness.events import ErrorReport, find_error_line
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.endpoint_runs import state_of
from manyeyes.kubeflow.workflow import (
    OVER,
    State,
    StepStatus,
    is_machinery,
    plain,
    read_workflow,
    steps_of,
    tell_apart,
)
from manyeyes.pages import Stretch, Table, Text, Timeline, duration, facts_table, render

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
_MOST_LOGS = 16
_LOG_LINES, _LOG_CHARACTERS = 10, 800
# What Kubeflow's launcher and the SDK's executor write around a step's own lines: all that it was given, as JSON, too.
_LAUNCHER = re.compile(r"[IWEF]\d{4} \S+ +\d+ \S+\.go:\d+\]|\[KFP Executor \S+ \S+ INFO\]")
_EXECUTOR_INPUT = re.compile(r"^\[KFP Executor [^\n]*Got executor_input:\n\{\n.*?^\}$", re.MULTILINE | re.DOTALL)
# How long an endpoint may be away while a run is followed.
_PATIENCE_S = 600.0
# A task's state in the API, where there is no workflow to read.
_TASK_STATES: dict[str, State] = {
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "SKIPPED": "skipped",
    "FAILED": "failed",
    "CANCELED": "stopped",
    "CANCELING": "running",
    "PAUSED": "waiting",
}


RETRIES_OFF = "this cluster tries no failed pod again: its workflow controller says so (docs/endpoint.md, Retries)"


@dataclass(frozen=True)
class RunStatus:
    """A run and its steps.

    Attributes:
        run: As the API tells it.
        steps: Those that started in order of their start, then the others.
        message: What Argo says of the whole run; empty where it says nothing.
        retries_off: Whether this cluster tries no failed pod again.
    """

    run: models.V2beta1Run
    steps: Sequence[StepStatus]
    message: str = ""
    retries_off: bool = False

    @property
    def state(self) -> str:
        """What became of the run, in Kubeflow's words."""
        return state_of(self.run)


def read_status(endpoint: Endpoint, run: models.V2beta1Run) -> RunStatus:
    """The steps of a run, from its workflow or, where the endpoint hands that out no more, from the API's tasks."""
    workflow = read_workflow(endpoint.workflow_of(run.run_id) or "")
    if workflow is None:
        return RunStatus(run, _steps_of_tasks(run))
    message = "" if state_of(run) in ("SUCCEEDED", "CANCELED") else workflow.message
    return RunStatus(run, steps_of(workflow), message, workflow.retries_off)


def _steps_of_tasks(run: models.V2beta1Run) -> list[StepStatus]:
    details = (run.run_details.task_details if run.run_details else None) or []
    # A node's id is the workflow's name and a hash; the workflow is among the tasks itself.
    workflows = {(child.pod_name or "").rpartition("-")[0] for task in details for child in task.child_tasks or []}
    steps = []
    for task in details:
        if not task.display_name or is_machinery(task.display_name) or task.display_name in workflows:
            continue
        started, ended = _moment(task.start_time), _moment(task.end_time)
        state = _TASK_STATES.get(task.state or "", "not started")
        steps.append(
            StepStatus(
                key=task.task_id or task.display_name,
                name=plain(task.display_name),
                component="",
                state=state,
                started=started if state != "not started" else None,
                ended=ended if state in OVER else None,
            )
        )
    far = datetime.max.replace(tzinfo=UTC)
    return tell_apart(sorted(steps, key=lambda step: (step.started or far, step.key)))


def _moment(value: datetime | None) -> datetime | None:
    # The backend writes "not yet" as 1970.
    return value if value is not None and value.year > 1970 else None


def words_of(step: StepStatus) -> str:
    """What became of a step, in a few words."""
    words: str = "from the cache" if step.state == "cached" else step.state
    if step.state == "waiting" and step.reason is not None:
        return f"waiting: {step.reason.text}"
    if step.seconds is not None and step.state != "cached":
        words += f"  {duration(step.seconds)}"
    if len(step.attempts) > 1:
        words += f", attempt {len(step.attempts)}"
    if step.state == "failed" and step.reason is not None:
        words += f": {step.reason.text}"
    return words


def follow_run(endpoint: Endpoint, run_id: str, *, say: Callable[[str], None], poll_s: float = 5.0) -> RunStatus:
    """Say each change of a run's steps until it ends.

    Args:
        endpoint: Where it runs.
        run_id: The run.
        say: Shows one line.
        poll_s: Seconds between two looks.

    Returns:
        The run in its last state.

    Raises:
        EndpointError: The endpoint was away for ten minutes; the run goes on.
    """
    seen: dict[str, tuple[str, int, str]] = {}
    seen_state = ""
    away_since: float | None = None
    while True:
        try:
            run = endpoint.runs.run_service_get_run(run_id)
            status = read_status(endpoint, run)
        except EndpointError as error:
            if not error.retry:
                raise
            now = time.monotonic()
            if away_since is None:
                away_since = now
                say(f"{_clock()}  {error.found}; waiting for it")
            if now - away_since > _PATIENCE_S:
                raise
            time.sleep(poll_s)
            continue
        away_since = None
        for step in status.steps:
            # The kind of a reason, not its text: what Kubernetes says of one image changes from look to look.
            now_is = (step.state, len(step.attempts), step.reason.error if step.reason else "")
            if step.state not in ("not started", "starting") and seen.get(step.key) != now_is:
                seen[step.key] = now_is
                say(f"{_clock()}  {step.name:<28} {words_of(step)}")
        if status.state != seen_state:
            seen_state = status.state
            say(f"{_clock()}  run {run.display_name}: {status.state.lower()}")
        if status.state in ENDED:
            return status
        time.sleep(poll_s)


def _clock() -> str:
    return f"{datetime.now():%H:%M:%S}"


@dataclass(frozen=True)
class Failure:
    """Why a step failed.

    Attributes:
        name: Of the step, as people know it.
        report: What was found, needed and to be done.
        log: The last lines that its pod wrote, where none of them says why it failed.
        attempts: How often it was tried: its pods, and the attempts in them of which the log knows.
    """

    name: str
    report: ErrorReport
    log: Sequence[str] = ()
    attempts: int = 1


def failures_of(endpoint: Endpoint, status: RunStatus) -> list[Failure]:
    """Why a run failed, as its failed steps said it.

    A step that fails writes ``error.json``, which the backend does not keep (a failed task's outputs are not uploaded),
    and the same as one line of its log, which the endpoint hands out. A pod that was killed or could not start has no
    such line: Argo's message on its node says why.
    """
    failures = []
    for step in [step for step in status.steps if step.state == "failed"][:_MOST_LOGS]:
        log = _log_of(endpoint, status, step)
        said = find_error_line(log)
        # Each pod that tries again says so; all but the last pod's are taken as one attempt.
        tried = max(len(step.attempts), 1) - 1 + attempts_in(log)
        failures.append(
            Failure(step.name, said, attempts=tried)
            if said
            else Failure(step.name, _in_words(status, step, log), _last_lines(step, log), tried)
        )
    if not failures and status.state == "FAILED":
        failures.append(Failure(status.run.display_name or "", _said_by_backend(status)))
    return failures


def _log_of(endpoint: Endpoint, status: RunStatus, step: StepStatus) -> str:
    pods = [attempt.pod for attempt in step.attempts] or _pods_of_task(status.run, step.key)
    log = ""
    for pod in reversed(pods[-4:]):
        text = endpoint.log_of(status.run.run_id, pod) or ""
        if find_error_line(text):
            return text
        log = log or text
    return log


def _pods_of_task(run: models.V2beta1Run, task_id: str) -> list[str]:
    """The API names a failed task's pods among the children of the failed nodes only.

    ``error`` and ``pod_name`` of a task are never set (https://github.com/kubeflow/pipelines/issues/14007), but are
    taken where they are.
    """
    details = (run.run_details.task_details if run.run_details else None) or []
    pods: dict[str, None] = {}
    for task in details:
        if task.task_id == task_id:
            pods |= dict.fromkeys(pod for pod in (task.pod_name, *(c.pod_name for c in task.child_tasks or [])) if pod)
    return list(pods)


def _last_lines(step: StepStatus, log: str) -> list[str]:
    """The last lines of a step's own; where it wrote none, and of a driver, the errors of Kubeflow's program."""
    lines = [line for line in _EXECUTOR_INPUT.sub("", log).splitlines() if line.strip()]
    of_driver = bool(step.attempts) and step.attempts[-1].is_driver
    own = [] if of_driver else [line for line in lines if not _LAUNCHER.match(line)]
    errors = [line for line in lines if _LAUNCHER.match(line) and line[0] in "EF"]
    return [line.rstrip()[:_LOG_CHARACTERS] for line in (own or errors or lines)[-_LOG_LINES:]]


def _in_words(status: RunStatus, step: StepStatus, log: str) -> ErrorReport:
    reason = find_forbidden(log) or step.reason
    if reason is None:
        return _said_by_backend(status).model_copy(update={"step": step.name})
    after = f", in the last of {len(step.attempts)} attempts" if len(step.attempts) > 1 else ""
    return ErrorReport(
        step=step.name,
        error=reason.error,
        found=f"{reason.text}{after}",
        needed=reason.needed,
        do=reason.do
        or f"Read its log: kubectl logs {step.attempts[-1].pod} -c main"
        + ("" if log else ", or ask again with KFP_UI_ENDPOINT set: Kubeflow's pages hand out more logs."),
        retry=reason.retry,
        user_error=reason.user_error,
    )


def _said_by_backend(status: RunStatus) -> ErrorReport:
    run = status.run
    details = (run.run_details.task_details if run.run_details else None) or []
    messages = [task.error.message for task in details if task.error and task.error.message]
    if run.error is not None and run.error.message:
        messages.append(run.error.message)
    if status.message:
        messages.append(status.message)
    # Of etcd, and of Argo, where even a compressed status is too large.
    if messages and re.search(r"request is too large|longer than maximum allowed size", messages[0]):
        return ErrorReport(
            step=run.display_name or "",
            error="RunTooLarge",
            found=f"Kubernetes cannot keep the state of so large a run: {messages[0]}",
            needed="a run whose state fits into one object of Kubernetes, 1 MB",
            do="Split it: fewer variants, encoders or benchmarks in one run.",
            retry=False,
            user_error=True,
        )
    return ErrorReport(
        step=run.display_name or "",
        error="RunFailed",
        found=messages[0] if messages else "it failed without a word that the endpoint hands out",
        needed="a step that ends well, or the log of its pod",
        do="Out of memory, an image that cannot be pulled and a deleted pod leave no log. Look at: "
        f"{_kubectl(run)}, then kubectl describe pod NAME",
        retry=True,
        user_error=False,
    )


def _kubectl(run: models.V2beta1Run) -> str:
    return f"kubectl get pods -l pipeline/runid={run.run_id}"


_KINDS = {"succeeded": "good", "failed": "bad", "running": "on"}
_KEY = [("wait", "Kubeflow prepares it, or it waits"), ("good", "went well"), ("on", "runs"), ("bad", "failed")]


def render_status(status: RunStatus, failures: Sequence[Failure], *, ui: str = "", now: datetime | None = None) -> str:
    """The page of a run.

    Args:
        status: The run and its steps.
        failures: Why it failed.
        ui: Address of Kubeflow's pages, for a link; empty where that is not known.
        now: Where the stretch of what still runs ends; the time of the call by default.
    """
    run, now = status.run, now or datetime.now(UTC)
    begun = min((step.started for step in status.steps if step.started), default=None)
    ends = [step.ended if step.ended and step.state in OVER else now for step in status.steps if step.started]
    took = (max(ends) - begun).total_seconds() if begun and ends else 0.0
    tried = sum(not attempt.is_driver for step in status.steps for attempt in step.attempts)
    link = f"{ui}/#/runs/details/{run.run_id}" if ui else ""
    rows = [("result", status.state.lower()), ("run", run.run_id), ("said by Argo", status.message)]
    if begun is not None:
        rows += [("started", f"{begun:%Y-%m-%d %H:%M:%S} UTC"), ("took", duration(took)), ("pods of steps", str(tried))]
    facts: list[list[str | Text]] = [[name, value] for name, value in rows if value]
    if link:
        facts.append(["in Kubeflow", Text(link, link=link)])
    return render(
        "status.html",
        title=f"Run {run.display_name}",
        facts=Table(("", ""), facts),
        failures=[
            {
                "name": failure.name + (f" (attempt {failure.attempts})" if failure.attempts > 1 else ""),
                "facts": facts_table([(name, getattr(failure.report, name)) for name in ("found", "needed", "do")]),
                "log": "\n".join(failure.log),
            }
            for failure in failures
        ],
        times=Timeline([_row(step, begun, now) for step in status.steps if step.started] if begun else [], took),
        key=_KEY,
        steps=Table(("step", "", "attempts"), [_cells(step) for step in status.steps], numbers=(2,), stacked=True),
    )


def _row(step: StepStatus, begun: datetime, now: datetime) -> tuple[str, list[Stretch], str, str]:
    def second(moment: datetime | None) -> float:
        return ((moment or now) - begun).total_seconds()

    first = step.attempts[0].started if step.attempts else step.ended
    stretches = [Stretch(second(step.started), second(first), "wait", "Kubeflow prepares it")]
    before = first
    for number, attempt in enumerate(step.attempts, start=1):
        if number > 1:
            stretches.append(Stretch(second(before), second(attempt.started), "wait", "waits for another attempt"))
        title = f"attempt {number}: {attempt.state}" + (f", {attempt.reason.text}" if attempt.reason else "")
        ended = attempt.ended if attempt.state in OVER else now
        stretches.append(Stretch(second(attempt.started), second(ended), _KINDS.get(attempt.state, "wait"), title))
        before = ended
    return step.name, stretches, "cached" if step.state == "cached" else _took(step), _KINDS.get(step.state, "quiet")


def _took(step: StepStatus) -> str:
    return step.state if step.seconds is None else duration(step.seconds)


def _cells(step: StepStatus) -> list[Text | str]:
    kind = {"failed": "bad", "waiting": "warn", "not started": "quiet"}.get(step.state, "")
    return [step.name, Text(words_of(step), kind=kind), str(len(step.attempts) or "")]
