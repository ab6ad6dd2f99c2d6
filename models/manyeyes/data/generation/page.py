"""``generation.html``: what was looked at, what each step refused and why, and records to look at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.validation_report import show_image
from manyeyes.pages import Table, render

if TYPE_CHECKING:
    from manyeyes.data.generation.dataset import GenerationReport, RefusedItem

SHOWN_REFUSALS = 50
_SHOWN_RECORDS = 12


def render_generation(
    report: GenerationReport, *, dataset: str, samples: Sequence[Record], refused: Sequence[RefusedItem]
) -> str:
    """Render the page.

    Args:
        report: What was found.
        dataset: Its name.
        samples: Some of the records.
        refused: The first refused items.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    return render(
        "generation.html",
        title=f"Generated: {dataset}",
        report=report,
        dataset=dataset,
        tables={
            title: _counts(head, counts)
            for title, head, counts in (
                ("Looked at", "what", report.looked_at),
                ("Refused", "what it did not pass", report.refusals),
            )
            if counts
        },
        samples=samples,
        refused=refused,
        show=lambda record: show_image(record.images[0].data),
    )


def draw_records(folder: Path) -> list[Record]:
    """Some records of a data set's folder, evenly spaced."""
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        return []
    reader = RecordReader(shards)
    step = max(1, len(reader) // _SHOWN_RECORDS)
    return [reader.read(index) for index in itertools.islice(range(0, len(reader), step), _SHOWN_RECORDS)]


def _counts(head: str, counts: Mapping[str, int]) -> Table:
    return Table((head, "count"), [[name, f"{count:,}"] for name, count in counts.items()], numbers=(1,))
