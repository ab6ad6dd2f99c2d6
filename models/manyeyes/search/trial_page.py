"""What the pages of searches and ablations share: bars of mean scores, strips of differences, tables of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyeyes.pages import Bar, Mark, Table, Text, amount, duration, render, span
from manyeyes.search.trial import Difference, Trial, normalised

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
    shared = (score_bars, difference_bars, reach, short_table, normalised, flops, image_off, verdict, row_name)
    return render(template, **values, **{function.__name__: function for function in shared})


def score_bars(rows: Sequence[Row]) -> list[Bar]:
    """A bar of the mean score for each trial, with its interval; the winner is blue, the others grey."""
    return [
        Bar(
            row_name(row),
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
            row_name(row),
            f"{row.difference.mean:+.2f}",
            interval=row.difference.ci95,
            dashed=0.0,
            marks=[Mark(row.difference.mean, "on")],
            title=f"{span(row.difference.ci95)} points",
            value_kind=verdict(row.difference),
            scale=(-end, end),
        )
        for row in rows
        if row.difference is not None
    ]


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


def row_name(row: Row) -> str:
    """The trial's name; the best has a tick."""
    return f"{row.name} ✓" if row.wins else row.name


def verdict(difference: Difference) -> str:
    """The colour of a difference."""
    return "quiet" if not difference.is_certain else "good" if difference.mean > 0 else "bad"


def by_name(
    trials: Mapping[str, Trial], differences: Mapping[str, Difference], keys: Sequence[str], winner: str | None
) -> list[Row]:
    """Rows of some trials of a search, in the given order."""
    return [
        Row(" + ".join(trials[key].encoders), trials[key], differences.get(key), wins=key == winner) for key in keys
    ]
