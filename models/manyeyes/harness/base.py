"""What all steps share: timing, progress, errors and threads.

A step is a pure function with plain values and paths in and a ``StepResult`` out. ``run_step`` calls it the same way
from a Kubeflow component, from ``manyeyes run`` and from ``manyeyes step``.

Retries happen in the step's own pod. Kubeflow's API has a count and pauses (``set_retry``) but no policy
(https://github.com/kubeflow/pipelines/issues/13386), and the settings that Kubeflow ships for its workflow controller
turn what it compiles into "on an error of the machinery": a step that fails is not tried again. So a step that fails
with what may be gone by the next time (a network, a storage, a lost process, a defect; never what only the user can
fix) pauses and starts itself anew, in a fresh process.

Where the controller does retry failed pods, a further pod makes one attempt alone. A step that fails with an error that
only the user can fix leaves a note beside the running checkpoints, and a further pod of the same task ends at once with
the same error, before anything is imported or fetched. Attempts at one task share the addresses of its outputs, which
nothing else has.

A step also ends with the runner that started it.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from manyeyes.errors import INTERRUPTED, OTHER_ERROR, USER_ERROR, ManyEyesError, PreflightError, StorageError
from manyeyes.harness.events import (
    ERROR_TAG,
    ErrorReport,
    Problem,
    emit,
    error_as_tag,
    error_line,
    pipeline_tags,
    result_tags,
)
from manyeyes.pages import markdown_table, step_page
from manyeyes.storage import wait_for_release, write_file
from manyeyes.terminal import replace_unknown_characters

# Seconds before the second attempt, the third, and so on: "60,120". A profile with retries sets it.
RETRIES = "MANYEYES_RETRIES"
# How often this process has started itself anew.
_ATTEMPT = "MANYEYES_ATTEMPT"
# Kubeflow's launcher has it where the controller makes another pod for a task.
_POD_ATTEMPT = "KFP_RETRY_INDEX"


def retry_pauses() -> list[float]:
    """Seconds before each further attempt; empty where none is wanted."""
    return [float(pause) for pause in os.environ.get(RETRIES, "").split(",") if pause]


def _attempt() -> int:
    return int(os.environ.get(_ATTEMPT) or 0)


def _is_further_pod() -> bool:
    return os.environ.get(_POD_ATTEMPT, "") not in ("", "0")


def _start_anew(record: ErrorReport, error: Exception) -> None:
    """Pause and run this very command again, where a further attempt is wanted and may go better; else come back."""
    pauses, attempt = retry_pauses(), _attempt()
    if (record.user_error and not record.retry) or attempt >= len(pauses) or _is_further_pod():
        return
    traceback.print_exception(error)
    sys.stderr.write(
        f"{record.step} failed ({record.found}): attempt {attempt + 2} of {len(pauses) + 1} in {pauses[attempt]:g} s\n"
    )
    time.sleep(pauses[attempt])
    os.environ[_ATTEMPT] = str(attempt + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def attempts_in(log: str) -> int:
    """How often a step was tried in the pod that wrote this log."""
    return max(
        (int(number) for number in re.findall(r": attempt (\d+) of \d+ in [\d.]+ s$", log, re.MULTILINE)), default=1
    )


def _remove_leftovers(paths: Iterable[Path]) -> None:
    """What the attempt before this one left of its outputs."""
    if _attempt():
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def remember_refusal(address: str, report: ErrorReport) -> None:
    """Leave a note for further attempts at the task whose output has this address; do nothing where none will come."""
    note = _note(address)
    if note is None or not report.user_error or report.retry:
        return
    write_file(note, report.model_dump_json(indent=2) + "\n")


def earlier_refusal(address: str) -> ErrorReport | None:
    """What an earlier attempt at the same task failed with, when only the user can fix that."""
    note = _note(address)
    if note is None or not note.is_file():
        return None
    if not _is_further_pod():
        # Somebody retries the run by hand, once they have fixed it.
        note.unlink(missing_ok=True)
        return None
    return ErrorReport.model_validate_json(note.read_text(encoding="utf-8"))


def _note(address: str) -> Path | None:
    workdir = os.environ.get("MANYEYES_WORKDIR")
    if not address or not workdir or not retry_pauses():
        return None
    return Path(workdir) / "refusals" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"


# How long a step may take to end in order, once its runner is gone.
_GRACE_S = 5.0


def die_with_runner(*, exit_code: int) -> None:
    """End this process as soon as the runner that started it is gone, even after kill -9.

    The step's parent is a shell, so the parent's pid says nothing. The runner holds an exclusive lock on the file
    ``MANYEYES_RUN_LOCK`` as long as it lives; the kernel frees it in any case, and the thread that waits for it then
    wakes up.

    Args:
        exit_code: Of a process that does not end in order.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    lock = os.environ.get("MANYEYES_RUN_LOCK")
    if lock:
        end = partial(_end, exit_code)
        threading.Thread(target=wait_for_runner_death, args=(Path(lock), end), daemon=True).start()


def wait_for_runner_death(lock: Path, then: Callable[[], None]) -> None:
    """Block until the process that holds ``lock`` is gone, then call ``then``."""
    wait_for_release(lock)
    then()


def _end(exit_code: int) -> None:
    with suppress(OSError, ValueError):  # whoever read it may be gone, too; this thread must go on
        sys.stderr.write("the runner is gone: this step ends\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(exit_code)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM. As Ctrl-C: MLflow's run of the step then ends as KILLED and not as FAILED."""


def _exit_on_signal(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _TerminatedError


@contextmanager
def _exiting_as_told() -> Iterator[None]:
    """Exit after SIGTERM or Ctrl-C with the code that says so: what runs the step knows that it may go on elsewhere."""
    try:
        yield
    except _TerminatedError:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


# Between two progress events of one step.
_PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True)
class StepResult:
    """What a step function returns.

    Args:
        headline: What matters most, in a few words, for the progress line.
        metrics: Scalars for Kubeflow's and MLflow's tables.
        html: The report for people, a whole page; one with the headline alone when empty.
        markdown: A few lines for Kubeflow's run page.
        values: Output parameters.
        metadata: Written on each output artifact: digests and locations.
    """

    headline: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    html: str = ""
    markdown: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str | int | float] = field(default_factory=dict)


class OutputArtifact(Protocol):
    """What ``run_step`` needs of an output: Kubeflow's artifacts have it, and so has ``LocalArtifact``."""

    path: str
    metadata: dict[str, Any]


@dataclass
class LocalArtifact:
    """An output of a step that no pipeline runs."""

    path: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step as ``run_step`` takes it.

    Args:
        name: Its name, the same as its module's and its component's.
        function: The pure function; its first argument is a ``Reporter``.
        imports: Heavy modules that the function needs. They are loaded, and timed, before the function's own time
            starts, so that a slow import is seen as overhead and not as work.
        outputs: Which of the function's arguments are files or folders that it writes.
        tracked: Whether it gets an MLflow run.
    """

    name: str
    function: Callable[..., StepResult]
    imports: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    tracked: bool = True


class StepLog(Protocol):
    """Where a step's figures are kept; ``manyeyes.registry.tracking.StepRun`` is one."""

    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Record figures, of the whole step or of one optimizer step."""

    def log_artifact(self, path: Path, *, folder: str | None = None) -> None:
        """Keep a file."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""


class Reporter:
    """Tells the run how far a step is, at most once a second.

    Args:
        step: The step's name as shown.
        log: Gets the curves.
    """

    def __init__(self, step: str, log: StepLog | None = None) -> None:
        self.step = step
        self._log = log
        self._last = 0.0

    @property
    def run_id(self) -> str | None:
        """MLflow run of this step, where it has one."""
        return None if self._log is None else self._log.run_id

    def progress(
        self,
        headline: str,
        *,
        done: float | None = None,
        eta_s: float | None = None,
        optimizer_step: int | None = None,
        curves: Mapping[str, float] | None = None,
    ) -> None:
        """Show ``headline`` on the step's line.

        Args:
            headline: A few words, for instance ``loss 0.41, 520 samples/s``.
            done: Share of the work done, 0 to 1.
            eta_s: Seconds still to go.
            optimizer_step: Where ``curves`` stand.
            curves: Figures at that optimizer step, for MLflow.
        """
        now = time.monotonic()
        if now - self._last < _PROGRESS_INTERVAL_S:
            return
        self._last = now
        emit("progress", self.step, figure=headline, done=done, eta_s=eta_s)
        if self._log is not None and curves:
            self._log.log_metrics(curves, step=optimizer_step)

    def curves(self, points: Mapping[int, Mapping[str, float]]) -> None:
        """Figures by where they stand on the x axis, for MLflow.

        Args:
            points: Place on the axis, for instance samples, and the figures there.
        """
        for place, figures in points.items():
            if self._log is not None:
                self._log.log_metrics(figures, step=place)


def run_step(
    step: Step,
    *,
    report: OutputArtifact,
    metrics: OutputArtifact | None = None,
    notes: OutputArtifact | None = None,
    label: str = "",
    outputs: Mapping[str, OutputArtifact] | None = None,
    **arguments: Any,
) -> StepResult:
    """Run a step function and write its reports, or say why it failed.

    Args:
        step: The step.
        report: Gets the HTML report; ``error.json`` is written beside it.
        metrics: Gets the scalars, as metadata and as a small JSON file (kfp.local's cache only hits when every
            output exists on disk). None where nobody compares them: MLflow has them in any case.
        notes: Gets the Markdown report; on failure, the reason. None where the report is enough.
        label: Tells apart two tasks of one step, for instance the encoder's name.
        outputs: Further output artifacts; the function gets their paths under the same names.
        arguments: The function's other arguments.

    Returns:
        What the function returned.

    Raises:
        SystemExit: With code 2 after an error that the user can fix, of which ``error.json`` says which it is; with 143
            after SIGTERM, with 130 after Ctrl-C.
    """
    name = f"{step.name}[{label}]" if label else step.name
    outputs = dict(outputs or {})
    replace_unknown_characters()
    die_with_runner(exit_code=OTHER_ERROR)
    _set_threads()
    emit("started", name)
    _stop_if_refused(report=report, notes=notes)
    with _exiting_as_told(), _explaining_failure(name, report=report, notes=notes):
        import_seconds = _import_all(step.imports)
        with _tracking(step, name) as log:
            paths = {key: Path(artifact.path) for key, artifact in outputs.items()}
            _remove_leftovers(paths.values())
            emit("progress", name, figure="working", import_seconds=import_seconds)
            started = time.perf_counter()
            result = step.function(Reporter(name, log), **arguments, **paths)
            seconds, ended = time.perf_counter() - started, time.time()
            recorded = {**result.metrics, "seconds": round(seconds, 3), "import_seconds": round(import_seconds, 3)}
            _write_text(report, result.html or step_page(name, result.headline, {}))
            if metrics is not None:
                _write_text(metrics, json.dumps(recorded, indent=2, sort_keys=True) + "\n")
                # Kubeflow shows these side by side for several runs: what people compare, not how long it took.
                metrics.metadata.update(result.metrics)
            if notes is not None:
                _write_text(notes, result.markdown or f"**{name}**: {result.headline}\n")
            if log is not None:
                log.log_metrics(recorded)
                log.set_tags(result_tags(result.headline, result.metadata))
                _keep_report(log, report, name)
        report.metadata.update({**result.metadata, "step": name, "figure": result.headline})
        for artifact in outputs.values():
            artifact.metadata.update(_brief(artifact, result.metadata))
    gc.freeze()
    emit("finished", name, figure=result.headline, seconds=seconds, ended=ended, import_seconds=import_seconds)
    return result


def _brief(artifact: OutputArtifact, metadata: Mapping[str, str | int | float]) -> Mapping[str, str | int | float]:
    """What is written on an artifact that further steps take; on the report stands all of it.

    Kubeflow puts it into the inputs of each of them, six copies a step, and a run's status must stay small. So there it
    is nothing, and what Kubeflow itself would write about the store, half a kilobyte, is left out by having something
    under that name (RecordArtifact in backend/src/v2/metadata/client.go of kubeflow/pipelines). Its launcher never
    reads that, and its pages read it for a preview alone.
    """
    return {"store_session_info": ""} if "://" in getattr(artifact, "uri", "") else metadata


def _import_all(modules: Sequence[str]) -> float:
    """Load modules; the seconds that it took.

    The garbage collector finds nothing in half a million objects that live as long as the process: without it the
    imports of a training step take a fifth less, and with them frozen the process ends two seconds sooner.
    """
    started = time.perf_counter()
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.enable()
    gc.freeze()
    return time.perf_counter() - started


def _write_text(artifact: OutputArtifact, text: str) -> None:
    # Not flushed: whoever runs the step reads these once it has ended, and keeps its own copies.
    write_file(Path(artifact.path), text, flush=False)


@contextmanager
def _tracking(step: Step, name: str) -> Iterator[StepLog | None]:
    if not step.tracked:
        yield None
        return
    from manyeyes.registry import tracking

    with tracking.step_run(name, tags=pipeline_tags()) as run, tagging_failure(name, run):
        yield run


@contextmanager
def tagging_failure(name: str, run: StepLog) -> Iterator[None]:
    """Leave the reason of a failure on a step's MLflow run, where the run's summary finds it."""
    finished = False
    try:
        yield
        finished = True
    finally:
        error = sys.exc_info()[1]
        if not finished and isinstance(error, Exception):
            with suppress(ManyEyesError):  # MLflow itself may be what failed
                run.set_tags({ERROR_TAG: error_as_tag(describe_failure(name, error))})


def _keep_report(log: StepLog, report: OutputArtifact, name: str) -> None:
    # Kubeflow's artifact has no suffix, and MLflow shows a page only when its name says that it is one.
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / f"{name.replace('[', '-').replace(']', '')}.html"
        page_file.write_bytes(Path(report.path).read_bytes())
        log.log_artifact(page_file)


@contextmanager
def _explaining_failure(name: str, *, report: OutputArtifact, notes: OutputArtifact | None) -> Iterator[None]:
    """Write ``error.json`` and the reason in Markdown for whatever leaves the block, then let it go on."""
    finished = False
    try:
        yield
        finished = True
    finally:
        error = sys.exc_info()[1]
        if not finished and isinstance(error, Exception):
            _report_failure(name, error, report=report, notes=notes)


def _stop_if_refused(*, report: OutputArtifact, notes: OutputArtifact | None) -> None:
    """Fail as an earlier attempt did, when only the user can fix what that one failed with."""
    record = earlier_refusal(getattr(report, "uri", ""))
    if record is not None:
        _tell_failure(record, folder=Path(report.path).parent, notes=notes)
        sys.stderr.write("An earlier attempt failed with this: the step is not tried again.\n")
        sys.exit(USER_ERROR)


def _report_failure(name: str, error: Exception, *, report: OutputArtifact, notes: OutputArtifact | None) -> None:
    record = describe_failure(name, error)
    _start_anew(record, error)
    _tell_failure(record, folder=Path(report.path).parent, notes=notes)
    sys.stderr.write(f"{name} failed: {error}\n")
    if record.user_error:
        traceback.print_exception(error)
        with suppress(OSError, StorageError):  # the disk that made the step fail
            remember_refusal(getattr(report, "uri", ""), record)
        sys.exit(USER_ERROR)


def _tell_failure(record: ErrorReport, *, folder: Path, notes: OutputArtifact | None) -> None:
    emit("failed", record.step, error=record)
    text = f"**{record.step} failed.** {record.error}\n\n"
    if record.problems:
        rows = [[problem.subject, problem.found, problem.needed, problem.do] for problem in record.problems]
        text += markdown_table(["what", "found", "needed", "do"], rows) + "\n"
    else:
        text += f"- found: {record.found}\n- needed: {record.needed}\n- do: {record.do}\n"
    try:
        _write_text(LocalArtifact(str(folder / "error.json")), record.model_dump_json(indent=2) + "\n")
        if notes is not None:
            _write_text(notes, text)
    except (OSError, StorageError) as writing:
        # The disk that made the step fail may refuse this, too; the event and the log have said it.
        sys.stderr.write(f"error.json could not be written: {writing}\n")
    sys.stderr.write(error_line(record))


def describe_failure(name: str, error: Exception) -> ErrorReport:
    """``error.json`` for ``error``, whether a user can fix it or not."""
    mendable = as_user_error(error)
    if mendable is not None:
        problems = mendable.problems if isinstance(mendable, PreflightError) else ()
        return ErrorReport(
            step=name,
            user_error=True,
            problems=tuple(Problem(**problem) for problem in problems),
            **mendable.as_dict(),  # type: ignore[arg-type]
        )
    return ErrorReport(
        step=name,
        error=type(error).__name__,
        found=str(error) or type(error).__name__,
        needed=f"{name} to end without an error",
        do="This is a defect of ManyEyes or of the machine, not of your input; the log has the traceback.",
        retry=False,
        user_error=False,
    )


def as_user_error(error: BaseException) -> ManyEyesError | None:
    """The error that a user can fix behind ``error``, or None when it is a defect."""
    if isinstance(error, ManyEyesError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return StorageError(
            f"{error.filename or 'a file'} could not be written ({error.strerror})",
            "space and permission to write there",
            "Free some space or fix the permission, then run the same command again.",
        )
    return None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads(*, branches: int = 1) -> int:
    """Threads that a step may use: ``MANYEYES_THREADS``, or its share of the cores.

    Args:
        branches: How many steps run side by side on this machine.
    """
    given = os.environ.get("MANYEYES_THREADS")
    return int(given) if given else max(1, num_cores() // branches)


def _set_threads() -> None:
    if "OMP_NUM_THREADS" in os.environ:
        os.environ.setdefault("MANYEYES_THREADS", os.environ["OMP_NUM_THREADS"])
    # Before numpy or torch are loaded: their thread pools read this once.
    os.environ["OMP_NUM_THREADS"] = str(num_threads())
