"""``contamination.html``: what training data and benchmarks share, with the pairs side by side."""

from __future__ import annotations

from collections.abc import Mapping

from manyeyes.data.contamination.findings import ContaminationReport, Pair, in_training
from manyeyes.data.validation_page import show_image
from manyeyes.pages import render


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
        in_training=in_training,
        pairs=[(pair, [show_image(data) for data in pictures.get(pair, ())]) for pair in report.examples],
    )
