"""``manyeyes pipeline upload`` and ``schedule``.

A version of a pipeline is named after code and image and uploaded once; a recurring run is known by its name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server_api import models

from manyeyes import __version__
from manyeyes.data.remote import is_remote_address
from manyeyes.data.snapshot import read_default_remote, read_dvc_file
from manyeyes.errors import EndpointError, PipelineError, did_you_mean
from manyeyes.kubeflow.endpoint import AnsweredError, Endpoint
from manyeyes.kubeflow.endpoint_runs import EXPERIMENT, check_run
from manyeyes.kubeflow.pipeline import compile_pipeline, image_digest, read_documents
from manyeyes.kubeflow.profiles import load_profile
from manyeyes.kubeflow.run import git_state, named_commit
from manyeyes.kubeflow.sizes import check_size
from manyeyes.storage import hash_file

# What a compiled pipeline is made of.
_SOURCES = ("pipelines", "components", "models", "infra/profiles", "data.dvc", ".dvc/config")


@dataclass(frozen=True)
class Uploaded:
    """A version on the endpoint.

    Attributes:
        pipeline: Name of the pipeline.
        version: Name of the version.
        version_id: Its id.
        new: False when it was there already.
        dirty: Whether the checkout differs from its commit.
    """

    pipeline: str
    version: str
    version_id: str
    new: bool
    dirty: bool


def form_defaults(root: Path, *, profile: str = "", data_remote: str = "") -> dict[str, str]:
    """The checkout's snapshot and where a cluster reads it: what the form offers, so that Start works untouched.

    Args:
        root: The checkout; its default remote is taken where that is S3 or on the hub.
        profile: A profile's name or path; its ``data_remote`` is taken otherwise.
        data_remote: Wins over both.

    Raises:
        PipelineError: The remote is a folder of this machine, or of a kind that the steps cannot read.
        SnapshotError: The checkout does not say which snapshot it is, or names no remote.
    """
    settings = load_profile(profile, root=root) if profile else None
    own = "" if data_remote else read_default_remote(root)
    told = data_remote or (settings.data_remote if settings and not is_remote_address(own) else "")
    remote = told or own
    claims = [volume.path for volume in settings.volumes if volume.claim] if settings else []
    on_claim = bool(told) and any(Path(remote).is_relative_to(path) for path in claims)
    if not (on_claim or is_remote_address(remote)):
        place = "--data-remote" if data_remote else "data_remote" if told else "the checkout's default DVC remote"
        kind = "which steps cannot read" if "://" in remote or remote.startswith("hub:") else "a folder of this machine"
        raise PipelineError(
            f'{place} is "{remote}", {kind}',
            "what the pods of a cluster can read: s3://BUCKET/PREFIX, hub:OWNER/NAME@COMMIT, or a folder on a claim of "
            "the profile",
            "Push the snapshot to S3 (dvc remote add --default s3 s3://BUCKET/dvc, then dvc push); or, where it is "
            "there or on the hub, give --data-remote s3://BUCKET/dvc or hub:OWNER/NAME@COMMIT, or data_remote in the "
            "profile.",
        )
    return {"data_md5": read_dvc_file(root / "data.dvc").md5, "data_remote": remote}


def upload_pipeline(
    endpoint: Endpoint,
    name: str,
    *,
    image: str,
    profile: str = "",
    root: Path = Path(),
    defaults: Mapping[str, str] | None = None,
) -> Uploaded:
    """Compile a pipeline and add it to the endpoint as a version; do nothing when that version is there.

    Args:
        endpoint: Where to.
        name: Pipeline name.
        image: ``REF@sha256:...``.
        profile: A profile's name or path; empty for none.
        root: The checkout.
        defaults: From ``form_defaults``.

    Raises:
        PipelineError: An image without a digest, no such pipeline or profile, or a version of that name with other
            contents.
        EndpointError: The endpoint refuses or does not answer.
    """
    digest = image_digest(image)
    settings = load_profile(profile, root=root) if profile else None
    with tempfile.TemporaryDirectory() as folder:
        commit, dirty = code_state(root)
        file = compile_pipeline(
            name,
            Path(folder) / f"{name}.yaml",
            root=root,
            image=image,
            profile=settings,
            defaults=defaults,
            commit=named_commit(commit, dirty),
        )
        _check_sizes(file)
        content = hash_file(file)[:16]
        version = version_name(commit or "nogit", digest, changed=content if dirty else "")
        pipeline_id = _pipeline_id(endpoint, name)
        mark = f"sha256 {content}"
        description = f"image {image}; profile {profile or 'none'}; commit {commit or 'none'}; {mark}"

        def look() -> models.V2beta1PipelineVersion | None:
            return endpoint.version(pipeline_id, version)

        def make() -> models.V2beta1PipelineVersion:
            return endpoint.uploads.upload_pipeline_version(
                str(file), name=version, pipelineid=pipeline_id, description=description
            )

        found, new = endpoint.create(look, make, unique=True)
        if not new and found.description and "sha256 " in found.description and mark not in found.description:
            raise PipelineError(
                f'version "{version}" of {name} is there with other contents ({found.description})',
                "one version for one commit, image, profile and data remote",
                "Commit the change (a profile is part of the commit), or delete that version on the endpoint.",
            )
    return Uploaded(name, version, found.pipeline_version_id, new, bool(dirty))


def _check_sizes(file: Path) -> None:
    """Refuse what could not run with one of the recipes that the form offers."""
    documents = read_documents(file)
    form = documents[0].get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    for recipe in form.get("recipe", {}).get("literals", [None]):
        check_size(documents, {"recipe": recipe} if recipe else {})


def _pipeline_id(endpoint: Endpoint, name: str) -> str:
    scope = {"namespace": endpoint.settings.namespace} if endpoint.settings.namespace else {}

    def make() -> models.V2beta1Pipeline:
        # ``name`` becomes a Kubernetes name where the endpoint keeps pipelines in Kubernetes.
        body = models.V2beta1Pipeline(
            display_name=name, name=name.replace("_", "-"), description=f"ManyEyes: {name}", **scope
        )
        return endpoint.pipelines.pipeline_service_create_pipeline(pipeline=body)

    found, _ = endpoint.create(lambda: endpoint.pipeline(name), make, unique=True)
    return str(found.pipeline_id)


def version_name(commit: str, digest: str, *, changed: str = "") -> str:
    """``<package version>-<git commit>-<image digest, first 12>``.

    Args:
        commit: Commit of the checkout, or "nogit".
        digest: Hexadecimal digits of the image's digest.
        changed: Where the checkout differs from the commit: digest of what is uploaded, so that two different changes
            never share a name.
    """
    code = f"{commit[:12]}-dirty-{changed[:8]}" if changed else commit[:12]
    return f"{__version__}-{code}-{digest[:12]}"


def code_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout, and whether what makes a pipeline differs from it; None, None outside git."""
    return git_state(root, *_SOURCES)


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
    check_run(version, parameters)
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
            f'schedule "{name}" is there and does something else ({schedule_in_words(found)})',
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


def schedule_in_words(schedule: models.V2beta1RecurringRun) -> str:
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
