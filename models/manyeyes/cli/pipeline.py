"""``manyeyes pipeline ...``: compile, and what a Kubeflow endpoint is asked to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manyeyes.cli.group import CommandGroup, OutPath
from manyeyes.errors import INTERRUPTED, OTHER_ERROR, USER_ERROR, PipelineError, did_you_mean

if TYPE_CHECKING:
    from manyeyes.kubeflow.endpoint import Endpoint
    from manyeyes.kubeflow.run_status import Failure, RunStatus

COMPILED = Path("pipelines/compiled")
# For what names an image or a profile: the committed files name neither.
COMPILED_FOR_CLUSTER = Path("runs/compiled")

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=CommandGroup)
def pipeline() -> None:
    """Compile pipelines; upload, run and schedule them on a Kubeflow endpoint.

    KFP_ENDPOINT says where the endpoint is; KFP_TOKEN_FILE, KFP_TOKEN or KFP_COOKIE sign in; KFP_NAMESPACE is the
    user's namespace in Kubeflow of several users.
    """


def _endpoint_options(command: F) -> F:
    return click.option("--endpoint", "url", default="", metavar="URL", help="KFP_ENDPOINT by default.")(command)


def _recipe_options(command: F) -> F:
    command = click.option(
        "--recipe", default="", metavar="NAME|FILE", help="A shipped recipe, or your own YAML file."
    )(command)
    command = click.option(
        "--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field of the recipe."
    )(command)
    return click.option("--param", "given", multiple=True, metavar="NAME=VALUE", help="A pipeline parameter.")(command)


def _connect(url: str) -> Endpoint:
    from manyeyes.kubeflow.endpoint import Endpoint, EndpointSettings

    return Endpoint(EndpointSettings.from_environment(url))


@pipeline.command("compile")
@click.argument("names", nargs=-1)
@click.option("--image", default="", metavar="REF@sha256:...", help="What the steps run in.")
@click.option("--profile", default="", help="A profile of infra/profiles, or the path of one.")
@click.option(
    "--out",
    type=OutPath(),
    default=None,
    help=f"Folder; {COMPILED} by default, {COMPILED_FOR_CLUSTER} with an image or a profile.",
)
def compile_command(names: Sequence[str], image: str, profile: str, out: Path | None) -> None:
    """Write NAME.yaml of each pipeline; all pipelines by default."""
    from manyeyes.kubeflow.pipeline import PIPELINES, compile_pipeline
    from manyeyes.kubeflow.profiles import load_profile

    settings = load_profile(profile) if profile else None
    folder = out or (COMPILED_FOR_CLUSTER if image or profile else COMPILED)
    for name in names or PIPELINES:
        click.echo(str(compile_pipeline(name, folder / f"{name}.yaml", image=image, profile=settings)))


@pipeline.command("upload")
@click.argument("names", nargs=-1)
@click.option("--image", default="", metavar="REF@sha256:...", help="What the steps run in.")
@click.option("--profile", default="", help="A profile of infra/profiles, or the path of one.")
@click.option(
    "--data-remote",
    default="",
    metavar="s3://BUCKET/PREFIX|hub:OWNER/NAME@COMMIT",
    help="Where pods read the snapshot; the profile's data_remote or the checkout's default remote by default.",
)
@_endpoint_options
def upload_command(names: Sequence[str], image: str, profile: str, data_remote: str, url: str) -> None:
    """Add a version of each pipeline NAME to the endpoint; all pipelines by default.

    A version is named <package version>-<git commit>-<image digest, first 12>; one that is there is left alone. The
    form offers the snapshot that data.dvc names and its remote, so that Start works untouched.
    """
    from manyeyes.kubeflow.pipeline import PIPELINES, image_digest
    from manyeyes.kubeflow.run import read_form
    from manyeyes.kubeflow.uploading import form_defaults, upload_pipeline

    image_digest(image)
    for name in names:
        if name not in PIPELINES:
            raise PipelineError(
                f'pipeline is "{name}"', f"one of {', '.join(PIPELINES)}", did_you_mean(name, PIPELINES)
            )
    chosen = names or list(PIPELINES)
    defaults = {}
    if any("data_md5" in read_form(COMPILED / f"{name}.yaml") for name in chosen):
        defaults = form_defaults(Path(), profile=profile, data_remote=data_remote)
        click.echo(f"the form offers snapshot {defaults['data_md5']} in {defaults['data_remote']}")
    elif data_remote:
        raise PipelineError("--data-remote was given", "a pipeline that takes data_remote", "Leave it out.")
    with _connect(url) as endpoint:
        for name in chosen:
            done = upload_pipeline(endpoint, name, image=image, profile=profile, defaults=defaults)
            if done.dirty:
                click.echo("warning: the checkout differs from its commit; the version's name says so", err=True)
            click.echo(f"{done.pipeline}  {done.version}  {'uploaded' if done.new else 'was there already'}")


@pipeline.command("run")
@click.argument("name")
@_recipe_options
@click.option("--version", default="", help="Name of a version; the newest by default.")
@click.option("--name", "run_name", default="", help="Name of the run; one of that name is not started twice.")
@click.option("--experiment", default="manyeyes", show_default=True, help="Kubeflow experiment to list it under.")
@click.option("--service-account", default="", help="Kubernetes account of the pods; the endpoint's default.")
@click.option("--follow", is_flag=True, help="Show each task's state until the run ends.")
@click.option("--poll", "poll_s", default=5.0, show_default=True, help="Seconds between two looks.")
@_endpoint_options
def run_command(
    name: str,
    given: Sequence[str],
    assignments: Sequence[str],
    recipe: str,
    version: str,
    run_name: str,
    experiment: str,
    service_account: str,
    follow: bool,
    poll_s: float,
    url: str,
) -> None:
    """Start pipeline NAME on the endpoint.

    With --follow the exit code is 0 for a run that succeeded, 2 for an error that you can fix, else 1.
    """
    from manyeyes.kubeflow.endpoint_runs import find_pipeline_version, pipeline_parameters, run_parameters, start_run

    with _connect(url) as endpoint:
        chosen = find_pipeline_version(endpoint, name, version)
        parameters = run_parameters(pipeline_parameters(chosen), given=given, assignments=assignments, recipe=recipe)
        started, new = start_run(
            endpoint,
            chosen,
            pipeline=name,
            parameters=parameters,
            name=run_name,
            experiment=experiment,
            service_account=service_account,
        )
        click.echo(f"{started.display_name}  {started.run_id}  {'started' if new else 'was there already'}")
        if endpoint.settings.ui:
            click.echo(f"{endpoint.settings.ui}/#/runs/details/{started.run_id}")
        if follow:
            _follow(endpoint, started.run_id, poll_s=poll_s)
        else:
            click.echo(f"follow it with: manyeyes pipeline status {started.run_id} --follow")


@pipeline.command("status")
@click.argument("run", default="")
@click.option("--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--poll", "poll_s", default=5.0, show_default=True, help="Seconds between two looks.")
@click.option(
    "--html", "page", type=OutPath(file=True), default=None, help="Write a page with a timeline of the steps."
)
@_endpoint_options
def status_command(run: str, follow: bool, poll_s: float, page: Path | None, url: str) -> None:
    """The steps of RUN (a name or an id), and why it waits or failed; without RUN, the newest runs."""
    from manyeyes.kubeflow.endpoint_runs import find_run
    from manyeyes.kubeflow.run_status import read_status

    with _connect(url) as endpoint:
        if not run:
            _list_runs(endpoint)
            return
        found = find_run(endpoint, run)
        if follow:
            _follow(endpoint, found.run_id, poll_s=poll_s, page=page)
            return
        status = read_status(endpoint, found)
        click.echo(f"{found.display_name}  {found.run_id}  {status.state.lower()}")
        _show_steps(status)
        failures = _show_failures(endpoint, status)
        if page is not None:
            _write_page(page, endpoint, status, failures)


@pipeline.command("retry")
@click.argument("run")
@click.option("--follow", is_flag=True, help="Show each step's state until the run ends.")
@click.option("--poll", "poll_s", default=5.0, show_default=True, help="Seconds between two looks.")
@_endpoint_options
def retry_command(run: str, follow: bool, poll_s: float, url: str) -> None:
    """Go on with RUN (a name or an id) where it failed: what went well stays, the rest runs.

    It keeps its version and its parameters: for what failed outside of these, such as an evicted pod or a secret.
    """
    from manyeyes.kubeflow.endpoint_runs import find_run, retry_run

    with _connect(url) as endpoint:
        found = find_run(endpoint, run)
        retry_run(endpoint, found)
        click.echo(f"{found.display_name}  {found.run_id}  goes on")
        if follow:
            _follow(endpoint, found.run_id, poll_s=poll_s)
        else:
            click.echo(f"follow it with: manyeyes pipeline status {found.run_id} --follow")


def _show_steps(status: RunStatus) -> None:
    from manyeyes.kubeflow.run_status import words_of

    width = max([28, *(len(step.name) for step in status.steps)])
    for step in status.steps:
        click.echo(f"  {step.name:<{width}} {words_of(step)}")
        if step.state == "waiting" and step.reason is not None and step.reason.do:
            click.echo(f"  {'':<{width}} {step.reason.do}")


def _write_page(page: Path, endpoint: Endpoint, status: RunStatus, failures: Sequence[Failure]) -> None:
    from manyeyes.kubeflow.run_status import render_status
    from manyeyes.storage import write_file

    write_file(page, render_status(status, failures, ui=endpoint.settings.ui))
    click.echo(str(page))


def _list_runs(endpoint: Endpoint) -> None:
    from manyeyes.kubeflow.endpoint_runs import list_runs, state_of

    runs = list_runs(endpoint)
    if not runs:
        click.echo("no runs yet; start one with: manyeyes pipeline run train")
    for run in runs:
        created = f"{run.created_at:%Y-%m-%d %H:%M}" if run.created_at else ""
        click.echo(f"{run.run_id}  {state_of(run).lower():<10} {created}  {run.display_name}")


def _follow(endpoint: Endpoint, run_id: str, *, poll_s: float, page: Path | None = None) -> None:
    from manyeyes.kubeflow.run_status import follow_run

    again = f"the run goes on; follow it with: manyeyes pipeline status {run_id} --follow"
    try:
        status = follow_run(endpoint, run_id, say=click.echo, poll_s=poll_s)
    except KeyboardInterrupt:
        click.echo(f"\n{again}", err=True)
        sys.exit(INTERRUPTED)
    except PipelineError:
        click.echo(again, err=True)
        raise
    unstarted = [step.name for step in status.steps if step.state == "not started"]
    if unstarted:
        click.echo(f"not started: {', '.join(unstarted)}")
    failures = _show_failures(endpoint, status)
    if page is not None:
        _write_page(page, endpoint, status, failures)
    if status.state == "SUCCEEDED":
        return
    if status.state != "FAILED":
        click.echo(f"run {status.run.display_name} was {status.state.lower()}", err=True)
        sys.exit(OTHER_ERROR)
    sys.exit(USER_ERROR if all(failure.report.user_error for failure in failures) else OTHER_ERROR)


def _show_failures(endpoint: Endpoint, status: RunStatus) -> list[Failure]:
    """Print why a run, or a step of one that goes on, failed."""
    from manyeyes.kubeflow.run_status import RETRIES_OFF, failures_of

    failures = failures_of(endpoint, status)
    for failure in failures:
        tried = f" (attempt {failure.attempts})" if failure.attempts > 1 else ""
        click.echo(f"{failure.name}: {failure.report.error}{tried}", err=True)
        for field in ("found", "needed", "do"):
            click.echo(f"  {field:<7} {getattr(failure.report, field)}", err=True)
        if failure.log:
            click.echo("  its log ends with", err=True)
        for line in failure.log:
            click.echo(f"    {line}", err=True)
    if status.state == "FAILED" and any(failure.report.retry for failure in failures):
        click.echo(f"go on where it failed: manyeyes pipeline retry {status.run.run_id}", err=True)
        if status.retries_off:
            click.echo(RETRIES_OFF, err=True)
    return failures


# --- recurring runs ------------------------------------------------------------------------------------------------


@pipeline.group("schedule", cls=CommandGroup)
def schedule() -> None:
    """Runs that start by themselves."""


@schedule.command("create")
@click.argument("name")
@click.option(
    "--cron", default="", metavar='"M H D M W"', help="When: five cron fields, or six with seconds first; UTC."
)
@click.option("--every", default="", metavar="6h", help="Or how often: a number and m, h, d or w.")
@_recipe_options
@click.option("--version", default="", help="Name of a version; the newest of today by default.")
@click.option("--name", "schedule_name", default="", help="Name of the schedule; the pipeline's by default.")
@click.option("--max-concurrency", default=1, show_default=True, type=click.IntRange(1, 10), help="Runs at one time.")
@click.option("--catch-up", is_flag=True, help="Make up for starts that were missed.")
@click.option("--experiment", default="manyeyes", show_default=True, help="Kubeflow experiment to list runs under.")
@click.option("--service-account", default="", help="Kubernetes account of the pods; the endpoint's default.")
@_endpoint_options
def schedule_create(
    name: str,
    cron: str,
    every: str,
    given: Sequence[str],
    assignments: Sequence[str],
    recipe: str,
    version: str,
    schedule_name: str,
    max_concurrency: int,
    catch_up: bool,
    experiment: str,
    service_account: str,
    url: str,
) -> None:
    """Run pipeline NAME again and again, always the same version."""
    from manyeyes.kubeflow.endpoint_runs import find_pipeline_version, pipeline_parameters, run_parameters
    from manyeyes.kubeflow.uploading import create_schedule, make_trigger, schedule_in_words

    trigger = make_trigger(cron=cron, every=every)
    with _connect(url) as endpoint:
        chosen = find_pipeline_version(endpoint, name, version)
        found, new = create_schedule(
            endpoint,
            chosen,
            name=schedule_name or name,
            trigger=trigger,
            parameters=run_parameters(pipeline_parameters(chosen), given=given, assignments=assignments, recipe=recipe),
            max_concurrency=max_concurrency,
            catch_up=catch_up,
            experiment=experiment,
            service_account=service_account,
        )
        click.echo(f"{found.display_name}  {schedule_in_words(found)}  {'created' if new else 'was there already'}")


@schedule.command("list")
@_endpoint_options
def schedule_list(url: str) -> None:
    """Names, when they run, and whether they are on."""
    from manyeyes.kubeflow.uploading import list_schedules, schedule_in_words

    with _connect(url) as endpoint:
        for found in list_schedules(endpoint):
            click.echo(f"{found.display_name:<28} {schedule_in_words(found)}")


@schedule.command("disable")
@click.argument("name")
@_endpoint_options
def schedule_disable(name: str, url: str) -> None:
    """Keep schedule NAME, but start no more runs."""
    from manyeyes.kubeflow.uploading import find_schedule

    with _connect(url) as endpoint:
        found = find_schedule(endpoint, name)
        endpoint.schedules.recurring_run_service_disable_recurring_run(found.recurring_run_id)
        click.echo(f"{name}  off")


@schedule.command("enable")
@click.argument("name")
@_endpoint_options
def schedule_enable(name: str, url: str) -> None:
    """Switch schedule NAME on again."""
    from manyeyes.kubeflow.uploading import find_schedule

    with _connect(url) as endpoint:
        found = find_schedule(endpoint, name)
        endpoint.schedules.recurring_run_service_enable_recurring_run(found.recurring_run_id)
        click.echo(f"{name}  on")


@schedule.command("delete")
@click.argument("name")
@_endpoint_options
def schedule_delete(name: str, url: str) -> None:
    """Remove schedule NAME; its runs stay."""
    from manyeyes.kubeflow.uploading import delete_schedule

    with _connect(url) as endpoint:
        delete_schedule(endpoint, name)
        click.echo(f"{name}  deleted")
