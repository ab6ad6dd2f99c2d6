"""``report.json``: everything that the pages of an evaluation show; they are rendered from it and from nothing else.

It also holds what is needed to get the figures again: command, recipe, machine and versions; no names of hosts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from manyeyes import __version__
from manyeyes.evaluation.benchmarks.benchmark import Unit
from manyeyes.evaluation.scorecard import Interval, Scorecard, read_checked
from manyeyes.recipe import Recipe
from manyeyes.recipe.model import PART
from manyeyes.strict import StrictModel


class Column(StrictModel):
    """One benchmark, or one of Cambrian-1's groups, of the comparison."""

    title: str = Field(description="For people.")
    unit: Unit = Field(description="Of its scores; groups are in percent of the maximum.")
    maximum: float = Field(gt=0, description="The best score there is; in unit.")


class Cell(StrictModel):
    """One model on one benchmark."""

    score: float = Field(ge=0, description="In the column's unit.")
    ci95: Interval | None = Field(description="95% interval, clustered by image; null: none is published.")
    source: str = Field(default="", description="Where it is printed; empty for scores of this project.")
    notes: list[int] = Field(default=[], description="Numbers of notes, from 1: why it does not quite compare.")


class ComparisonRow(StrictModel):
    """One model of the comparison."""

    name: str = Field(description="Of the model.")
    kind: Literal["this", "champion", "published"] = Field(description="Whose row it is.")
    system: str = Field(default="", description="llava, eagle, cambrian or mini-gemini, where it is published.")
    language_model: str = Field(default="", description="Of a published model, where the source names it.")
    visual_tokens: int | None = Field(default=None, description="Of an image in the sequence; null: unknown.")
    parameters: int | None = Field(default=None, description="Of the whole model; null: unknown.")
    flops_per_sample: int | None = Field(
        default=None, description="One forward pass over one image and 128 tokens of text; null: unknown."
    )
    questions_per_s: float | None = Field(
        default=None, description="Questions answered a second with the image, over all benchmarks; null: unknown."
    )
    cells: dict[str, Cell] = Field(description="By benchmark; those without a score are left out.")
    groups: dict[str, Cell] = Field(default={}, description="By group; incomplete ones are left out.")


class Comparison(StrictModel):
    """This model beside the champion and published models."""

    columns: dict[str, Column] = Field(description="The benchmarks that are scored, by name.")
    groups: dict[str, Column] = Field(description="Cambrian-1's groups that any row has, by name.")
    rows: list[ComparisonRow] = Field(description="This model, the champion, then published ones.")
    notes: list[str] = Field(description="What the cells' notes say.")
    champion: str = Field(description="Which champion it is compared with, or why with none.")
    unpublished: list[str] = Field(description="Scored benchmarks of which no published score is known here.")


class TradeOffPoint(StrictModel):
    """One model: what it scores and what it costs."""

    name: str = Field(description="As in the comparison.")
    kind: Literal["this", "champion", "published"] = Field(description="Whose it is.")
    system: str = Field(default="", description="As in the comparison.")
    score: float = Field(ge=0, description="Mean over the benchmarks, in percent of their maximum.")
    visual_tokens: int = Field(gt=0, description="Of an image in the sequence.")
    flops_per_sample: int | None = Field(description="As in the comparison; null: unknown.")


class TradeOff(StrictModel):
    """Score against cost, over benchmarks that every model shown has."""

    benchmarks: list[str] = Field(min_length=1, description="Which ones.")
    points: list[TradeOffPoint] = Field(min_length=2, description="Models whose visual tokens are known.")


class Mistake(StrictModel):
    """A wrong answer that was given more or less often."""

    reference: str = Field(description="What counts as right.")
    prediction: str = Field(description="What the model wrote.")
    times: int = Field(gt=0, description="How often.")


class ExampleAnswer(StrictModel):
    """One question, and what the model wrote under each condition."""

    question: str = Field(description="As the data set has it, cut where it is long.")
    reference: str = Field(description="What counts as right.")
    answers: dict[str, str] = Field(description="By condition: image-on, image-off, grey, other-image.")
    scores: dict[str, float] = Field(description="By condition; 0 wrong to 1 right.")


class Example(StrictModel):
    """An image with questions on it."""

    item: str = Field(description="Id of its first question.")
    image_sha256: str = Field(description="Of the image file.")
    answers: list[ExampleAnswer] = Field(description="Wrong ones first.")
    left_out: int = Field(ge=0, description="Questions on the image that are not shown.")


class Unread(StrictModel):
    """A text that no answer could be read from."""

    item: str = Field(description="Id of the question.")
    question: str = Field(description="As the data set has it, cut where it is long.")
    prediction: str = Field(description="What the model wrote, cut where it is long.")


class BenchmarkDetails(StrictModel):
    """What stands behind a benchmark's figures."""

    title: str = Field(description="For people.")
    metric: str = Field(description="What score is.")
    dataset: str = Field(description="Id on the hub, configuration and split.")
    prompts: str = Field(description="Whose prompts.")
    prompt: str = Field(description="All that the model reads for the first question; <image> where an image stands.")
    prompt_is_whole: bool = Field(description="Whether prompt has the text around turns; else it is the tokenizer's.")
    images: int = Field(ge=0, description="Images that were asked about.")
    images_with_mistakes: int = Field(ge=0, description="Those of them with a wrong answer.")
    wrong: int = Field(ge=0, description="Answers with the image that are not wholly right.")
    mistakes: list[Mistake] = Field(description="The most frequent ones.")
    unread: list[Unread] = Field(description="The first answers that nothing could be read from.")
    worst: list[Example] = Field(description="Images with most wrong answers.")
    best: list[Example] = Field(description="Images that are all right, where the image made most difference.")


class Machine(StrictModel):
    """What answered."""

    system: str = Field(description="Operating system and architecture.")
    processor: str = Field(description="Model of the CPU.")
    cores: int = Field(gt=0, description="CPU cores that this process may use.")
    memory_gb: float | None = Field(description="Main memory, 1e9 bytes; null where the system does not say.")
    accelerators: list[str] = Field(description="Models of the GPUs.")


class EvaluationRun(StrictModel):
    """Where and with what some benchmarks were answered."""

    benchmarks: list[str] = Field(description="Which ones.")
    finished: str = Field(description="When the report was made; UTC.")
    machine: Machine = Field(description="The machine.")
    versions: dict[str, str] = Field(description="Of python, manyeyes and the libraries that compute.")


class Reproduction(StrictModel):
    """Everything needed to get the figures again."""

    command: str = Field(description="Asks this model these questions, beside recipe.yaml; MODEL is its folder.")
    started_as: str = Field(description="What was typed, folders shortened; empty where a pipeline started it.")
    recipe: str = Field(description="recipe.yaml: all that the evaluation reads of it; empty where it was not at hand.")
    runs: list[EvaluationRun] = Field(description="Of one machine and set of versions each.")


class VariantScore(StrictModel):
    """One variant of a bundle on one benchmark."""

    score: float = Field(ge=0, description="The benchmark's figure; in its unit.")
    ci95: Interval = Field(description="95% interval of score, clustered by image; in the benchmark's unit.")
    difference: float = Field(description="score minus that of the variant of this report; points.")
    difference_ci95: Interval = Field(description="95% interval of difference, paired, clustered by image; points.")


class VariantRow(StrictModel):
    """One variant of a bundle: its size, and what it scores."""

    name: str = Field(description="In the manifest.")
    precision: str = Field(description="fp32, or what differs from it: vision int8, decoder int4.")
    bytes: int = Field(gt=0, description="Of its graphs, also those that it shares with others.")
    scores: dict[str, VariantScore] = Field(description="By benchmark.")


class Report(StrictModel):
    """``report.json``: the figures, what they compare with, what is behind them, and how to get them again."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    title: str = Field(description="Of the pages.")
    scorecard: Scorecard = Field(description="As in scorecard.json.")
    comparison: Comparison = Field(description="Beside the champion and published models.")
    trade_off: TradeOff | None = Field(description="Score against cost; null with fewer than two models.")
    details: dict[str, BenchmarkDetails] = Field(description="By benchmark.")
    reproduction: Reproduction = Field(description="How to get the figures again.")
    variants: list[VariantRow] = Field(
        default=[], description="Of a bundle, the one of this report first; empty where it has no other."
    )


def read_report(path: Path) -> Report:
    """Read and check ``report.json``.

    Raises:
        EvaluationError: Missing, or not such a report.
    """
    return read_checked(
        path, Report, what="a report", needed="what `manyeyes evaluate` writes", do="Evaluate it first."
    )


_LIBRARIES = {
    "torch": ("torch", "transformers", "timm", "tokenizers", "pillow", "numpy"),
    "bundle": ("onnxruntime-gpu", "onnxruntime", "tokenizers", "pillow", "numpy"),
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


def describe_reproduction(
    kind: str, *, benchmarks: Sequence[str], recipe: Recipe | None, data_md5: str, argv: Sequence[str] | None = None
) -> Reproduction:
    """What this process knows.

    Args:
        kind: ``torch`` or ``bundle``.
        benchmarks: Those that it answered.
        recipe: What was asked; ``None`` where it is not at hand.
        data_md5: Of the snapshot.
        argv: Command line; this process's own when left out.
    """
    text = "" if recipe is None else yaml.safe_dump(_as_recipe(recipe), sort_keys=False, width=100)
    return Reproduction(
        command=f"manyeyes evaluate MODEL --recipe recipe.yaml --data-md5 {data_md5}",
        started_as=_shorten_command(sys.argv if argv is None else argv),
        recipe=text,
        runs=[
            EvaluationRun(
                benchmarks=list(benchmarks),
                finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
                machine=describe_machine(),
                versions=list_versions(kind),
            )
        ],
    )


def _as_recipe(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    if PART in recipe.__dict__:
        # An evaluation reads no more of a recipe than a step is given: the rest may be any recipe's.
        tree = {"extends": "tiny", **tree, "gate": [{"rule": "validation"}]}
    return tree


def merge_runs(runs: Sequence[EvaluationRun]) -> list[EvaluationRun]:
    """Runs of several reports; those of one machine and the same versions become one."""
    merged: dict[str, EvaluationRun] = {}
    for run in runs:
        key = json.dumps([run.machine.model_dump(), run.versions], sort_keys=True)
        before = merged.get(key)
        if before is not None:
            names = [*before.benchmarks, *(name for name in run.benchmarks if name not in before.benchmarks)]
            run = run.model_copy(update={"benchmarks": names, "finished": max(before.finished, run.finished)})
        merged[key] = run
    return list(merged.values())


def describe_machine() -> Machine:
    """This machine in words; neither its name nor any folder."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory_gb(),
        accelerators=_accelerators(),
    )


def list_versions(kind: str) -> dict[str, str]:
    """Versions of python, of this library and of those that compute for a kind of model, as far as they are there."""
    versions = {"python": platform.python_version(), "manyeyes": __version__}
    for name in _LIBRARIES[kind]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return None


def _accelerators() -> list[str]:
    # The driver's own files, so that neither torch nor CUDA is needed to name a GPU.
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            names.append(match[1])
    return names


def _shorten_command(argv: Sequence[str]) -> str:
    """A command line of this project without folders and addresses; empty for another program's."""
    if not argv or Path(argv[0]).name != "manyeyes":
        return ""
    return shlex.join(["manyeyes", *(_shorten(part) for part in argv[1:])])


def _shorten(part: str) -> str:
    option, sign, value = part.partition("=") if part.startswith("--") else ("", "", part)
    if _ADDRESS.match(value):
        value = f"{value.partition('://')[0]}://..."
    elif value.startswith(("/", "~", "../")) or ("/" in value and Path(value).exists()):
        value = Path(value).name
    return f"{option}{sign}{value}"
