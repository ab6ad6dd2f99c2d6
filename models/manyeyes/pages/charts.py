"""Charts: where every bar, mark, line and label goes; ``charts.html`` draws them.

Widths are in percent, so that text keeps its size on a narrow screen; heights are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Ends = tuple[float, float]

_TOP, _BOTTOM = 14, 36
_LINE = 13
"""Least distance between two labels, in pixels."""
_LETTER = 6.8


class Mark(NamedTuple):
    """A sign on a bar; a dot where it has none. ``kind`` says its colour, as for ``Bar``."""

    at: float
    kind: str
    title: str = ""
    sign: str = ""


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart, or of a strip with marks on it.

    Attributes:
        label: At its left; a bar without one belongs to the bar above.
        value: At its right.
        fill: Where the bar ends.
        kind: Colour of the fill: ``on`` or ``off``.
        interval: Ends of the whiskers.
        joined: Ends of a broad line behind the marks.
        dashed: Where a dashed line stands.
        marks: The last one is on top.
        title: Shown when pointed at.
        value_kind: Colour of the value: ``good``, ``bad`` or ``quiet``.
        scale: What the ends of the line stand for; what is beyond is drawn at the end.
    """

    label: str
    value: str
    fill: float | None = None
    kind: str = "on"
    interval: Ends | None = None
    joined: Ends | None = None
    dashed: float | None = None
    marks: Sequence[Mark] = ()
    title: str = ""
    value_kind: str = ""
    scale: Ends = (0.0, 100.0)

    def at(self, value: float) -> float:
        """Where a value stands, in percent of the line."""
        low, high = self.scale
        return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 2)


class Stretch(NamedTuple):
    """A part of a timeline's row, from one second to another; ``kind`` says its colour."""

    start: float
    end: float
    kind: str
    title: str


@dataclass(frozen=True)
class Timeline:
    """What happened when, one row a thing.

    Attributes:
        rows: What stands at the left, its stretches, what stands at the right and the colour of that.
        seconds: How long all of it took: where the right edge is.
    """

    rows: Sequence[tuple[str, Sequence[Stretch], str, str]]
    seconds: float

    def at(self, second: float) -> float:
        """Where a second stands, in percent of the line."""
        return round(min(100.0, max(0.0, 100 * second / max(self.seconds, 1.0))), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Four or five moments: where they stand in percent, and in words."""
        steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
        days = 86400 * max(1, round(self.seconds / 5 / 86400))
        step = next((step for step in steps if self.seconds / step <= 5), days)
        # The words of one at the edge would stand beyond it.
        return [(self.at(second), _clock(second)) for second in range(0, int(0.95 * self.seconds) + 1, step)]


def _clock(seconds: int) -> str:
    if seconds >= 86400 and seconds % 86400 == 0:
        return f"{seconds // 86400}\N{NO-BREAK SPACE}d"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Point(NamedTuple):
    """One point of a scatter plot; ``kind`` says its colour, and without a ``sign`` it is a dot."""

    x: float
    y: float
    label: str
    title: str
    kind: str
    sign: str = ""


class Curve(NamedTuple):
    """One line over a common x axis; ``kind`` says its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "on"


class Line(NamedTuple):
    """From ``(x1, y1)`` to ``(x2, y2)``."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = "axis"


class Label(NamedTuple):
    """A text that starts, ends or has its middle ``shift`` pixels beside ``x``."""

    x: float
    y: float
    text: str
    kind: str = "tick"
    anchor: str = "start"
    shift: float = 0


class Box(NamedTuple):
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """What ``charts.html`` draws as SVG.

    Attributes:
        description: For those who cannot see it.
        height: In pixels.
        least_width: In pixels; a narrower screen scrolls.
        points: With ``x`` and ``y`` as they are drawn.
        curves: Name, colour, and the points in percent of the field between ``top`` and ``bottom``.
    """

    description: str
    height: int
    least_width: int = 0
    lines: Sequence[Line] = ()
    labels: Sequence[Label] = ()
    boxes: Sequence[Box] = ()
    points: Sequence[Point] = ()
    curves: Sequence[Curve] = ()
    top: int = _TOP
    bottom: int = _BOTTOM


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str = "",
    logarithmic: bool = False,
    width: int = 280,
    height: int = 300,
    ticks: Mapping[float, str] | None = None,
) -> Drawing:
    """Points with their labels, none on another.

    Args:
        points: At least one.
        x_label: Below the axis.
        y_label: Above the axis.
        logarithmic: Whether the x axis is.
        width: In pixels, down to which labels do not touch; with labels of words the page scrolls below it.
        height: In pixels.
        ticks: Of the x axis, those left out that have no room; the ends when not given.
    """
    across = math.log10 if logarithmic else float
    xs, ys = [across(point.x) for point in points], [point.y for point in points]
    left, right = min(xs), max(*xs, min(xs) + (math.log10(1.5) if logarithmic else 1e-9))
    low, high = min(ys), max(ys)
    room = high - low or 10.0
    words = max(len(point.label) for point in points) > 2
    floor, end = height - _BOTTOM, 80.0 if words else 92.0

    def place(x: float, y: float) -> tuple[float, float]:
        down = (high + 0.08 * room - y) / (1.16 * room)
        return 5 + (end - 5) * (across(x) - left) / (right - left), _TOP + (floor - _TOP) * down

    lines = [Line(0, floor, 100, floor), Line(0, _TOP, 0, floor)]
    if low < 0 < high:
        zero = place(points[0].x, 0.0)[1]
        lines.append(Line(0, zero, 100, zero, "axis dashed"))
    shown = dict.fromkeys((low, high) if words else (low, (low + high) / 2, high))
    labels = [
        Label(0, place(points[0].x, y)[1] + 4, f"{y:.2f}" if words else f"{y:.0f}", "tick", "end", -6) for y in shown
    ]
    last = -100.0
    for x, text in (ticks or {min(p.x for p in points): "", max(p.x for p in points): ""}).items():
        if (at := place(x, low)[0]) - last >= 17:
            last = at
            labels.append(Label(at, floor + 16, text or f"{x:.2f}", "tick", "middle"))
    labels.append(Label(100, floor + 31, f"{x_label} →", "tick", "end"))
    labels += [Label(0, 10, f"{y_label} ↑")] if y_label else []
    placed: list[Point] = []
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: -point.y):
        x, y = place(point.x, point.y)
        long = _LETTER * len(point.label)
        flipped = x * width / 100 + 9 + long > width + 20
        start, line = x * width / 100 + (-9 - long if flipped else 9), y + 4
        while any(abs(line - other) < _LINE and start < stop and begin < start + long for begin, stop, other in taken):
            line += 1
        taken.append((start, start + long, line))
        if line - y > 6:
            lines.append(Line(x, y, x + (-900 if flipped else 900) / width, line - 4, "leader"))
        placed.append(point._replace(x=x, y=y))
        labels.append(Label(x, line, point.label, "name", *(("end", -9) if flipped else ("start", 9))))
    bottom = max(height, math.ceil(max(line for _, _, line in taken)) + _LINE)
    what = f"{y_label} against {x_label}" if y_label else f"Score against {x_label}"
    return Drawing(what, bottom, width if words else 0, lines=lines, labels=labels, points=placed)


def draw_curves(
    curves: Sequence[Curve], *, x_label: str, y_label: str, height: int = 260, from_zero: bool = True
) -> Drawing:
    """Lines over a common x axis; without lines where there are fewer than two points.

    Args:
        curves: With a point at least, two together.
        x_label: Below the axis.
        y_label: For those who cannot see it.
        height: In pixels.
        from_zero: Whether the y axis has 0 on it; otherwise it is as long as the curves need.
    """
    points = [point for curve in curves for point in curve.points]
    if len(points) < 2:
        return Drawing(y_label, 0)
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low = min(0.0, low) if from_zero else low
    wide, tall = (high_x - low_x) or 1.0, (high - low) or 1.0
    floor = height - _BOTTOM
    lines, labels = [], []
    for part in range(5):
        y = floor - (floor - _TOP) * part / 4
        lines.append(Line(0, y, 100, y))
        labels.append(Label(0, y + 4, f"{low + tall * part / 4:.3g}", "tick", "end", -6))
    for x, text, anchor in ((0, f"{low_x:.0f}", "start"), (50, x_label, "middle"), (100, f"{high_x:.0f}", "end")):
        labels.append(Label(x, floor + 18, text, "tick", anchor))
    scaled = [
        curve._replace(points=[(100 * (x - low_x) / wide, 100 * (high - y) / tall) for x, y in curve.points])
        for curve in curves
    ]
    return Drawing(y_label, height, lines=lines, labels=labels, curves=scaled)


def draw_bars(heights: Sequence[int], *, titles: Sequence[str], below: tuple[str, str, str]) -> Drawing:
    """Upright bars of one width.

    Args:
        heights: At least one above zero.
        titles: Of each bar, shown when pointed at.
        below: At the left end, in the middle, and at the right end.
    """
    width, top, floor = 100 / len(heights), max(heights), 100
    boxes = [
        Box(number * width + 0.2, floor - 96 * height / top, width - 0.4, 96 * height / top, title)
        for number, (height, title) in enumerate(zip(heights, titles, strict=True))
    ]
    labels = [
        Label(x, 115, text, "tick", anchor)
        for x, text, anchor in zip((0, 50, 100), below, ("start", "middle", "end"), strict=True)
    ]
    return Drawing(" ".join(below), 120, boxes=boxes, labels=labels)
