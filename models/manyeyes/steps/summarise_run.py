"""The exit handler: says how a run went and where everything is, and tells a webhook. Runs whatever happened."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError

from manyeyes.errors import ManyEyesError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.events import ERROR_TAG, HEADLINE_TAG, ErrorReport
from manyeyes.pages import Table, Text, facts_table, render
from manyeyes.registry.webhook import post_json
from manyeyes.strict import StrictModel

if TYPE_CHECKING:
    from manyeyes.registry.tracking import StepRecord

WEBHOOK_URL = "MANYEYES_WEBHOOK_URL"

State = Literal["succeeded", "failed", "stopped", "unknown"]

# What an exit handler gets is MLMD's word for its group (COMPLETE, CACHED, CANCELED, not what the SDK documents), or
# kfp.local's. RUNNING and NEW mean that nobody wrote the group's end down, which a loop in it can cause
# (https://github.com/kubeflow/pipelines/issues/13321), SKIPPED that nothing ran: these settle nothing.
_SETTLED: dict[str, State] = {
    "COMPLETE": "succeeded",
    "SUCCEEDED": "succeeded",
    "CACHED": "succeeded",
    "FAILED": "failed",
    "CANCELED": "stopped",
    "CANCELLED": "stopped",
}
# The step with which a pipeline is done: it needs every other one, and nothing comes after it.
LAST_STEPS = {
    "train": "register",
    "evaluate": "merge_scorecards",
    "ablate": "compare_trials",
    "balance": "compare_trials",
    "curate": "publish_snapshot",
    "validate": "judge_snapshot",
    "search_encoders": "advance_search",
    "promote": "promote_version",
    "rollback": "restore_previous",
}


class NoticeStep(StrictModel):
    """One step that ran."""

    name: str = Field(description="Step name, with its encoder or model in brackets where it has one.")
    state: Literal["finished", "failed", "stopped", "running"]
    seconds: float | None = Field(description="From start to end; null where it has not ended.")
    figure: str = Field(description="The figure that matters, in words.")
    link: str = Field(description="Page of its MLflow run; empty where the store is a file.")


class RunNotice(StrictModel):
    """How a pipeline run went: the body that the webhook gets."""

    # Filled step by step, so that what was read before MLflow fails is kept.
    model_config = ConfigDict(frozen=False)

    text: str = Field(description="All of it in one line, which chat services show as it is.")
    pipeline: str
    subject: str = Field(description="What it was run for, for instance the recipe.")
    run_id: str = Field(description="Of the pipeline run.")
    state: State
    verdict: str = Field(default="", description="The gate's: passed or failed; empty where no gate was reached.")
    model: str = Field(default="", description="Name in the registry; empty where nothing was registered.")
    version: str = Field(default="", description="Version in the registry.")
    aliases: str = Field(default="", description="Aliases that point at it now.")
    scores: str = Field(default="", description="The bundle's score by benchmark, in words.")
    steps: list[NoticeStep] = Field(description="That ran in this run, in order; those from the cache did not run.")
    error: ErrorReport | None = Field(default=None, description="Of the first step that failed and was not made good.")
    links: dict[str, str] = Field(default_factory=dict, description="Pages, by what they show.")


def summarise_run(
    reporter: Reporter,
    *,
    pipeline: str,
    subject: str = "",
    run_id: str = "",
    state: str | None,
    message: str = "",
) -> StepResult:
    """Say how a run went, from what its steps left in MLflow, and tell the webhook where one is set.

    An exit handler gets no outputs of the steps, so MLflow is what it asks; where MLflow does not answer, it says so
    and the rest.

    Args:
        reporter: Shows the progress.
        pipeline: Name of the pipeline.
        subject: What it was run for; the first line is shown.
        run_id: Of the pipeline run.
        state: Kubeflow's word for how it ended; where that settles nothing, the steps in MLflow decide.
        message: What Kubeflow says of the failure.
    """
    notice, remark = _read_history(pipeline, _first_line(subject), run_id, state or "", message)
    url = os.environ.get(WEBHOOK_URL, "")
    told = ""
    if url:
        reporter.progress("telling the webhook", done=0.5)
        told = post_json(url, notice.model_dump_json())
    rows = _rows(notice, remark=remark, told=told)
    return StepResult(
        headline=notice.text,
        metrics={
            **({} if notice.state == "unknown" else {"succeeded": float(notice.state == "succeeded")}),
            "steps": float(len(notice.steps)),
        },
        html=render_notice("run.html", notice, rows),
        markdown=render_notice("run.md", notice, rows),
    )


def _read_history(pipeline: str, subject: str, run_id: str, word: str, message: str) -> tuple[RunNotice, str]:
    from manyeyes.registry.tracking import step_records, version_url

    settled = _SETTLED.get(word.upper(), "unknown")
    notice = RunNotice(text="", pipeline=pipeline, subject=subject, run_id=run_id, state=settled, steps=[], error=None)
    remark = ""
    # A step that was tried again counts by its last attempt.
    latest: dict[str, StepRecord] = {}
    try:
        records = step_records()
        for record in records:
            latest[record.step] = record
            notice.steps.append(
                NoticeStep(
                    name=record.step,
                    state=record.state,
                    seconds=record.seconds,
                    figure=record.tags.get(HEADLINE_TAG, ""),
                    link=record.url,
                )
            )
            if record.step == "gate":
                notice.verdict = record.tags.get("manyeyes.verdict", "")
            if record.step == "register" and record.state == "finished":
                for name in ("verdict", "model", "version", "aliases", "scores"):
                    setattr(notice, name, record.tags.get(f"manyeyes.{name}", ""))
        # FAILED stays where an attempt failed that was made good, when a loop beside it came from the cache: nobody
        # writes the group's end down then. Once the last step has finished, every other one has.
        by_steps = _state_of_steps(pipeline, latest.values())
        if notice.state == "unknown" or (notice.state == "failed" and by_steps == "succeeded"):
            notice.state = by_steps
        failed = [record for record in latest.values() if record.state == "failed"]
        if failed and notice.state != "succeeded":
            notice.error = _read_error(failed[0].tags.get(ERROR_TAG, ""))
        if notice.model and (link := version_url(notice.model, notice.version)):
            notice.links["version"] = link
        if not records:
            remark = "no step left anything in MLflow"
    except ManyEyesError as error:
        remark = f"MLflow could not be asked: {error.found}"
    remarks = [remark] if remark else []
    if notice.state == "unknown":
        said = f'Kubeflow\'s word "{word}" does not say' if word else "Kubeflow does not say"
        remarks.append(f"{said} how the run ended" + ("" if remark else ", nor does what its steps left in MLflow"))
    if notice.state in ("failed", "unknown") and notice.error is None and message:
        remarks.append(message)
    notice.links |= {step.name: step.link for step in notice.steps if step.link}
    kubeflow = os.environ.get("MANYEYES_KUBEFLOW_URL", "").rstrip("/")
    if kubeflow and run_id:
        notice.links["run"] = f"{kubeflow}/#/runs/details/{run_id}"
    broken = [record.step for record in latest.values() if record.state != "finished"]
    return notice.model_copy(update={"text": _in_one_line(notice, broken)}), "; ".join(remarks)


def _state_of_steps(pipeline: str, latest: Collection[StepRecord]) -> State:
    """How a run ended, from the last attempt of each step, where Kubeflow's word does not settle it."""
    states = {record.state for record in latest}
    if "failed" in states:
        return "failed"
    if "stopped" in states:
        return "stopped"
    # A search ends in the round that says so.
    done = any(
        record.step.partition("[")[0] == LAST_STEPS.get(pipeline) and record.tags.get("manyeyes.ended") != "no"
        for record in latest
    )
    return "succeeded" if done and states == {"finished"} else "unknown"


def _read_error(text: str) -> ErrorReport | None:
    try:
        return ErrorReport.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _in_one_line(notice: RunNotice, broken: Sequence[str]) -> str:
    name = f"{notice.pipeline} of {notice.subject}" if notice.subject else notice.pipeline
    if notice.state == "unknown":
        return f"{name}: outcome unknown" + (f", {broken[0]} has not ended" if broken else "")
    if notice.error is not None:
        return f"{name} {notice.state} in {notice.error.step}: {notice.error.found}"
    if notice.state != "succeeded":
        return f"{name} {notice.state}" + (f" in {broken[0]}" if broken else "")
    parts = [f"{name} succeeded"]
    if notice.scores:
        parts.append(notice.scores)
    if notice.verdict:
        parts.append(f"gate {notice.verdict}")
    if notice.model:
        parts.append(f"{notice.model} version {notice.version}" + (f" is {notice.aliases}" if notice.aliases else ""))
    return ", ".join(parts)


def _rows(notice: RunNotice, *, remark: str, told: str) -> list[tuple[str, str]]:
    rows = [("result", notice.state), ("pipeline", notice.pipeline), ("run", notice.run_id)]
    version = f"{notice.model} version {notice.version}" if notice.model else ""
    optional = [
        ("run for", notice.subject),
        ("gate", notice.verdict),
        ("scores", notice.scores),
        ("registered", version),
        ("aliases", notice.aliases),
        ("remark", remark),
        ("webhook", told),
    ]
    return rows + [(name, value) for name, value in optional if value]


def render_notice(template: str, notice: RunNotice, rows: list[tuple[str, str]]) -> str:
    """What a run did, as ``run.html`` or ``run.md``; ``rows`` are facts on it."""
    steps = [
        [
            Text(step.name, link=step.link),
            step.state,
            "" if step.seconds is None else f"{step.seconds:,.1f}",
            step.figure,
        ]
        for step in notice.steps
    ]
    error = notice.error
    wrong = [] if error is None else [[p.subject, p.found, p.needed, p.do] for p in error.problems]
    if error is not None and not wrong:
        wrong = [[error.step, error.found, error.needed, error.do]]
    return render(
        template,
        title=f"Run of {notice.pipeline}",
        notice=notice,
        facts=facts_table(rows),
        problems=Table(("what", "found", "needed", "do"), wrong, stacked=True),
        steps=Table(("step", "", "seconds", ""), steps, numbers=(2,), stacked=True),
        links={name: notice.links[name] for name in ("run", "version") if name in notice.links},
    )


def _first_line(text: str) -> str:
    """Of a recipe that travels as text, its name; else the first line."""
    if text.lstrip().startswith("{"):
        with suppress(yaml.YAMLError, ValueError, AttributeError):  # a subject is only shown
            return str(yaml.safe_load(text).get("name", ""))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("name:")]
    return (named or lines or [""])[0][:200]


STEP = Step("summarise_run", summarise_run, imports=("manyeyes.registry.tracking",), tracked=False)
