"""What the pages of searches and ablations share: bars of mean scores, strips of differences, tables of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyeyes.pages import Bar, Mark, Table, Text, amount, duration, render, span
from manyeyes.steps.trial import Difference, Trial, normalised

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
    """A page or note whose template calls the functions of this module."""
    shared = (score_bars, difference_bars, reach, trials_table, short_table, settings_table, digests_table)
    return render(template, **values, **{function.__name__: function for function in shared})


def score_bars(rows: Sequence[Row]) -> list[Bar]:
    """A bar of the mean score for each trial, with its interval; the winner is blue, the others grey."""
    return [
        Bar(
            _name(row),
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
            _name(row),
            f"{row.difference.mean:+.2f}",
            interval=row.difference.ci95,
            dashed=0.0,
            marks=[Mark(row.difference.mean, "on")],
            title=f"{span(row.difference.ci95)} points",
            value_kind=_verdict(row.difference),
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


def trials_table(rows: Sequence[Row], name: str, compared_with: str) -> Table:
    """Every figure of every trial."""
    benchmarks = list(normalised(rows[0].trial.scorecard)) if rows else []
    header = [name, "mean %", "95%", f"to {compared_with}", "95%"]
    header += ["tokens", "parameters", "FLOPs a sample", "training", "scoring", "no image %"]
    header += [heading for benchmark in benchmarks for heading in (benchmark, "95%")] if len(benchmarks) > 1 else []
    body = []
    for row in rows:
        trial, gained = row.trial, row.difference
        cells: list[str | Text] = [_name(row), f"{trial.mean:.2f}", span(trial.mean_ci95)]
        cells += ["", ""] if gained is None else [Text(f"{gained.mean:+.2f}", kind=_verdict(gained)), span(gained.ci95)]
        cells += [
            f"{trial.visual_tokens:,}",
            amount(trial.parameters),
            amount(flops(trial)),
            duration(trial.train_seconds),
            duration(trial.evaluate_seconds),
            f"{_image_off(trial):.2f}",
        ]
        if len(benchmarks) > 1:
            for score, interval in normalised(trial.scorecard).values():
                cells += [f"{score:.2f}", span(interval)]
        body.append(cells)
    numbers = [index for index, heading in enumerate(header) if index and heading != "95%"]
    return Table(header, body, numbers=numbers)


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


def settings_table(rows: Sequence[Row]) -> Table:
    """What all trials share."""
    card = rows[0].trial.scorecard
    asked = [[f"{name}: questions", f"{score.n:,} of {score.n_total:,}"] for name, score in card.benchmarks.items()]
    return Table(("", ""), [["data", card.data_md5], ["code", card.code_digest], *asked])


def digests_table(rows: Sequence[Row]) -> Table:
    """Digests and losses of each trial."""
    body = [
        [
            row.name,
            row.trial.recipe_digest[:16],
            row.trial.scorecard.model.digest[:16],
            ", ".join(
                f"{stage.stage}{f' of {stage.encoder}' if stage.encoder else ''} {stage.final_loss:.3f}"
                for stage in row.trial.stages
            ),
        ]
        for row in rows
    ]
    return Table(("trial", "recipe", "checkpoint", "loss at the end of"), body, code=(1, 2))


def flops(trial: Trial) -> float:
    """Floating-point operations a sample in the trial's last stage, forward and backward."""
    return next((trial.flops_per_sample[name] for name in _STAGE_FOR_FLOPS if name in trial.flops_per_sample), 0.0)


def _image_off(trial: Trial) -> float:
    scores = trial.scorecard.benchmarks.values()
    return sum(score.image_off for score in scores) / len(scores)


def _name(row: Row) -> str:
    return f"{row.name} ✓" if row.wins else row.name


def _verdict(difference: Difference) -> str:
    return "quiet" if not difference.is_certain else "good" if difference.mean > 0 else "bad"


def by_name(
    trials: Mapping[str, Trial], differences: Mapping[str, Difference], keys: Sequence[str], winner: str | None
) -> list[Row]:
    """Rows of some trials of a search, in the given order."""
    return [
        Row(" + ".join(trials[key].encoders), trials[key], differences.get(key), wins=key == winner) for key in keys
    ]
