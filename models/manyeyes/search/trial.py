"""``trial.json``: one variant of a recipe, trained and scored; and how trials are compared.

What the pages of searches and ablations share: bars of mean scores, strips of differences, tables of trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from manyeyes.errors import EvaluationError, PipelineError
from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.outcomes import OutcomeFile, read_outcomes
from manyeyes.evaluation.scorecard import Interval, Scorecard
from manyeyes.evaluation.statistics.significance import PairedTest, compare_scores
from manyeyes.pages import Bar, Curve, Drawing, Mark, Table, Text, amount, draw_curves, duration, render, span
from manyeyes.search.variant import Variant
from manyeyes.strict import StrictModel

TRIAL_FILE, ITEMS_FILE = "trial.json", "items.parquet"


class TrialStage(StrictModel):
    """One stage of a trial's training."""

    stage: str = Field(description="prealign, pretrain or sft.")
    encoder: str | None = Field(description="The encoder that prealign trained.")
    seconds: float = Field(description="Seconds of training.")
    samples: int | None = Field(default=None, description="Samples seen, each epoch counted.")
    final_loss: float = Field(description="Nats a supervised token.")
    checkpoint_digest: str = Field(description="Of what the stage made.")


class Trial(StrictModel):
    """One variant of a recipe, trained and scored."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    variant: Variant = Field(description="How its recipe was made from the one of the search or ablation.")
    recipe: str = Field(description="What was trained and asked of its recipe, every default filled in, as JSON.")
    recipe_digest: str = Field(description="Its sha256.")
    encoders: tuple[str, ...] = Field(description="Names of its encoders.")
    stages: tuple[TrialStage, ...] = Field(description="What was trained for it.")
    scorecard: Scorecard = Field(description="Its scores, PyTorch.")
    mean: float = Field(description="Mean over the benchmarks of the normalised scores; percent.")
    mean_ci95: Interval = Field(description="95% interval of mean; percent.")
    parameters: int = Field(description="Parameters of the whole model.")
    visual_tokens: int = Field(description="Tokens that an image becomes.")
    flops_per_sample: dict[str, float] = Field(description="Forward and backward, by stage; floating-point operations.")
    train_seconds: float = Field(description="Seconds of training, the stages that other trials share included.")
    evaluate_seconds: float = Field(
        description="Seconds of answering, without what an earlier run that was stopped had answered."
    )


def trial_folders(batches: Sequence[Path]) -> list[Path]:
    """The folder of every trial in what ``train_trial`` wrote: one trial, or several in folders of their own."""
    found: list[Path] = []
    for batch in batches:
        alone = (batch / TRIAL_FILE).is_file()
        found += [batch] if alone else sorted(path.parent for path in batch.glob(f"*/{TRIAL_FILE}"))
    return found


@dataclass(frozen=True)
class Difference:
    """One trial's mean score minus another's, on the same questions.

    Attributes:
        mean: Points, each benchmark's figure as percent of its maximum.
        ci95: 95% interval, paired and clustered by image; points.
        by_benchmark: The same for each benchmark, in its own unit.
    """

    mean: float
    ci95: Interval
    by_benchmark: Mapping[str, PairedTest]

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


def normalised(scorecard: Scorecard) -> dict[str, tuple[float, Interval]]:
    """Each benchmark's score and interval as percent of what a perfect model gets.

    Most are percents already; points (MME, OCRBench) are divided by their maximum.
    """
    found: dict[str, tuple[float, Interval]] = {}
    for name, score in scorecard.benchmarks.items():
        scale = 100 / score.maximum
        found[name] = score.score * scale, (score.ci95[0] * scale, score.ci95[1] * scale)
    return found


def mean_score(scorecard: Scorecard) -> tuple[float, Interval]:
    """Mean over the benchmarks of the normalised scores, and its 95% interval.

    Benchmarks have different images, so their errors are independent: each side of the interval is the root of the
    summed squares of that side's lengths.

    Source:
        MOVER: Zou and Donner, Statistics in Medicine 27 (2008), 1693-1702. Mean of normalised scores: Eagle,
        arXiv:2408.15998.
    """
    return _combine(list(normalised(scorecard).values()))


def difference(trial: Path, baseline: Path) -> Difference:
    """Mean score of one trial minus another's.

    Args:
        trial: Its folder.
        baseline: The other's.

    Raises:
        PipelineError: One of them is no trial.
        EvaluationError: They were asked different questions.
    """
    items, others = read_items(trial), read_items(baseline)
    scores = read_trial(trial).scorecard.benchmarks
    tests: dict[str, PairedTest] = {}
    parts: list[tuple[float, Interval]] = []
    for benchmark, digest in items.benchmark_digests.items():
        ours = items.of(benchmark)
        theirs = {outcome.id: outcome for outcome in others.of(benchmark)}
        if digest != others.benchmark_digests.get(benchmark) or {outcome.id for outcome in ours} != set(theirs):
            raise EvaluationError(
                f"{benchmark} asked the two models different questions",
                "the same benchmark, snapshot and max_items for both",
                "Do not vary evaluation.benchmarks or evaluation.max_items.",
            )
        row = find_benchmark(benchmark)
        tests[benchmark] = test = compare_scores(
            row,
            [theirs[outcome.id].graded for outcome in ours],
            [outcome.graded for outcome in ours],
            scores[benchmark].variant,
        )
        scale = 100 / row.maximum
        parts.append((scale * test.difference, (scale * test.low, scale * test.high)))
    mean, ci95 = _combine(parts)
    return Difference(mean, ci95, tests)


def _combine(parts: Sequence[tuple[float, Interval]]) -> tuple[float, Interval]:
    mean = sum(value for value, _ in parts) / len(parts)
    below = math.hypot(*(value - low for value, (low, _) in parts)) / len(parts)
    above = math.hypot(*(high - value for value, (_, high) in parts)) / len(parts)
    return round(mean, 4), (round(mean - below, 4), round(mean + above, 4))


def read_trial(folder: Path) -> Trial:
    """Read ``trial.json`` of a trial's folder.

    Raises:
        PipelineError: Missing, or not such a file.
    """
    path = folder / TRIAL_FILE
    try:
        return Trial.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PipelineError(
            f"{path} cannot be read ({error})", "what the step train_trial writes", "Run the trial again."
        ) from error


def read_items(folder: Path) -> OutcomeFile:
    """What a trial's model answered.

    Raises:
        EvaluationError: Missing, or not such a file.
    """
    return read_outcomes(folder / ITEMS_FILE)


_STAGE_FOR_FLOPS = ("sft", "pretrain", "prealign")


@dataclass(frozen=True)
class Row:
    """One trial as the pages show it.

    Attributes:
        name: For people.
        trial: What was found.
        difference: To the trial that it is compared with; ``None`` for that trial itself.
        wins: Whether it is to stand out.
    """

    name: str
    trial: Trial
    difference: Difference | None
    wins: bool = False


def render_trials(template: str, **values: object) -> str:
    """A page or note whose template calls functions of this module."""
    shared = (
        score_bars,
        difference_bars,
        reach,
        short_table,
        normalised,
        flops,
        image_off,
        samples_seen,
        tone_of,
        marked_name,
    )
    return render(template, **values, **{function.__name__: function for function in shared})


def score_bars(rows: Sequence[Row]) -> list[Bar]:
    """A bar of the mean score for each trial, with its interval; the winner is blue, the others grey."""
    return [
        Bar(
            marked_name(row),
            f"{row.trial.mean:.2f}%",
            row.trial.mean,
            "on" if row.wins else "off",
            row.trial.mean_ci95,
            title=f"{row.trial.mean:.2f}% ({span(row.trial.mean_ci95)})",
        )
        for row in rows
    ]


def difference_bars(rows: Sequence[Row]) -> list[Bar]:
    """A dot and its interval for each difference, around a dashed line at no difference."""
    end = reach(rows)
    return [
        Bar(
            marked_name(row),
            f"{row.difference.mean:+.2f}",
            interval=row.difference.ci95,
            dashed=0.0,
            marks=[Mark(row.difference.mean, "on")],
            title=f"{span(row.difference.ci95)} points",
            value_kind=tone_of(row.difference),
            scale=(-end, end),
        )
        for row in rows
        if row.difference is not None
    ]


def curve_axis(rows: Sequence[Row]) -> tuple[str, list[float]] | None:
    """The one number in which all trials of a grid differ, by its dotted path, and its value in each.

    None where they differ in more, in something else, or in the seed alone.
    """
    changes = [change for row in rows for change in row.trial.variant.changes.items()]
    paths = {path for path, _ in changes}
    values = [float(value) for _, value in changes if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(paths) != 1 or not len(values) == len(changes) == len(rows):
        return None
    (path,) = paths
    return None if path.rpartition(".")[2] == "seed" else (path, values)


def score_curve(rows: Sequence[Row]) -> Drawing | None:
    """The mean score and the ends of its interval against the number in which the trials differ; None without one."""
    axis = curve_axis(rows)
    if axis is None:
        return None
    path, values = axis
    pairs = sorted(zip(values, rows, strict=True), key=lambda pair: pair[0])
    ends = [Curve(f"95%, {name}", [(x, row.trial.mean_ci95[end]) for x, row in pairs], "off") for end, name in _ENDS]
    mean = Curve("mean score", [(x, row.trial.mean) for x, row in pairs])
    return draw_curves([*ends, mean], x_label=path.rpartition(".")[2], y_label="mean score (%)", from_zero=False)


_ENDS = ((0, "lower end"), (1, "upper end"))


def samples_seen(trial: Trial) -> str:
    """Of the trial's last stage."""
    samples = trial.stages[-1].samples if trial.stages else None
    return "" if samples is None else f"{samples:,}"


def reach(rows: Sequence[Row]) -> float:
    """How far the scale of differences goes: the next of 1, 2, 5, 10, 20, 50, ... points."""
    furthest = max((abs(end) for row in rows if row.difference for end in row.difference.ci95), default=0.0)
    if furthest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(furthest))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= furthest)


def short_table(rows: Sequence[Row], name: str, compared_with: str) -> Table:
    """The figures that matter, for Markdown."""
    header = [name, "mean %", "95%", f"to {compared_with}", "95%", "tokens", "parameters", "training"]
    body: list[list[str | Text]] = [
        [
            Text(row.name, mark="**" if row.wins else ""),
            f"{row.trial.mean:.2f}",
            span(row.trial.mean_ci95),
            f"{row.difference.mean:+.2f}" if row.difference else "",
            span(row.difference.ci95) if row.difference else "",
            f"{row.trial.visual_tokens:,}",
            amount(row.trial.parameters),
            duration(row.trial.train_seconds),
        ]
        for row in rows
    ]
    return Table(header, body)


def flops(trial: Trial) -> float:
    """Floating-point operations a sample in the trial's last stage, forward and backward."""
    return next((trial.flops_per_sample[name] for name in _STAGE_FOR_FLOPS if name in trial.flops_per_sample), 0.0)


def image_off(trial: Trial) -> float:
    """Mean score without the image."""
    scores = trial.scorecard.benchmarks.values()
    return sum(score.image_off for score in scores) / len(scores)


def marked_name(row: Row) -> str:
    """The trial's name; the best has a tick."""
    return f"{row.name} ✓" if row.wins else row.name


def tone_of(difference: Difference) -> str:
    """The colour of a difference."""
    return "quiet" if not difference.is_certain else "good" if difference.mean > 0 else "bad"


def by_name(
    trials: Mapping[str, Trial], differences: Mapping[str, Difference], keys: Sequence[str], winner: str | None
) -> list[Row]:
    """Rows of some trials of a search, in the given order."""
    return [
        Row(" + ".join(trials[key].encoders), trials[key], differences.get(key), wins=key == winner) for key in keys
    ]
