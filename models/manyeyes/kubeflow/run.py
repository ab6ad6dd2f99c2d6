"""``manyeyes run``: a compiled pipeline on this machine, with one line a step and a summary at the end.

Its options become the parameters of the compiled pipeline here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from manyeyes.errors import LockedError, PipelineError, did_you_mean
from manyeyes.harness.events import ErrorReport, Event, EventReader, RunSummary, write_summary
from manyeyes.harness.inputs import locate_data
from manyeyes.kubeflow.pipeline import GIT_COMMIT, REQUEST_FILE, RunRequest
from manyeyes.kubeflow.summarise import summarise
from manyeyes.recipe import load_recipe, parse_overrides, write_recipe_text
from manyeyes.storage import file_lock
from manyeyes.telemetry import OFF
from manyeyes.terminal import UTF8_CHILD, replace_unknown_characters

# Without a terminal, a running step says how far it is so often.
_LOG_INTERVAL_S = 30.0

_COLOURS = {"done": "green", "cached": "cyan", "failed": "red", "running": "yellow", "stopped": "magenta"}


@dataclass
class _Line:
    state: str
    began: float
    elapsed: float | None = None
    headline: str = ""
    eta_s: float | None = None
    logged: float = 0.0


class ProgressView:
    """Shows the steps of a run.

    Args:
        console: Where; decides by itself whether it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines: dict[str, _Line] = {}
        self._live: Live | None = None

    def begin(self, run_dir: Path | None = None) -> None:
        """Start showing the run in ``run_dir``, or steps that no pipeline runs."""
        replace_unknown_characters()
        if run_dir is not None:
            self.console.print(f"run {run_dir.name}, log: {_short(run_dir / 'pipeline.log')}", highlight=False)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._table)
            self._live.start()

    def update(self, events: list[Event]) -> None:
        """Take in new events."""
        for event in events:
            self._take(event)
        if self._live is None:
            now = time.time()
            for step, line in self._lines.items():
                if line.state == "running" and now - max(line.logged, line.began) >= _LOG_INTERVAL_S:
                    line.logged = now
                    self._log(step, line)

    def interrupt(self) -> None:
        """Show what runs as stopped; its end is no failure."""
        for step, line in self._lines.items():
            if line.state == "running":
                line.state, line.elapsed, line.eta_s = "stopped", time.time() - line.began, None
                if self._live is None:
                    self._log(step, line)

    def say(self, text: str) -> None:
        """Show a line of text."""
        self.console.print(text, highlight=False, markup=False)

    def end(self) -> None:
        """Stop showing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _take(self, event: Event) -> None:
        line = self._lines.get(event.step)
        if line is None and event.kind == "broken":
            # A process that was killed could not say its encoder's name; the task has the step's.
            line = next((row for name, row in self._lines.items() if _is_running(name, row, event.step)), None)
        if line is None:
            if event.kind in ("completed", "broken"):
                return
            line = self._lines[event.step] = _Line("running", event.time)
        if event.kind == "started":
            line.state, line.began, line.elapsed = "running", event.time, None
            return
        if event.kind == "progress":
            if event.done is not None or event.eta_s is not None:
                line.headline, line.eta_s = event.figure, event.eta_s
            return
        if event.kind in ("finished", "cached"):
            line.state = "done" if event.kind == "finished" else "cached"
            line.elapsed = event.time - line.began
            line.headline, line.eta_s = event.figure, None
        elif event.kind in ("failed", "broken"):
            if line.state in ("failed", "stopped"):
                return
            line.state, line.elapsed, line.eta_s = "failed", event.time - line.began, None
            line.headline = event.error.error if event.error else line.headline
        else:
            return
        if self._live is None:
            self._log(next(name for name, row in self._lines.items() if row is line), line)

    def _log(self, step: str, line: _Line) -> None:
        text = f"{step:<32} {line.state:<8} {_clock(self._elapsed(line)):>6}  {self._headline(line)}".rstrip()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for step, line in self._lines.items():
            colour = _COLOURS[line.state]
            state = f"[{colour}]{line.state}[/{colour}]"
            table.add_row(step.replace("[", r"\["), state, _clock(self._elapsed(line)), self._headline(line))
        return table

    @staticmethod
    def _elapsed(line: _Line) -> float:
        return time.time() - line.began if line.elapsed is None else line.elapsed

    @staticmethod
    def _headline(line: _Line) -> str:
        return f"{line.headline}, {_clock(line.eta_s)} left" if line.eta_s is not None else line.headline


def _is_running(name: str, line: _Line, step: str) -> bool:
    return line.state == "running" and name.partition("[")[0] == step


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


_POLL_S = 0.2
# What a pod has to end, too; it is said what a wait of some seconds is for.
_GRACE_S, _QUIET_S = 30.0, 2.0
# Telemetry of other people's packages, and thread pools that fork badly.
_QUIET = {
    **OFF,
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class RunOptions:
    """How a run is started.

    Args:
        pipeline: Path of the compiled YAML.
        name: Pipeline name.
        arguments: Pipeline parameters.
        root: The checkout; runs go to ``<root>/runs``.
        use_cache: False: every step runs.
        tracked: Whether an MLflow run is made around the steps.
    """

    pipeline: Path
    name: str
    arguments: dict[str, Any]
    root: Path = field(default_factory=Path)
    use_cache: bool = True
    tracked: bool = True


def find_pipeline(name_or_path: str, *, root: Path) -> Path:
    """The compiled YAML of a pipeline, by name or path.

    Raises:
        PipelineError: There is none.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise PipelineError(f'pipeline file is "{name_or_path}"', "no such file", "Check the path.")
        return path
    folder = root / "pipelines" / "compiled"
    if not folder.is_dir():
        raise PipelineError(
            f"{root.resolve()} has no pipelines/compiled",
            "a checkout of ManyEyes",
            "Change to the checkout, or name a compiled YAML file.",
        )
    path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise PipelineError(
            f'pipeline is "{name_or_path}"',
            f"one of {', '.join(names) or 'none compiled yet'}",
            f"{did_you_mean(name_or_path, names)}Compile them with: manyeyes pipeline compile",
        )
    return path


def run_pipeline(options: RunOptions, *, view: ProgressView) -> RunSummary:
    """Run a compiled pipeline to its end, whatever the end is.

    Args:
        options: What to run and where.
        view: Shows the progress.

    Returns:
        The summary, which also lies in ``runs/<run-id>/summary.json``. ``error`` says why a run failed.

    Raises:
        LockedError: Another run goes on in this checkout.
    """
    began = time.time()
    runs = (options.root / "runs").resolve()
    runs.mkdir(parents=True, exist_ok=True)
    with _checkout_lock(runs):
        run_dir = _make_run_dir(runs, options.name, began)
        commit, dirty = git_state(options.root)
        request = RunRequest(
            pipeline=str(options.pipeline.resolve()),
            name=options.name,
            arguments=options.arguments,
            cache_dir=str(runs / "kfp-cache"),
            use_cache=options.use_cache,
            tracked=options.tracked,
            tags={"manyeyes.run_id": run_dir.name, "manyeyes.git_commit": named_commit(commit, dirty) or "none"},
        )
        (run_dir / REQUEST_FILE).write_text(request.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _point_latest(runs, run_dir)
        view.begin(run_dir)
        status, events, code = _run_child(run_dir, root=options.root, commit=named_commit(commit, dirty), view=view)
        view.end()
        error = _find_error(events, run_dir, code) if status == "failed" else None
        summary = summarise(
            events,
            run_dir=run_dir,
            pipeline=options.name,
            status=status,
            started=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
            git_commit=commit,
            git_dirty=dirty,
            error=error,
            wall_s=time.time() - began,
        )
        write_summary(summary, run_dir)
    return summary


def _run_child(
    run_dir: Path, *, root: Path, commit: str, view: ProgressView
) -> tuple[Literal["succeeded", "failed", "interrupted"], list[Event], int]:
    lock = run_dir / ".lock"
    events: list[Event] = []
    reader = EventReader(run_dir)
    environment = {
        **os.environ,
        **{name: os.environ.get(name, value) for name, value in _QUIET.items()},
        # kfp reads the steps' output, and other packages their files, in the encoding of the locale.
        **UTF8_CHILD,
        "MANYEYES_RUN_DIR": str(run_dir),
        "MANYEYES_RUN_LOCK": str(lock),
        GIT_COMMIT: commit,
    }

    def drain() -> None:
        new = reader.read_new()
        events.extend(new)
        view.update(new)

    # Held as long as this process lives: the steps end when the kernel frees it.
    with file_lock(lock), (run_dir / "pipeline.log").open("ab") as log, _signals_noted() as signals:
        # A process group of its own: Ctrl-C reaches this process alone, which then ends the steps in order.
        child = subprocess.Popen(
            [sys.executable, "-m", "manyeyes.kubeflow.pipeline", str(run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=environment,
            start_new_session=True,
        )
        try:
            while child.poll() is None and not signals:
                drain()
                time.sleep(_POLL_S)
            if signals:
                drain()
                view.interrupt()
        finally:
            _end_group(child, signals, view=view, grace_s=_GRACE_S if child.poll() is None else 0.0)
        drain()
    if signals:
        return "interrupted", events, 128 + signals[0]
    return ("succeeded" if child.returncode == 0 else "failed"), events, child.returncode


def _end_group(child: subprocess.Popen[bytes], signals: list[int], *, view: ProgressView, grace_s: float) -> None:
    """End the child and whatever it started; nothing outlives a run. A stage saves the step that it is at first."""
    begun, told = time.monotonic(), False
    try:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
        # The steps outlive the child by what they still write.
        while time.monotonic() < begun + grace_s and len(signals) < 2:
            child.poll()
            os.killpg(child.pid, 0)
            if not told and time.monotonic() > begun + _QUIET_S:
                view.say("what is trained is saved first; Ctrl-C again ends it at once")
                told = True
            time.sleep(_POLL_S)
    except ProcessLookupError:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying from them; restore the handlers after."""
    seen: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _find_error(events: list[Event], run_dir: Path, code: int) -> ErrorReport:
    for event in events:
        if event.kind == "failed" and event.error is not None:
            return event.error
    ended = {event.step for event in events if event.kind in ("finished", "failed")}
    unfinished = [event.step for event in events if event.kind == "started" and event.step not in ended]
    step = unfinished[0] if unfinished else "the pipeline's process"
    return ErrorReport(
        step=step,
        error="ProcessDied",
        found=f"{step} ended without saying why (exit code {code} of the pipeline's process)",
        needed="a process that ends by itself; the kernel kills one that takes too much memory",
        do=f"Read the end of {run_dir / 'pipeline.log'} and of dmesg, then run the same command again.",
        retry=True,
        user_error=False,
    )


def _checkout_lock(runs: Path) -> AbstractContextManager[None]:
    def taken(owner: str) -> LockedError:
        return LockedError(
            f"another run, process {owner}, works in {runs.parent}",
            "one run at a time in a checkout",
            f"Wait for it, end it with: kill {owner}, or use another checkout.",
        )

    return file_lock(runs / ".lock", taken=taken)


def _make_run_dir(runs: Path, name: str, began: float) -> Path:
    stem = f"{datetime.fromtimestamp(began, UTC):%Y%m%d-%H%M%S}-{name}"
    for number in range(1, 1000):
        path = runs / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise PipelineError(f"a thousand runs called {stem}", "a free name", "Clear runs/.")


def _point_latest(runs: Path, run_dir: Path) -> None:
    temporary = runs / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run_dir.name)
    temporary.replace(runs / "latest")


def git_state(root: Path, *paths: str) -> tuple[str | None, bool | None]:
    """Commit of the checkout and whether it differs from it; None, None outside git or without git.

    Args:
        root: The checkout.
        paths: Changes of these alone count; all by default.
    """
    git = shutil.which("git")
    if git is None:
        return None, None
    command = [git, "-C", str(root)]
    head = subprocess.run(
        [*command, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if head.returncode != 0:
        return None, None
    status = [*command, "status", "--porcelain", "--", *paths]
    changes = subprocess.run(status, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return head.stdout.strip(), bool(changes.stdout.strip())


def named_commit(commit: str | None, dirty: bool | None) -> str:
    """The commit as a registered version names it: with ``-dirty`` where the checkout differs; empty outside git."""
    return f"{commit}{'-dirty' if dirty else ''}" if commit else ""


# libyaml's loader reads the large file of a search in a tenth of the time; not every build of PyYAML has it.
_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def read_form(path: Path) -> dict[str, Any]:
    """The form of a compiled pipeline: parameter name -> its definition.

    Raises:
        PipelineError: Not a compiled pipeline.
    """
    try:
        spec = next(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader), None)
    except yaml.YAMLError:
        spec = None
    if not isinstance(spec, dict) or "root" not in spec:
        raise PipelineError(f"{path} is no compiled pipeline", "what kfp compiles", "Run: manyeyes pipeline compile")
    found: dict[str, Any] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return found


def local_parameters(
    path: Path,
    *,
    recipe: str,
    assignments: Sequence[str],
    data_md5: str,
    data_remote: str,
    registry_model: str,
    given: Sequence[str],
) -> dict[str, Any]:
    """What a pipeline is run with on this machine; wrong input is refused here, before anything starts.

    Args:
        path: The compiled pipeline.
        recipe: A recipe's name or the path of a YAML file, which travels as text.
        assignments: ``a.b=c`` each.
        data_md5: Snapshot; empty: the checkout's own.
        data_remote: Where it is; empty: the checkout's own.
        registry_model: Name in the registry; empty: the recipe's own.
        given: ``name=value`` each, for the pipeline's other parameters.

    Raises:
        PipelineError: Not a compiled pipeline, or a parameter that it has not, of another type, or missing.
        RecipeError: A recipe that is wrong.
        SnapshotError: Neither an option nor the checkout says which snapshot.
    """
    from manyeyes.kubeflow.endpoint_runs import run_parameters

    # preflight checks it again, for those who start a pipeline elsewhere.
    checked = load_recipe(recipe, overrides=parse_overrides(list(assignments)))
    form = read_form(path)
    values: dict[str, Any] = {}
    if "recipe" in form:
        is_file = recipe.endswith((".yaml", ".yml"))
        values["recipe_text" if is_file else "recipe"] = write_recipe_text(checked) if is_file else recipe
        values["recipe_overrides"] = "" if is_file else "\n".join(assignments)
    elif assignments:
        raise PipelineError("--set was given", "a pipeline that takes a recipe", "Leave it out.")
    if "data_md5" in form:
        values["data_md5"], values["data_remote"] = locate_data(data_md5, data_remote)
    if registry_model and "registry_model" in form:
        values["registry_model"] = registry_model
    elif registry_model:
        raise PipelineError("--registry-model was given", "a pipeline that takes registry_model", "Leave it out.")
    rest = {
        name: {**definition, "isOptional": True} if name in values else definition for name, definition in form.items()
    }
    return values | run_parameters(rest, given=given)
