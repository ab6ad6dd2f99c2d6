"""``summary.json``: what a run did, for machines and for the last lines on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from manyeyes.harness.events import ErrorReport
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

SUMMARY_FILE = "summary.json"
EXAMPLE_FILE = "example.json"


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
