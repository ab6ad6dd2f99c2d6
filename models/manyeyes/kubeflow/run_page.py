"""A run on an endpoint as one page: what is wrong, when each step ran, what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from manyeyes.kubeflow.run_status import Failure, RunStatus, words_of
from manyeyes.kubeflow.workflow import OVER, StepStatus
from manyeyes.pages import Stretch, Table, Text, Timeline, duration, facts_table, render

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
                "name": failure.name,
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
