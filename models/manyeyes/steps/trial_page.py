"""What the pages of searches and ablations share: bars of mean scores, strips of differences, the table of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from manyeyes.evaluation.page import markdown_table, table
from manyeyes.evaluation.scorecard import Interval
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


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: value, what it is, and a detail in small print."""
    parts = "".join(
        f'<div class="tile"><b>{escape(value)}</b>{escape(what)}<span>{escape(detail)}</span></div>'
        for value, what, detail in figures
    )
    return f'<div class="tiles">{parts}</div>'


def score_bars(rows: Sequence[Row]) -> str:
    """A bar of the mean score for each trial, with its interval; the winner is blue, the others grey."""
    parts = [
        f'<div class="group">{_name(row)}</div>'
        f'<div class="track" title="{row.trial.mean:.2f}% ({span(row.trial.mean_ci95)})">'
        f'<div class="fill {"on" if row.wins else "off"}" style="width:{_clamp(row.trial.mean):.2f}%"></div>'
        f"{_whisker(*row.trial.mean_ci95)}</div><div>{row.trial.mean:.2f}%</div>"
        for row in rows
    ]
    return f'<div class="bars">{"".join(parts)}</div>'


def difference_strips(rows: Sequence[Row]) -> str:
    """A dot and its interval for each difference, around a dashed line at no difference."""
    shown = [row for row in rows if row.difference is not None]
    if not shown:
        return ""
    ends = [abs(end) for row in shown if row.difference for end in row.difference.ci95]
    reach = _round_up(max(ends)) or 1.0

    def place(points: float) -> float:
        return 50 + 50 * points / reach

    parts = []
    for row in shown:
        assert row.difference is not None
        low, high = row.difference.ci95
        dot = (
            f'<div style="position:absolute;top:50%;left:{place(row.difference.mean):.2f}%;width:.7rem;height:.7rem;'
            'border-radius:50%;background:var(--on);transform:translate(-50%,-50%)"></div>'
        )
        parts.append(
            f'<div class="group">{_name(row)}</div><div class="track" title="{span((low, high))} points">'
            f'<div class="mark" style="left:50%"></div>{_whisker(place(low), place(high))}{dot}</div>'
            f'<div class="{_verdict(row.difference)}">{row.difference.mean:+.2f}</div>'
        )
    key = (
        f'<div class="key"><span><i class="dash"></i>no difference</span><span>scale: -{reach:g} to +{reach:g} points'
        "</span><span>whiskers: 95%, paired</span></div>"
    )
    return f'{key}<div class="bars">{"".join(parts)}</div>'


def trials_table(rows: Sequence[Row], *, name: str, compared_with: str) -> str:
    """Every figure of every trial as an HTML table."""
    benchmarks = list(normalised(rows[0].trial.scorecard)) if rows else []
    header = [name, "mean %", "95%", f"to {compared_with}", "95%"]
    header += ["tokens", "parameters", "FLOPs a sample", "training", "scoring", "no image %"]
    header += [heading for benchmark in benchmarks for heading in (benchmark, "95%")] if len(benchmarks) > 1 else []
    body = []
    for row in rows:
        trial = row.trial
        cells = [_name(row), f"{trial.mean:.2f}", _nowrap(span(trial.mean_ci95))]
        if row.difference is None:
            cells += ["", ""]
        else:
            cells += [
                f'<span class="{_verdict(row.difference)}">{row.difference.mean:+.2f}</span>',
                _nowrap(span(row.difference.ci95)),
            ]
        cells += [
            f"{trial.visual_tokens:,}",
            amount(trial.parameters),
            amount(flops(trial)),
            _nowrap(duration(trial.train_seconds)),
            _nowrap(duration(trial.evaluate_seconds)),
            f"{_image_off(trial):.2f}",
        ]
        if len(benchmarks) > 1:
            for score, interval in normalised(trial.scorecard).values():
                cells += [f"{score:.2f}", _nowrap(span(interval))]
        body.append(cells)
    numbers = [index for index, heading in enumerate(header) if index and heading != "95%"]
    return f'<div style="margin-top:1rem">{table(header, body, numbers=numbers)}</div>'


def markdown_trials(rows: Sequence[Row], *, name: str, compared_with: str) -> str:
    """The figures that matter as a Markdown table."""
    header = [name, "mean %", "95%", f"to {compared_with}", "95%", "tokens", "parameters", "training"]
    body = [
        [
            f"**{row.name}**" if row.wins else row.name,
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
    return markdown_table(header, body) + "\n"


def fine_print(rows: Sequence[Row]) -> str:
    """Digests and losses behind the figures, folded away."""
    body = [
        [
            escape(row.name),
            f"<code>{row.trial.recipe_digest[:16]}</code>",
            f"<code>{row.trial.scorecard.model.digest[:16]}</code>",
            escape(
                ", ".join(
                    f"{stage.stage}{f' of {stage.encoder}' if stage.encoder else ''} {stage.final_loss:.3f}"
                    for stage in row.trial.stages
                )
            ),
        ]
        for row in rows
    ]
    card = rows[0].trial.scorecard
    about = [
        ["data", f"<code>{escape(card.data_md5)}</code>"],
        ["code", f"<code>{escape(card.code_digest)}</code>"],
        *(
            [f"{escape(name)}: questions", f"{score.n:,} of {score.n_total:,}"]
            for name, score in card.benchmarks.items()
        ),
    ]
    return (
        "<details><summary>Digests, losses and settings</summary>"
        + table(["", ""], about)
        + table(["trial", "recipe", "checkpoint", "loss at the end of"], body)
        + "</details>"
    )


def flops(trial: Trial) -> float:
    """Floating-point operations a sample in the trial's last stage, forward and backward."""
    return next((trial.flops_per_sample[name] for name in _STAGE_FOR_FLOPS if name in trial.flops_per_sample), 0.0)


def span(interval: Interval) -> str:
    """An interval in words."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def amount(number: float) -> str:
    """A large number with three digits and a prefix: 1.23 M, 45.6 G."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _image_off(trial: Trial) -> float:
    scores = trial.scorecard.benchmarks.values()
    return sum(score.image_off for score in scores) / len(scores)


def _name(row: Row) -> str:
    return f"{escape(row.name)} ✓" if row.wins else escape(row.name)


def _verdict(difference: Difference) -> str:
    return "quiet" if not difference.is_certain else "good" if difference.mean > 0 else "bad"


def _whisker(low: float, high: float) -> str:
    left, right = _clamp(low), _clamp(high)
    return f'<div class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></div>'


def _clamp(percent: float) -> float:
    return min(100.0, max(0.0, percent))


def _nowrap(text: str) -> str:
    return f'<span class="nowrap">{text}</span>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... above a value."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def by_name(
    trials: Mapping[str, Trial], differences: Mapping[str, Difference], keys: Sequence[str], winner: str | None
) -> list[Row]:
    """Rows of some trials of a search, in the given order."""
    return [
        Row(" + ".join(trials[key].encoders), trials[key], differences.get(key), wins=key == winner) for key in keys
    ]
