"""``contamination.html``: what training data and benchmarks share, with the pairs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manyeyes.data.contamination.findings import (
    BenchmarkFindings,
    ContaminationReport,
    DatasetFindings,
    Pair,
    in_training,
)
from manyeyes.data.validation_page import show_image
from manyeyes.pages import Table, Text, render

# Label to field.
_IMAGE_COLUMNS = {
    "images": "images",
    "exact": "exact",
    "near": "near",
    "mirrored": "mirrored",
    "not decidable": "undecidable",
    "unreadable": "unreadable",
}
_BENCHMARK_COLUMNS = {**_IMAGE_COLUMNS, "texts": "texts", "overlapping": "overlapping", "too short": "too_short"}
_DATASET_COLUMNS = {**_IMAGE_COLUMNS, "samples with such a text": "overlapping", "samples found": "samples"}


def render_contamination(report: ContaminationReport, *, pictures: Mapping[Pair, tuple[bytes, bytes]]) -> str:
    """Render the page.

    Args:
        report: What was found.
        pictures: Of the examples: training's image file and the benchmark's.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    return render(
        "contamination.html",
        title="Contamination",
        report=report,
        benchmarks=_table("benchmark", _BENCHMARK_COLUMNS, report.benchmarks),
        datasets=_table("data set", _DATASET_COLUMNS, report.datasets),
        pairs=[(pair, [show_image(data) for data in pictures.get(pair, ())]) for pair in report.examples],
    )


def _table(what: str, columns: Mapping[str, str], rows: Sequence[BenchmarkFindings | DatasetFindings]) -> Table:
    cells: list[list[str | Text]] = []
    for row in rows:
        share = [in_training(row)] if isinstance(row, BenchmarkFindings) else []
        cells.append([Text(row.name, kind="strong"), *(f"{getattr(row, key):,}" for key in columns.values()), *share])
    header = [what, *columns, *(["in training"] if what == "benchmark" else [])]
    return Table(header, cells, numbers=range(1, len(header)), stacked=True)
