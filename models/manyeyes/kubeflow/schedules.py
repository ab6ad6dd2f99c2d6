"""``manyeyes pipeline schedule``: recurring runs on an endpoint, one for each name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kfp_server_api import models

from manyeyes.errors import EndpointError, PipelineError, did_you_mean
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.endpoint_runs import EXPERIMENT
from manyeyes.kubeflow.endpoint_transport import AnsweredError

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def make_trigger(*, cron: str = "", every: str = "") -> models.V2beta1Trigger:
    """When runs start.

    Args:
        cron: ``minute hour day month weekday``, or six fields with seconds in front, as Kubeflow counts them.
        every: A number and a unit: 30m, 6h, 1d, 2w.

    Raises:
        PipelineError: Both, neither, or not of that form.
    """
    if bool(cron) == bool(every):
        raise PipelineError("cron and interval are both given or both missing", "one of them", "--cron or --every")
    if every:
        match = re.fullmatch(r"(\d+)([mhdw])", every)
        if match is None or int(match[1]) == 0:
            raise PipelineError(f'interval is "{every}"', "a number and m, h, d or w", "For instance: --every 6h")
        seconds = int(match[1]) * _UNITS[match[2]]
        return models.V2beta1Trigger(periodic_schedule=models.V2beta1PeriodicSchedule(interval_second=str(seconds)))
    fields = cron.split()
    if cron.startswith("@") and len(fields) == 1:
        return models.V2beta1Trigger(cron_schedule=models.V2beta1CronSchedule(cron=cron))
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\w*/?,\-]+", part) for part in fields):
        raise PipelineError(
            f'cron is "{cron}"', "five fields, or six with seconds in front", 'At two every night: --cron "0 2 * * *"'
        )
    fields = fields if len(fields) == 6 else ["0", *fields]
    return models.V2beta1Trigger(cron_schedule=models.V2beta1CronSchedule(cron=" ".join(fields)))


def create_schedule(
    endpoint: Endpoint,
    version: models.V2beta1PipelineVersion,
    *,
    name: str,
    trigger: models.V2beta1Trigger,
    parameters: Mapping[str, Any],
    max_concurrency: int = 1,
    catch_up: bool = False,
    experiment: str = EXPERIMENT,
    service_account: str = "",
) -> tuple[models.V2beta1RecurringRun, bool]:
    """Make a recurring run of a pinned version.

    Returns:
        It, and whether it is new.

    Raises:
        PipelineError: One of that name does something else.
        EndpointError: The endpoint refuses, or it is unknown whether it was made.
    """
    group = endpoint.experiment(experiment)
    body = models.V2beta1RecurringRun(
        display_name=name,
        experiment_id=group.experiment_id,
        namespace=endpoint.settings.namespace or None,
        mode=models.RecurringRunMode.ENABLE,
        pipeline_version_reference=models.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
        ),
        runtime_config=models.V2beta1RuntimeConfig(parameters=dict(parameters)),
        trigger=trigger,
        max_concurrency=str(max_concurrency),
        no_catchup=not catch_up,
        service_account=service_account or None,
    )
    try:
        found, new = endpoint.create(
            lambda: endpoint.schedule(name),
            lambda: endpoint.schedules.recurring_run_service_create_recurring_run(recurring_run=body),
            unique=False,
        )
    except EndpointError as error:
        if not error.retry:
            raise
        raise EndpointError(
            error.found,
            f'to know whether schedule "{name}" was made',
            "Run the same command again: a schedule of that name is not made twice.",
            retry=True,
        ) from error
    if not new and not _same(found, body):
        raise PipelineError(
            f'schedule "{name}" is there and does something else ({in_words(found)})',
            "one schedule for each name",
            f"Delete it (manyeyes pipeline schedule delete {name}) or give another --name.",
        )
    return found, new


def _same(found: models.V2beta1RecurringRun, wanted: models.V2beta1RecurringRun) -> bool:
    reference = found.pipeline_version_reference
    version = reference.pipeline_version_id if reference else found.pipeline_version_id
    parameters = (found.runtime_config.parameters if found.runtime_config else None) or {}
    return (
        version == wanted.pipeline_version_reference.pipeline_version_id
        and parameters == wanted.runtime_config.parameters
        and _when(found) == _when(wanted)
    )


def _when(schedule: models.V2beta1RecurringRun) -> str:
    trigger = schedule.trigger
    if trigger is None:
        return "never"
    if trigger.cron_schedule is not None and trigger.cron_schedule.cron:
        return f"cron {trigger.cron_schedule.cron}"
    if trigger.periodic_schedule is not None and trigger.periodic_schedule.interval_second:
        return f"every {int(trigger.periodic_schedule.interval_second):,} s"
    return "never"


def in_words(schedule: models.V2beta1RecurringRun) -> str:
    """One line: when it runs, and whether it is on."""
    status = str(schedule.status or schedule.mode or "unknown").lower().removesuffix("d")
    return f"{_when(schedule)}, {'on' if status == 'enable' else 'off'}"


def list_schedules(endpoint: Endpoint) -> list[models.V2beta1RecurringRun]:
    """The newest hundred."""
    scope = {"namespace": endpoint.settings.namespace} if endpoint.settings.namespace else {}
    answer = endpoint.schedules.recurring_run_service_list_recurring_runs(
        sort_by="created_at desc", page_size=100, **scope
    )
    return list(answer.recurring_runs or [])


def find_schedule(endpoint: Endpoint, name: str) -> models.V2beta1RecurringRun:
    """A schedule by name.

    Raises:
        PipelineError: There is none.
    """
    found = endpoint.schedule(name)
    if found is None:
        names = [schedule.display_name for schedule in list_schedules(endpoint)]
        raise PipelineError(
            f'schedule is "{name}"',
            f"one of {', '.join(names) or 'none here'}",
            f"{did_you_mean(name, names)}List them with: manyeyes pipeline schedule list",
        )
    return found


def delete_schedule(endpoint: Endpoint, name: str) -> None:
    """Remove a schedule by name; its runs stay.

    Raises:
        PipelineError: There is none.
        EndpointError: The endpoint refuses or does not answer.
    """
    found = find_schedule(endpoint, name)
    try:
        endpoint.schedules.recurring_run_service_delete_recurring_run(found.recurring_run_id)
    except AnsweredError as error:
        # The first of two requests did it, and its answer was lost.
        if error.status != 404:
            raise
