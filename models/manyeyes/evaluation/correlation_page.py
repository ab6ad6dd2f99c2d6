"""``correlation.html``: benchmarks as points on two components, and the matrix of their correlations, by group."""

from __future__ import annotations

from html import escape

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.correlation import BenchmarkCorrelation
from manyeyes.evaluation.page import page, table

# Light enough for the dark page and dark enough for the light one.
_COLOURS = ("#3b82f6", "#e08a1e", "#2f9e68", "#c6538c", "#8b6fd6", "#0f9fb0", "#a07a3b", "#7a8794")
_SIDE, _EDGE, _LABELS, _LINE = 640, 50, 110, 15
_LETTER = 6.6


def render_correlation(found: BenchmarkCorrelation) -> str:
    """The page as one HTML file without scripts or references."""
    title = f"How {len(found.benchmarks)} benchmarks go together over {len(found.models)} models"
    shares = [f"{100 * share:.0f}%" for share in found.explained[:2]]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>The first component explains {shares[0]} of the variance"
        + (f", the second {shares[1]}" if len(shares) > 1 else "")
        + f" over the {len(found.models_in_components)} models that have every benchmark. Groups: average linkage on "
        "1 - r. With few models both are uncertain; the sign of a component means nothing.</p>",
        "<h2>Groups</h2>",
        _groups(found),
        "<h2>Components</h2>",
        f'<div class="scroll">{_scatter(found)}</div>',
        "<h2>Correlation</h2>",
        _matrix(found),
    ]
    return page(title, "\n".join(parts))


def _colour(group: int) -> str:
    return _COLOURS[group % len(_COLOURS)]


def _groups(found: BenchmarkCorrelation) -> str:
    rows = []
    for number in sorted(set(found.groups.values())):
        members = [name for name, group in found.groups.items() if group == number]
        known = {BENCHMARKS[name].cambrian_group or "" for name in members if name in BENCHMARKS} - {""}
        style = f"display:inline-block;width:.8rem;height:.8rem;border-radius:50%;background:{_colour(number)}"
        dot = f'<i style="{style}"></i>'
        rows.append([dot, escape(", ".join(members)), escape(", ".join(sorted(known)))])
    return table(["", "benchmarks", "Cambrian-1's groups of these"], rows)


def _scatter(found: BenchmarkCorrelation) -> str:
    """Loadings, as large as they fit; labels that would overlap are moved down."""
    lows, highs = zip(
        *((min(values), max(values)) for values in zip(*found.loadings.values(), strict=True)), strict=True
    )
    spans = [max(high - low, 0.1) for low, high in zip(lows, highs, strict=True)]

    def place(loading: tuple[float, float]) -> tuple[float, float]:
        shares = [(value - low) / span for value, low, span in zip(loading, lows, spans, strict=True)]
        return _EDGE + (_SIDE - _EDGE - _LABELS) * shares[0], _SIDE - _EDGE - (_SIDE - 2 * _EDGE) * shares[1]

    dots, labels = [], []
    taken: list[tuple[float, float, float]] = []
    for name, loading in sorted(found.loadings.items(), key=lambda entry: -entry[1][1]):
        x, y = place(loading)
        width = _LETTER * len(name)
        start = x + 9 if x + 9 + width < _SIDE else x - 9 - width
        line = y + 4
        while any(abs(line - other) < _LINE and start < end and left < start + width for left, end, other in taken):
            line += 2
        taken.append((start, start + width, line))
        colour = _colour(found.groups[name])
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(name)}</title></circle>')
        if abs(line - y - 4) > 1:
            dots.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{start:.1f}" y2="{line - 4:.1f}" stroke="{colour}" opacity=".6"/>'
            )
        labels.append(f'<text x="{start:.1f}" y="{line:.1f}">{escape(name)}</text>')
    left, right, bottom = _EDGE - 15, _SIDE - 2, _SIDE - _EDGE + 15
    zero = place((0.0, 0.0))[1]
    ticks = [(place((value, lows[1]))[0], bottom + 14.0, value) for value in (lows[0], highs[0])]
    ticks += [(2.0, place((lows[0], value))[1] + 4, value) for value in (lows[1], highs[1])]
    height = max(_SIDE + _LINE, max(line for _, _, line in taken) + _LINE)
    return (
        f'<svg viewBox="0 0 {_SIDE} {height:.0f}" width="{_SIDE}" role="img" '
        f'aria-label="Loadings of the benchmarks on the first two components" '
        f'style="max-width:100%;height:auto;font:12px system-ui,sans-serif" fill="currentColor">'
        f'<path d="M{left} 20V{bottom}H{right}" fill="none" stroke="var(--line)"/>'
        + (f'<path d="M{left} {zero:.1f}H{right}" stroke="var(--line)" stroke-dasharray="4"/>' if zero < bottom else "")
        + "".join(f'<text x="{x:.1f}" y="{y:.1f}" fill="var(--quiet)">{value:.2f}</text>' for x, y, value in ticks)
        + f'<text x="{right}" y="{bottom + 30}" text-anchor="end" fill="var(--quiet)">first component →</text>'
        + f'<text x="2" y="14" fill="var(--quiet)">second component ↑</text>{"".join(dots)}{"".join(labels)}</svg>'
    )


def _matrix(found: BenchmarkCorrelation) -> str:
    header = ["", *(str(number) for number in range(1, len(found.benchmarks) + 1))]
    rows = []
    for number, (name, row) in enumerate(zip(found.benchmarks, found.correlation, strict=True), start=1):
        colour = _colour(found.groups[name])
        style = f"border-left:.4rem solid {colour};padding-left:.4rem"
        label = f'<span class="nowrap" style="{style}">{number} {escape(name)}</span>'
        rows.append([label, *(_cell(value) for value in row)])
    return table(header, rows, numbers=list(range(1, len(header))))


def _cell(value: float | None) -> str:
    if value is None:
        return '<span title="fewer than three models have both">?</span>'
    share = round(55 * abs(value))
    colour = "--on" if value >= 0 else "--bad"
    return (
        f'<span style="display:block;padding:0 .3rem;background:color-mix(in srgb,var({colour}) {share}%,transparent)">'
        f"{value:.2f}</span>"
    )
