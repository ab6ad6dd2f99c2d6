"""The contamination report as one HTML file, with the pairs side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from manyeyes.data.contamination.report import (
    BenchmarkFindings,
    ContaminationReport,
    DatasetFindings,
    Pair,
    in_training,
)
from manyeyes.data.report import render_page
from manyeyes.errors import RecordError
from manyeyes.runtime.preprocess import decode_image

_THUMBNAIL = 128

# Label to field.
_IMAGE_COLUMNS = {
    "images": "images",
    "exact": "exact",
    "near": "near",
    "mirrored": "mirrored",
    "not decidable": "undecidable",
    "unreadable": "unreadable",
}
_BENCHMARK_COLUMNS = {
    **_IMAGE_COLUMNS,
    "texts": "texts",
    "overlapping": "overlapping",
    "too short": "too_short",
}
_DATASET_COLUMNS = {**_IMAGE_COLUMNS, "samples with such a text": "overlapping", "samples found": "samples"}


def render_contamination(report: ContaminationReport, *, pictures: Mapping[Pair, tuple[bytes, bytes]]) -> str:
    """Render the report.

    Args:
        report: What was found.
        pictures: Of the examples: training's image file and the benchmark's.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    limits = report.thresholds
    fate = "left out of training" if report.left_out else "<b>not</b> left out of training"
    body = [
        "<h1>Contamination</h1>",
        f'<p class="soft">Snapshot <code>{report.data_md5}</code></p>',
        f"<p>{report.headline()}; these samples are {fate}.</p>",
        "<h2>Benchmarks</h2>",
        _table("benchmark", _BENCHMARK_COLUMNS, report.benchmarks),
        "<h2>Training data</h2>",
        _table("data set", _DATASET_COLUMNS, report.datasets),
        "<h2>What counts</h2>",
        f"<p>Exact: the same bytes. Near: difference hashes (64 bits) at most {limits.radius} bits apart, and then a "
        f"mean absolute difference of at most {limits.max_difference:g} of 255 at 64x64 pixels. Mirrored: the same "
        f"with one of the two mirrored. Images below {limits.min_entropy:g} bits a pixel show too little to be told "
        f"apart: they are not decidable, and only their bytes are compared. A text overlaps when one training "
        f"text holds {100 * limits.min_share:g}% of its {limits.words}-grams.</p>",
        _examples(report.examples, pictures),
    ]
    return render_page("Contamination", "\n".join(body))


def _table(what: str, columns: Mapping[str, str], rows: Sequence[BenchmarkFindings] | Sequence[DatasetFindings]) -> str:
    body = []
    for row in rows:
        values = {label: f"{getattr(row, field):,}" for label, field in columns.items()}
        if isinstance(row, BenchmarkFindings):
            values["in training"] = in_training(row)
        cells = "".join(f'<td class="number" data-label="{label}">{value}</td>' for label, value in values.items())
        body.append(f"<tr><td><b>{escape(row.name)}</b></td>{cells}</tr>")
    labels = [what, *columns, *(["in training"] if what == "benchmark" else [])]
    head = "".join(f"<th>{label}</th>" for label in labels)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _examples(examples: Sequence[Pair], pictures: Mapping[Pair, tuple[bytes, bytes]]) -> str:
    if not examples:
        return "<h2>Pairs</h2><p>None.</p>"
    cards = []
    for pair in examples:
        name = f"<code>{escape(pair.dataset)}: {escape(pair.id)}</code>"
        shown = "".join(_image_tag(data) for data in pictures.get(pair, ()))
        cards.append(
            f'<div class="card sample">{shown}<b>{pair.kind}</b><p>{name}</p>'
            f'<p class="soft">{escape(pair.reason())}</p></div>'
        )
    return (
        '<h2>Pairs</h2><p class="soft">A few of each kind: training, then the benchmark.</p>'
        f'<div class="samples">{"".join(cards)}</div>'
    )


def _image_tag(data: bytes) -> str:
    try:
        image = Image.fromarray(decode_image(data))
    except RecordError:
        return '<p class="soft">The image cannot be shown.</p>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
