"""``correlation.html``: benchmarks as points on two components, and the matrix of their correlations, by group."""

from __future__ import annotations

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.statistics.correlation import BenchmarkCorrelation
from manyeyes.pages import Point, render, scatter

_NUM_COLOURS = 8


def render_correlation(found: BenchmarkCorrelation) -> str:
    """The page as one HTML file without scripts or references."""
    kinds = {name: f"group-{group % _NUM_COLOURS}" for name, group in found.groups.items()}
    groups = []
    for number in sorted(set(found.groups.values())):
        members = [name for name, group in found.groups.items() if group == number]
        known = {BENCHMARKS[name].cambrian_group or "" for name in members if name in BENCHMARKS} - {""}
        groups.append((kinds[members[0]], ", ".join(members), ", ".join(sorted(known))))
    points = [Point(x, y, name, name, kinds[name]) for name, (x, y) in found.loadings.items()]
    return render(
        "correlation.html",
        title=f"How {len(found.benchmarks)} benchmarks go together over {len(found.models)} models",
        found=found,
        shares=[f"{100 * share:.0f}%" for share in found.explained[:2]],
        groups=groups,
        plot=scatter(points, x_label="first component", y_label="second component", width=640, height=600),
        matrix=[(name, kinds[name], row) for name, row in zip(found.benchmarks, found.correlation, strict=True)],
    )
