"""What a run tells while it goes: one JSON line an event in ``runs/<run-id>/events.jsonl``.

Steps append ``started``, ``progress``, ``finished`` and ``failed``. The process that runs the pipeline appends
``cached`` and ``completed`` (a task came out of the cache, or ended well, with its outputs) and ``broken`` (a task
ended badly, whether its step could say so or not).

What a step leaves on its MLflow run, as tags for the run's summary, is here too, and ``summary.json`` itself: what a
run did, for machines and for the last lines on the terminal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

EVENTS_FILE = "events.jsonl"

EventKind = Literal["started", "progress", "finished", "failed", "cached", "completed", "broken"]


class Problem(StrictModel):
    """One of several things that are wrong."""

    subject: str = Field(description="What was looked at.")
    found: str = Field(description="What was found.")
    needed: str = Field(description="What was needed instead.")
    do: str = Field(description="What to do about it.")


class ErrorReport(StrictModel):
    """``error.json``: why a step failed."""

    step: str = Field(description="The step that failed, with its encoder or model in brackets where it has one.")
    error: str = Field(description="Name of the error class.")
    found: str = Field(description="What was found.")
    needed: str = Field(description="What was needed instead.")
    do: str = Field(description="What to do about it.")
    retry: bool = Field(description="Whether the same call may succeed later without any change.")
    user_error: bool = Field(description="True: the user can fix it, exit code 2. False: exit code 1.")
    problems: tuple[Problem, ...] = Field(default=(), description="Each by itself, where preflight found several.")


# How a failed step says the same in its log: an endpoint hands out a failed task's log, but not its files.
_ERROR_LINE = "manyeyes-error: "


def error_line(report: ErrorReport) -> str:
    """``error.json`` as one line of a log."""
    return f"{_ERROR_LINE}{report.model_dump_json()}\n"


def find_error_line(log: str) -> ErrorReport | None:
    """The last such line of a log, or None."""
    for line in reversed(log.split("\n")):  # JSON leaves U+2028 and its like as they are
        _, mark, text = line.partition(_ERROR_LINE)
        if mark:
            try:
                return ErrorReport.model_validate_json(text)
            except ValidationError:
                continue
    return None


class Artifact(StrictModel):
    """One output of a task."""

    path: str = Field(description="Where it lies.")
    metadata: dict[str, Any] = Field(description="What Kubeflow shows beside it.")


class Event(StrictModel):
    """One line of ``events.jsonl``."""

    kind: EventKind
    step: str = Field(description="Step name, or the task's name where the step could not say its own.")
    time: float = Field(description="Seconds since the epoch.")
    task: str = Field(default="", description="Name of the Kubeflow task, with its iteration.")
    figure: str = Field(default="", description="The figure that matters, in words.")
    done: float | None = Field(default=None, description="Share of the work done, 0 to 1.")
    eta_s: float | None = Field(default=None, description="Seconds still to go, as estimated.")
    seconds: float | None = Field(default=None, description="Seconds inside the step function.")
    ended: float | None = Field(default=None, description="When the step function returned; seconds since the epoch.")
    import_seconds: float | None = Field(default=None, description="Seconds of imports before it.")
    error: ErrorReport | None = None
    parameters: dict[str, Any] = Field(default_factory=dict, description="Output parameters of the task.")
    artifacts: dict[str, Artifact] = Field(default_factory=dict, description="Output artifacts of the task.")


def append_event(run_dir: Path, event: Event) -> None:
    """Append one line; one ``write`` call, so that parallel steps do not mix their lines."""
    line = event.model_dump_json(exclude_defaults=True) + "\n"
    descriptor = os.open(run_dir / EVENTS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


_watchers: list[Callable[[Event], None]] = []


@contextmanager
def watching(watch: Callable[[Event], None]) -> Iterator[None]:
    """Have the events of steps that run in this process, besides any run.

    Args:
        watch: Gets each event in the block.
    """
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def emit(kind: EventKind, step: str, **fields: Any) -> None:
    """Append an event to the run that ``MANYEYES_RUN_DIR`` names, if it names one, and tell whoever is ``watching``."""
    event = Event(kind=kind, step=step, time=time.time(), **fields)
    run_dir = os.environ.get("MANYEYES_RUN_DIR")
    if run_dir:
        append_event(Path(run_dir), event)
    for watch in _watchers:
        watch(event)


class EventReader:
    """Reads a run's events as they come.

    Args:
        run_dir: Folder of the run; the file may not exist yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE
        self._offset = 0

    def read_new(self) -> list[Event]:
        """Events written since the last call; a line still being written waits for the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [Event.model_validate_json(line) for line in complete.splitlines()]


HEADLINE_TAG, ERROR_TAG = "manyeyes.figure", "manyeyes.error"

# MLflow takes this many in a tag.
_CHARACTERS = 5000


def pipeline_tags() -> dict[str, str]:
    """What marks a step's run as one of this pipeline run, where no parent run does.

    ``MANYEYES_PIPELINE_RUN`` is the pipeline run's id; on a cluster ``kubeflow/component.py`` sets it.
    """
    run = os.environ.get("MANYEYES_PIPELINE_RUN")
    return {"manyeyes.pipeline_run": run} if run else {}


def result_tags(headline: str, metadata: Mapping[str, str | int | float]) -> dict[str, str]:
    """What matters most, and each digest and location, as ``manyeyes.<name>``."""
    facts = {f"manyeyes.{name}": _cut(str(value), _CHARACTERS) for name, value in metadata.items()}
    return {HEADLINE_TAG: _cut(headline, _CHARACTERS), **facts}


def error_as_tag(record: ErrorReport) -> str:
    """``error.json`` as a tag can hold it: long texts are cut, and then the single problems are left out."""
    text = record.model_dump_json()
    if len(text) <= _CHARACTERS:
        return text
    short = {name: _cut(getattr(record, name), _CHARACTERS // 8) for name in ("found", "needed", "do")}
    text = record.model_copy(update={**short, "problems": ()}).model_dump_json()
    return text if len(text) <= _CHARACTERS else ""


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


SUMMARY_FILE = "summary.json"
EXAMPLE_FILE = "example.json"
VARIANTS = "variants"
"""Folder beside a bundle's scorecard that has those of its variants, one folder each."""


class StepSummary(StrictModel):
    """One step of a run."""

    name: str = Field(description="Step name, with its encoder or model in brackets where it has one.")
    seconds: float = Field(description="Seconds inside the step function in this run; 0 when cached.")
    cached: bool = Field(description="Whether its outputs came from an earlier run.")
    import_seconds: float = Field(default=0.0, description="Seconds of imports before the step function started.")
    figure: str = Field(default="", description="The figure that matters, in words.")
    report: str | None = Field(default=None, description="Path of its HTML report.")


class ScoreSummary(StrictModel):
    """One benchmark's result, image on and off."""

    n: int = Field(description="Questions.")
    score: float = Field(description="Percent right with the image.")
    ci95: tuple[float, float] = Field(description="95% interval of the score, clustered by image, in percent.")
    image_off: float | None = Field(description="Percent right without the image.")
    parse_failures: int = Field(description="Answers that could not be read as an answer.")


class ParitySummary(StrictModel):
    """How the bundle's answers differ from torch's."""

    max_abs_logit: float = Field(description="Largest absolute difference of a logit.")
    token_match: float = Field(description="Fraction of questions whose whole token sequence is equal.")


class VariantSummary(StrictModel):
    """One variant of the bundle besides its default."""

    precision: str = Field(description="fp32, or what differs from it: vision int8, decoder int4.")
    bytes: int = Field(description="Of its graphs, also those that it shares with others.")
    token_match: float = Field(description="Fraction of questions whose whole token sequence is torch's.")
    scores: dict[str, ScoreSummary] = Field(description="By benchmark; empty where it was not scored.")


class GateRuleSummary(StrictModel):
    """One rule of the gate."""

    rule: str
    benchmark: str | None = None
    found: Any = Field(description="What the rule found.")
    needed: Any = Field(description="What it needed.")
    passed: bool


class GateSummary(StrictModel):
    """The gate's decision."""

    verdict: Literal["passed", "failed"]
    rules: list[GateRuleSummary]


class ModelSummary(StrictModel):
    """What the registry holds now."""

    name: str
    version: str
    aliases: list[str]


class BundleSummary(StrictModel):
    """The ONNX bundle."""

    path: str
    bytes: int = Field(description="Size of all its files.")


class ExampleSummary(StrictModel):
    """One question of the benchmark, for a person to try."""

    image: str = Field(description="Path of the image.")
    question: str
    reference: str = Field(description="The right answer.")


class RunSummary(StrictModel):
    """``summary.json`` of one run."""

    run_id: str
    pipeline: str
    status: Literal["succeeded", "failed", "interrupted"]
    started: str = Field(description="ISO 8601, UTC.")
    recipe: str | None = Field(default=None, description="Recipe name.")
    recipe_digest: str | None = Field(default=None, description="sha256 of the recipe with every default filled in.")
    data_md5: str | None = Field(default=None, description="Snapshot, as in data.dvc without the .dir suffix.")
    code_digest: str | None = Field(default=None, description="sha256 of the library, or the image's digest.")
    git_commit: str | None = Field(default=None, description="Commit of the checkout; null outside git.")
    git_dirty: bool | None = Field(default=None, description="Whether the checkout differed from that commit.")
    steps: list[StepSummary] = Field(default_factory=list)
    scorecard: dict[str, ScoreSummary] | None = Field(default=None, description="Torch's scores by benchmark.")
    bundle_scorecard: dict[str, ScoreSummary] | None = Field(default=None, description="The bundle's scores.")
    parity: ParitySummary | None = None
    gate: GateSummary | None = None
    model: ModelSummary | None = None
    bundle: BundleSummary | None = None
    variants: dict[str, VariantSummary] = Field(
        default_factory=dict, description="The bundle's variants besides its default, by name."
    )
    example: ExampleSummary | None = None
    report: str | None = Field(default=None, description="Path of the evaluation's HTML report.")
    reports: dict[str, str] = Field(default_factory=dict, description="Path of every step's HTML report, by step.")
    log: str = Field(description="Path of pipeline.log.")
    error: ErrorReport | None = None
    overhead_s: float = Field(description="wall_s minus the time in which at least one step function ran.")
    wall_s: float = Field(description="Seconds from the command to the summary.")


def write_summary(summary: RunSummary, run_dir: Path) -> Path:
    """Write ``summary.json`` into the run's folder, whole or not at all."""
    path = run_dir / SUMMARY_FILE
    write_file(path, summary.model_dump_json(indent=2) + "\n")
    return path


def union_seconds(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of ``(start, end)`` intervals, so that parallel steps count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
