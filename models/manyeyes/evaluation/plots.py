"""Plots of a report as HTML and SVG: no scripts, no files, colours of the page, legible at any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from manyeyes.evaluation.comparison import SYSTEM_TITLES
from manyeyes.evaluation.report_contents import Cell, ComparisonRow, Report, TradeOffPoint
from manyeyes.evaluation.report_words import figure, short_count, span

_GLYPHS = {"llava": "●", "eagle": "▲", "cambrian": "■", "mini-gemini": "◆"}
_HEIGHT = 300
_TOP, _BOTTOM = 12, 34
_LEFT, _RIGHT = 8.0, 94.0
"""Of the plot's width, in percent; labels stand beyond."""
_LINE = 12
"""Least distance between two labels, in pixels."""


def scores_plot(report: Report) -> str:
    """Every model's score on each benchmark, this model's with its interval; one line a benchmark."""
    comparison = report.comparison
    lines = []
    for name, column in comparison.columns.items():
        ours = comparison.rows[0].cells[name]
        marks = [
            _mark(row, row.cells[name], column.maximum)
            for row in sorted(comparison.rows, key=_drawn_last)
            if name in row.cells
        ]
        low, high = ours.ci95 or (ours.score, ours.score)
        whisker = (
            f'<div class="whisker" style="left:{_percent(low, column.maximum)};'
            f'width:{_percent(high - low, column.maximum)}"></div>'
        )
        lines.append(
            f'<div class="group">{escape(column.title)}</div><div class="track">{whisker}{"".join(marks)}</div>'
            f"<div>{figure(ours.score)}</div>"
        )
    return f'{_key(comparison.rows)}<div class="bars strip">{"".join(lines)}</div>'


def trade_off_plots(report: Report) -> str:
    """Score against visual tokens and, where two models have them, against FLOPs; empty without a trade-off."""
    if report.trade_off is None:
        return ""
    points = report.trade_off.points
    plots = [_scatter(points, "visual tokens of an image", lambda point: point.visual_tokens)]
    if sum(point.flops_per_sample is not None for point in points) >= 2:
        plots.append(_scatter(points, "FLOPs of a sample", lambda point: point.flops_per_sample))
    return f'<div class="plots">{"".join(plots)}</div>'


def _key(rows: Sequence[ComparisonRow]) -> str:
    entries = ['<span><i class="dot this"></i>this model, with its 95% interval</span>']
    if any(row.kind == "champion" for row in rows):
        entries.append('<span><i class="dot champion"></i>champion</span>')
    systems = dict.fromkeys(row.system for row in rows if row.system)
    entries += [
        f'<span><b class="glyph {system}">{_GLYPHS[system]}</b> {SYSTEM_TITLES[system]}</span>' for system in systems
    ]
    return f'<div class="key">{"".join(entries)}</div>'


def _drawn_last(row: ComparisonRow) -> int:
    return {"published": 0, "champion": 1, "this": 2}[row.kind]


def _mark(row: ComparisonRow, cell: Cell, maximum: float) -> str:
    interval = "" if cell.ci95 is None else f" ({span(cell.ci95)})"
    title = f'title="{escape(row.name)}: {figure(cell.score)}{interval}" style="left:{_percent(cell.score, maximum)}"'
    if row.kind == "published":
        return f'<span class="glyph at {row.system}" {title}>{_GLYPHS[row.system]}</span>'
    return f'<span class="dot at {row.kind}" {title}></span>'


def _percent(value: float, maximum: float) -> str:
    return f"{min(100.0, 100 * value / maximum):.2f}%"


def _scatter(points: Sequence[TradeOffPoint], label: str, cost: Callable[[TradeOffPoint], int | None]) -> str:
    costs = {number: value for number, point in enumerate(points, start=1) if (value := cost(point)) is not None}
    low, high = min(costs.values()), max(costs.values())
    start, end = math.log10(low), math.log10(max(high, low * 1.5))
    lowest, highest = min(point.score for point in points), max(point.score for point in points)
    bottom, top = lowest - 0.08 * (highest - lowest or 10), highest + 0.08 * (highest - lowest or 10)

    def across(value: float) -> float:
        return _LEFT + 6 + (_RIGHT - _LEFT - 12) * (math.log10(value) - start) / (end - start)

    def down(score: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - score) / (top - bottom)

    floor = _HEIGHT - _BOTTOM
    lines = [
        f'<line class="axis" x1="{_LEFT}%" x2="{_RIGHT + 4}%" y1="{floor}" y2="{floor}"/>',
        f'<line class="axis" x1="{_LEFT}%" x2="{_LEFT}%" y1="{_TOP}" y2="{floor}"/>',
    ]
    for score in dict.fromkeys((lowest, (lowest + highest) / 2, highest)):
        lines.append(
            f'<text class="tick" x="{_LEFT - 1}%" y="{down(score) + 4:.1f}" text-anchor="end">{score:.0f}</text>'
        )
    last = -100.0
    for value in sorted(set(costs.values())):
        if across(value) - last >= 17:
            last = across(value)
            lines.append(
                f'<text class="tick" x="{last:.1f}%" y="{floor + 15}" text-anchor="middle">{short_count(value)}</text>'
            )
    lines.append(f'<text class="tick" x="{_RIGHT + 4}%" y="{floor + 30}" text-anchor="end">{escape(label)} →</text>')
    placed: list[tuple[float, float]] = []
    for number in sorted(costs, key=lambda number: points[number - 1].score, reverse=True):
        point = points[number - 1]
        x, y = across(costs[number]), down(point.score)
        line = y + 4
        while any(abs(x - other) < 7 and abs(line - taken) < _LINE for other, taken in placed):
            line += 1
        placed.append((x, line))
        title = f"<title>{escape(point.name)}: {figure(point.score)}, {short_count(costs[number])}</title>"
        lines.append(_shape(point, x, y, title))
        lines.append(f'<text class="number" x="{x:.2f}%" dx="9" y="{line:.1f}">{number}</text>')
    described = f"Mean score against {label}"
    return (
        f'<svg class="plot" role="img" aria-label="{escape(described)}" width="100%" height="{_HEIGHT}">'
        f"{''.join(lines)}</svg>"
    )


def _shape(point: TradeOffPoint, x: float, y: float, title: str) -> str:
    if point.kind != "published":
        return f'<circle class="{point.kind}" cx="{x:.2f}%" cy="{y:.1f}" r="6">{title}</circle>'
    return (
        f'<text class="{point.system}" x="{x:.2f}%" y="{y + 5:.1f}" text-anchor="middle">{title}'
        f"{_GLYPHS[point.system]}</text>"
    )
