"""Parts of the reports of steps: tables of facts and loss curves, as HTML and Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from manyeyes.evaluation import page

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 260, 68, 34, 12


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: Shown in the legend.
        points: ``(x, y)`` pairs.
        colour: Any CSS colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "var(--on)"


def section(title: str, body: str) -> str:
    """A heading and HTML below it."""
    return f"<h2>{html.escape(title)}</h2>\n{body}\n"


def heading(title: str, sentence: str = "") -> str:
    """The page's heading, and a sentence that says what the page shows."""
    return f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(sentence)}</p>\n"


def facts(rows: Sequence[tuple[str, object]]) -> str:
    """An HTML table of names and values."""
    return page.table(["", ""], [[html.escape(name), html.escape(readable(value))] for name, value in rows])


def markdown_facts(rows: Sequence[tuple[str, object]]) -> str:
    """The same as a Markdown table."""
    return page.markdown_table(["", ""], [[name, readable(value)] for name, value in rows]) + "\n"


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Lines over a common x axis as inline SVG; a sentence when there is nothing to draw."""
    points = [point for line in series for point in line.points]
    if len(points) < 2:
        return "<p>Too few points for a curve.</p>"
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def place(x: float, y: float) -> str:
        left = _LEFT + (x - low_x) / span_x * (_WIDTH - _LEFT - 8)
        top = _TOP + (high_y - y) / span_y * (_HEIGHT - _BOTTOM - _TOP)
        return f"{left:.1f},{top:.1f}"

    grid = []
    for part in range(5):
        value = low_y + span_y * part / 4
        top = float(place(low_x, value).split(",")[1])
        grid.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{top}" y2="{top}" stroke="var(--line)"/>')
        grid.append(_text(_LEFT - 6, top + 4, "end", f"{value:.3g}"))
    lines = [
        f'<polyline fill="none" stroke="{line.colour}" stroke-width="1.6" '
        f'points="{" ".join(place(x, y) for x, y in line.points)}"><title>{html.escape(line.name)}</title></polyline>'
        for line in series
    ]
    bottom = _HEIGHT - 8
    axis = (
        _text(_LEFT, bottom, "start", f"{low_x:.0f}")
        + _text((_WIDTH + _LEFT) / 2, bottom, "middle", x_label)
        + _text(_WIDTH - 8, bottom, "end", f"{high_x:.0f}")
    )
    legend = " · ".join(f'<span style="color:{line.colour}">■</span> {html.escape(line.name)}' for line in series)
    return (
        f'<figure style="margin:0"><svg style="width:100%;height:auto" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(y_label)}">{"".join(grid)}{"".join(lines)}{axis}</svg>'
        f'<figcaption class="quiet">{html.escape(y_label)}: {legend}</figcaption></figure>'
    )


def _text(x: float, y: float, anchor: str, text: str) -> str:
    style = 'font-size="11" fill="var(--quiet)"'
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {style}>{html.escape(text)}</text>'


def readable(value: object) -> str:
    """A value as a person writes it: thousands separated, four digits that count."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
