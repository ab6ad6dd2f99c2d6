"""What the steps of one pipeline run left in MLflow, for the run's summary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.tracking import Tracking, connect

_PARENT = "mlflow.parentRunId"
_STATES: dict[str, Literal["finished", "failed", "stopped", "running"]] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped",
}
# Steps of one run; a search trains many candidates.
_MOST = 1000


@dataclass(frozen=True)
class StepRecord:
    """One step's MLflow run.

    Attributes:
        step: Step name, with its encoder or model in brackets where it has one.
        state: How it went.
        seconds: From its start to its end; None while it runs.
        tags: What it left: figure, error, digests.
        url: Of its page; empty where the store is a file.
    """

    step: str
    state: Literal["finished", "failed", "stopped", "running"]
    seconds: float | None
    tags: Mapping[str, str]
    url: str


def step_records() -> list[StepRecord]:
    """The steps that ran in this pipeline run, in the order in which they began; those from the cache did not run.

    A run's steps are the children of ``MANYEYES_PARENT_RUN_ID`` (``manyeyes run``), or the siblings of
    ``MLFLOW_RUN_ID`` (Kubeflow's own integration), or those that carry the same ``MANYEYES_PIPELINE_RUN``.

    Raises:
        RegistryError: MLflow refuses.
        RegistryUnreachableError: It does not answer.
    """
    tracking = connect()
    wanted = _filter(tracking)
    if not wanted:
        return []
    with registry_errors():
        runs = tracking.client.search_runs(
            [tracking.experiment_id],
            filter_string=wanted,
            max_results=_MOST,
            order_by=["attributes.start_time ASC"],
        )
    own = os.environ.get("MLFLOW_RUN_ID")
    records = []
    for run in runs:
        tags = dict(run.data.tags)
        if "manyeyes.step" not in tags or run.info.run_id == own:
            continue
        ended = run.info.end_time
        # A run that Kubeflow made is ended by it, some time after its step.
        state = _STATES.get(run.info.status, _state(tags))
        records.append(
            StepRecord(
                step=tags["manyeyes.step"],
                state=state,
                seconds=(ended - run.info.start_time) / 1000 if ended else None,
                tags=tags,
                url=run_url(tracking, run.info.run_id),
            )
        )
    return records


def _state(tags: Mapping[str, str]) -> Literal["finished", "failed", "running"]:
    if "manyeyes.figure" in tags:
        return "finished"
    return "failed" if "manyeyes.error" in tags else "running"


def _filter(tracking: Tracking) -> str:
    parent = os.environ.get("MANYEYES_PARENT_RUN_ID")
    own = os.environ.get("MLFLOW_RUN_ID")
    if not parent and own:
        with registry_errors():
            parent = tracking.client.get_run(own).data.tags.get(_PARENT)
    if parent:
        return f"tags.`{_PARENT}` = '{parent}'"
    pipeline_run = os.environ.get("MANYEYES_PIPELINE_RUN")
    return f"tags.`manyeyes.pipeline_run` = '{pipeline_run}'" if pipeline_run else ""


def run_url(tracking: Tracking, run_id: str) -> str:
    """Page of a run, where people can open it.

    ``MANYEYES_MLFLOW_URL`` is the server's address as a browser knows it; the tracking URI when it is not set.
    """
    base = _browser_url(tracking)
    return f"{base}/#/experiments/{tracking.experiment_id}/runs/{run_id}" if base else ""


def version_url(name: str, version: str) -> str:
    """Page of a registered version; empty where the store is a file.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
    """
    base = _browser_url(connect())
    return f"{base}/#/models/{name}/versions/{version}" if base else ""


def _browser_url(tracking: Tracking) -> str:
    given = os.environ.get("MANYEYES_MLFLOW_URL", "")
    from_uri = tracking.uri if tracking.uri.startswith(("http://", "https://")) else ""
    scheme, _, rest = (given or from_uri).partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].rstrip('/')}" if rest else ""
