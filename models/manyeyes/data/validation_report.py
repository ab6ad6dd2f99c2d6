"""What validation found: as JSON, as Markdown, and as ``validation.html`` with a look at the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from manyeyes.data.profile import read_columns, take_rows
from manyeyes.data.quarantine import QuarantinedSample
from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import RecordError
from manyeyes.pages import Bar, Drawing, Picture, Table, Text, draw_bars, make_picture, render
from manyeyes.runtime.preprocess import decode_image
from manyeyes.strict import StrictModel

Severity = Literal["critical", "warning", "info"]


class ExpectationOutcome(StrictModel):
    """What became of one expectation of the suite."""

    name: str = Field(description="Its name in the suite.")
    severity: Severity = Field(description="Only critical ones decide the verdict.")
    success: bool = Field(description="Whether the profile meets it.")
    unexpected_count: int = Field(ge=0, description="Samples that do not.")
    unexpected_percent: float = Field(ge=0, le=100, description="The same in percent of the samples it looks at.")
    examples: tuple[str, ...] = Field(description="Ids of a few of these samples.")
    explanation: str = Field(description="What is expected, in a sentence; or why it could not be checked.")


class ValidationReport(StrictModel):
    """``validation.json``: whether a snapshot is fit to train on."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    verdict: Literal["passed", "failed"] = Field(description="failed when a critical expectation is not met.")
    data_md5: str = Field(description="Of the snapshot, as DVC computes it, without .dir.")
    suite: str = Field(description="Name of the suite.")
    suite_sha256: str = Field(description="Of the suite's file, hexadecimal.")
    datasets: dict[str, int] = Field(description="Samples by data set, evaluation sets included.")
    eval_datasets: tuple[str, ...] = Field(description="Data sets that the others must not contain.")
    rows: int = Field(ge=0, description="Samples looked at.")
    quarantined: int = Field(ge=0, description="Samples that cannot be used; quarantine.jsonl says why.")
    contaminated_images: int = Field(
        ge=0, description="Images of the other data sets that an evaluation set has too (exact sha256 of the bytes)."
    )
    expectations: tuple[ExpectationOutcome, ...] = Field(description="In the suite's order.")

    def failures(self) -> list[ExpectationOutcome]:
        """The critical expectations that are not met."""
        return [outcome for outcome in self.expectations if outcome.severity == "critical" and not outcome.success]

    def as_markdown(self) -> str:
        """A short account for a page that shows Markdown."""
        rows = [
            [
                outcome.name,
                outcome.severity,
                "yes" if outcome.success else Text("no", mark="**"),
                f"{outcome.unexpected_count:,} ({outcome.unexpected_percent:.2f}%)",
                outcome.explanation,
            ]
            for outcome in self.expectations
        ]
        table = Table(("expectation", "severity", "met", "samples against it", "what it says"), rows)
        return render("validation.md", report=self, expectations=table)


_NUM_SHOWN = 8
_NUM_BAD_SHOWN = 24
_NUM_BARS = 16
_SHOWN_COLUMNS = (
    *("dataset", "is_eval", "problem", "n_images", "width", "height", "n_turns", "text_chars", "n_tokens"),
)


def render_validation(report: ValidationReport, *, profile: Path, snapshot: Snapshot) -> str:
    """Render the page.

    Args:
        report: What was found.
        profile: The profile that it is about, a Parquet file.
        snapshot: Where the images are.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    facts = read_columns(profile, _SHOWN_COLUMNS)
    fine = facts["problem"] == ""
    bad = take_rows(profile, np.flatnonzero(~fine)[:_NUM_BAD_SHOWN].tolist(), ["dataset", "row", "id", "problem"])
    usable = np.flatnonzero(fine & ~facts["is_eval"])
    spread = np.unique(np.linspace(0, len(usable) - 1, min(_NUM_SHOWN, len(usable))).astype(int))
    samples = take_rows(profile, usable[spread].tolist(), ["dataset", "row"])
    quarantine = [
        QuarantinedSample(dataset=row.dataset, row=row.row, id=row.id, reason=row.problem)
        for row in bad.itertuples(index=False)
    ]
    return render(
        "validation.html",
        title=f"Data validation: {report.verdict}",
        report=report,
        bad=list(zip(quarantine, _read_rows(bad, snapshot=snapshot), strict=True)),
        samples=[record for record in _read_rows(samples, snapshot=snapshot) if record],
        charts=_distributions(facts),
        entries={name: snapshot.dataset(name) for name in report.datasets},
        show=lambda record: show_image(record.images[0].data),
    )


def show_image(data: bytes) -> Picture | None:
    """An image file as a page shows it; ``None`` when it cannot be decoded."""
    try:
        return make_picture(decode_image(data))
    except RecordError:
        return None


def _distributions(profile: pd.DataFrame) -> dict[str, list[Bar] | Drawing]:
    if profile.empty:
        return {}
    # A label for each sample would take more memory than the profile.
    sizes = profile.groupby([profile["n_images"] > 0, "width", "height"]).size().nlargest(_NUM_BARS)
    labels = [f"{width} x {height}" if seen else "text only" for seen, width, height in sizes.index]
    charts: dict[str, list[Bar] | Drawing] = {
        "Samples by data set": _bars(profile["dataset"].value_counts().head(_NUM_BARS).to_dict()),
        "Image size in pixels (first image)": _bars(dict(zip(labels, sizes.tolist(), strict=True))),
        "Question-answer pairs a sample": _histogram(profile["n_turns"] // 2),
        "Characters a sample": _histogram(profile["text_chars"]),
    }
    if (profile["n_tokens"] >= 0).any():
        charts["Tokens a sample"] = _histogram(profile["n_tokens"])
    return charts


def _bars(counts: Mapping[object, int]) -> list[Bar]:
    top = float(max(counts.values()))
    return [Bar(str(label), f"{count:,}", count, scale=(0.0, top)) for label, count in counts.items()]


def _histogram(values: pd.Series) -> Drawing:
    """Equal bins, with the range and the median written below."""
    low, high = int(values.min()), int(values.max())
    # Whole numbers: every bin is as many of them wide, so none looks fuller than it is.
    bin_width = -(-(high - low + 1) // _NUM_BARS)
    edges = np.arange(low, high + bin_width + 1, bin_width)
    counts, _ = np.histogram(values, bins=edges)
    titles = [f"{start:,} to {start + bin_width - 1:,}: {count:,}" for start, count in zip(edges, counts, strict=False)]
    below = (f"{low:,}", f"median {values.median():,.0f}", f"{high:,}")
    return draw_bars(counts.tolist(), titles=titles, below=below)


def _read_rows(rows: pd.DataFrame, *, snapshot: Snapshot) -> list[Record | None]:
    """Records of some rows of the profile; ``None`` where a record cannot be read."""
    readers: dict[str, RecordReader] = {}
    records: list[Record | None] = []
    for dataset, position in zip(rows["dataset"], rows["row"], strict=True):
        if dataset not in readers:
            readers[dataset] = RecordReader(snapshot.shards(dataset))
        try:
            records.append(readers[dataset].read(int(position)))
        except RecordError:
            records.append(None)  # its card says why it cannot be read
    return records
