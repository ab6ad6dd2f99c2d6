"""``report.html`` and ``report.md``: a report as one self-contained page, and for a terminal or the Kubeflow UI."""

from __future__ import annotations

from collections.abc import Mapping

from manyeyes.evaluation.report import looking
from manyeyes.evaluation.report import tables as report_tables
from manyeyes.evaluation.report import tables as report_words
from manyeyes.evaluation.report.comparison import SYSTEM_TITLES
from manyeyes.evaluation.report.contents import Report
from manyeyes.evaluation.scorecard import BenchmarkScore, Interval
from manyeyes.pages import Bar, Drawing, Mark, Point, make_picture, render, scatter, short_count, span, two_decimals
from manyeyes.runtime.preprocess import decode_image

SIGNS = {"llava": "●", "eagle": "▲", "cambrian": "■", "mini-gemini": "◆"}
_DRAWN_LAST = {"published": 0, "champion": 1, "this": 2}


def render_html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The whole report as one HTML file without scripts or references.

    Args:
        report: What it says.
        pictures: Image files by sha256, for the examples; those that are missing are named instead.

    Raises:
        RecordError: A picture cannot be decoded.
    """
    return render(
        "report.html",
        title=report.title,
        report=report,
        card=report.scorecard,
        tables=report_tables,
        words=report_words,
        looking=looking,
        pictures={sha256: make_picture(decode_image(data)) for sha256, data in pictures.items()},
        score_bars=_score_bars(report),
        systems={
            row.system: (SIGNS[row.system], SYSTEM_TITLES[row.system]) for row in report.comparison.rows if row.system
        },
        trade_off_plots=_trade_off_plots(report),
        type_bars=_type_bars,
    )


def render_markdown(report: Report) -> str:
    """The whole report as Markdown, pictures left out."""
    return render(
        "report.md",
        report=report,
        card=report.scorecard,
        tables=report_tables,
        words=report_words,
        looking=looking,
    )


def _score_bars(report: Report) -> list[Bar]:
    """Every model's score on each benchmark, this model's with its interval; one line a benchmark."""
    comparison = report.comparison
    bars = []
    for name, column in comparison.columns.items():
        ours = comparison.rows[0].cells[name]
        marks = [
            Mark(
                cell.score,
                row.system if row.kind == "published" else row.kind,
                f"{row.name}: {two_decimals(cell.score)}" + ("" if cell.ci95 is None else f" ({span(cell.ci95)})"),
                SIGNS[row.system] if row.kind == "published" else "",
            )
            for row in sorted(comparison.rows, key=lambda row: _DRAWN_LAST[row.kind])
            if (cell := row.cells.get(name)) is not None
        ]
        bars.append(
            Bar(column.title, two_decimals(ours.score), interval=ours.ci95, marks=marks, scale=(0.0, column.maximum))
        )
    return bars


def _trade_off_plots(report: Report) -> list[Drawing]:
    """Score against visual tokens and, where two models have them, against FLOPs."""
    if report.trade_off is None:
        return []
    numbered = list(enumerate(report.trade_off.points, start=1))
    costs: list[tuple[str, list[int | None]]] = [
        ("visual tokens of an image", [point.visual_tokens for _, point in numbered]),
        ("FLOPs of a sample", [point.flops_per_sample for _, point in numbered]),
    ]
    plots = []
    for label, values in costs:
        points = [
            Point(
                cost,
                point.score,
                str(number),
                f"{point.name}: {two_decimals(point.score)}, {short_count(cost)}",
                point.system if point.kind == "published" else point.kind,
                SIGNS[point.system] if point.kind == "published" else "",
            )
            for (number, point), cost in zip(numbered, values, strict=True)
            if cost is not None
        ]
        if len(points) >= 2:
            ticks = {x: short_count(x) for x in sorted({point.x for point in points})}
            plots.append(scatter(points, x_label=label, logarithmic=True, ticks=ticks))
    return plots


def _type_bars(score: BenchmarkScore) -> list[Bar]:
    """With and without the image: all questions, and each type of answer where there are several."""
    scale = 100 / score.maximum
    ends, ends_off = ((low * scale, high * scale) for low, high in (score.ci95, score.image_off_ci95))
    bars = _pair(f"all ({score.n:,})", score.score * scale, ends, score.image_off * scale, ends_off, score)
    if len(score.by_type) > 1:
        for name, part in score.by_type.items():
            bars += _pair(f"{name} ({part.n:,})", part.score, part.ci95, part.image_off, part.image_off_ci95, None)
    return bars


def _pair(
    label: str, on: float, on_ci: Interval, off: float, off_ci: Interval, ceiling_of: BenchmarkScore | None
) -> list[Bar]:
    ceiling = None if ceiling_of is None else ceiling_of.question_only_ceiling
    return [
        Bar(label, f"{on:.2f}%", on, "on", on_ci, title=f"{on:.2f}% ({span(on_ci)})"),
        Bar("", f"{off:.2f}%", off, "off", off_ci, dashed=ceiling, title=f"{off:.2f}% ({span(off_ci)})"),
    ]
