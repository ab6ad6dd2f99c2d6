"""What an import found: ``import.json``, a Markdown note, and a page with a look at the samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from manyeyes.data.quarantine import QUARANTINE_FILE, QuarantinedSample
from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.validation_report import show_image
from manyeyes.pages import Table, render
from manyeyes.strict import StrictModel

_SAMPLES = 8
_LEFT_OUT = 50
_SOURCES = 100


class ImportReport(StrictModel):
    """``import.json``: what became of every item of a source. The same import gives the same bytes."""

    format_version: int = Field(default=1, description="Version of this file's format.")
    dataset: str = Field(description="The data set that was made.")
    kind: str = Field(description="Format of the source.")
    title: str = Field(description="Name of the published data set; empty for one's own data.")
    files: list[str] = Field(description="The data files, without their folders; twenty at most.")
    items: int = Field(ge=0, description="In the source; each is kept or in quarantine.jsonl.")
    kept: int = Field(ge=0, description="Records that were written.")
    images: int = Field(ge=0, description="In the records, each counted as often as it is used.")
    distinct_images: int = Field(ge=0, description="Images of different bytes (by 64 bits of their sha256).")
    text_only: int = Field(ge=0, description="Records without an image.")
    shards: int = Field(ge=0, description="Parquet files.")
    reasons: dict[str, int] = Field(description="Items in quarantine, by what is wrong with them.")
    repairs: dict[str, int] = Field(
        description="Records that were changed as the original programs do, by what was done."
    )
    sources: dict[str, int] = Field(description="Records by the source that they name.")

    @property
    def quarantined(self) -> int:
        """Items that were left out."""
        return self.items - self.kept

    def tables(self) -> dict[str, Table]:
        """Counts with their headings; those that have none are left out."""
        sources = sorted(self.sources.items(), key=lambda entry: -entry[1])[:_SOURCES]
        found = {
            "Left out": ("reason", self.reasons.items()),
            "Changed as the original programs do": ("what was done", self.repairs.items()),
            "Records by source": ("source", sources if len(sources) > 1 else ()),
        }
        return {
            title: Table((head, "samples"), [[name, f"{count:,}"] for name, count in rows], numbers=(1,))
            for title, (head, rows) in found.items()
            if rows
        }

    def as_markdown(self) -> str:
        """A short account for a page that shows Markdown."""
        return render("import.md", report=self, tables=self.tables())


def render_import(report: ImportReport, *, samples: Sequence[Record], left_out: Sequence[QuarantinedSample]) -> str:
    """Render the page.

    Args:
        report: What was found.
        samples: Some of the records.
        left_out: The first items of the quarantine.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    return render(
        "import.html",
        title=f"Import: {report.dataset}",
        report=report,
        tables=report.tables(),
        samples=samples,
        left_out=left_out,
        show=lambda record: show_image(record.images[0].data),
    )


def draw_samples(folder: Path) -> tuple[list[Record], list[QuarantinedSample]]:
    """Some records of a data set's folder, evenly spaced, and the first items of its quarantine."""
    reader = RecordReader(sorted(folder.glob("*.parquet")))
    step = max(1, len(reader) // _SAMPLES)
    with (folder / QUARANTINE_FILE).open("rb") as file:
        left_out = [QuarantinedSample.model_validate_json(line) for line in itertools.islice(file, _LEFT_OUT)]
    return [reader.read(index) for index in range(0, len(reader), step)][:_SAMPLES], left_out
