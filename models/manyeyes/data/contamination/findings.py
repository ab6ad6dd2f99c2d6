"""What the search found: as JSON, as Markdown, and as ``contamination.html`` with the pairs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from manyeyes.pages import Picture, Table, render
from manyeyes.strict import StrictModel

Kind = Literal["exact", "near", "mirrored", "text"]


class Thresholds(StrictModel):
    """From where on two things are the same."""

    radius: int = Field(default=7, ge=0, le=7, description="Most bits in which two dHashes of 64 bits differ.")
    max_difference: float = Field(
        default=16.0,
        ge=0,
        le=255,
        description="Largest mean absolute difference of two images at 64x64, in levels of 255. A pair of near hashes "
        "counts only below it.",
    )
    min_entropy: float = Field(
        default=3.0, ge=0, le=8, description="Bits a pixel (grey, 64x64) below which an image is not decidable."
    )
    words: int = Field(default=13, ge=1, description="Of an n-gram.")
    min_share: float = Field(
        default=0.5, gt=0, le=1, description="Least share of a benchmark text's n-grams that one training text holds."
    )


class BenchmarkFindings(StrictModel):
    """What of one benchmark is in the training data too."""

    name: str = Field(description="Data set of the snapshot, or a Parquet file's name.")
    images: int = Field(ge=0, description="Images, each as often as it is used.")
    exact: int = Field(ge=0, description="Of them, those whose very bytes are in the training data.")
    near: int = Field(ge=0, description="Further ones that training has as a near duplicate.")
    mirrored: int = Field(ge=0, description="Further ones that training has as a near duplicate of the mirror image.")
    undecidable: int = Field(
        ge=0, description="Images that show too little to be told apart; only their bytes were compared."
    )
    unreadable: int = Field(ge=0, description="Images that cannot be decoded; only their bytes were compared.")
    texts: int = Field(ge=0, description="Questions with their answers.")
    overlapping: int = Field(ge=0, description="Of them, those whose n-grams a training text holds.")
    too_short: int = Field(ge=0, description="Texts without an n-gram that tells anything; they were not compared.")


class DatasetFindings(StrictModel):
    """What of one training data set is in a benchmark too."""

    name: str = Field(description="Data set of the snapshot.")
    images: int = Field(ge=0, description="Images, each as often as it is used.")
    exact: int = Field(ge=0, description="Of them, those whose very bytes are in a benchmark.")
    near: int = Field(ge=0, description="Further ones that are near duplicates.")
    mirrored: int = Field(ge=0, description="Further ones that are near duplicates when mirrored.")
    undecidable: int = Field(ge=0, description="Images that show too little; only their bytes were compared.")
    unreadable: int = Field(ge=0, description="Images that cannot be decoded; only their bytes were compared.")
    overlapping: int = Field(ge=0, description="Samples with a text that holds a benchmark's.")
    samples: int = Field(ge=0, description="Samples with any of these findings: what there is to leave out.")


class Pair(StrictModel):
    """One line of ``pairs.jsonl``: something of training and what it equals."""

    kind: Kind = Field(description="How they are alike.")
    dataset: str = Field(description="Of training.")
    row: int = Field(ge=0, description="Of the training sample: its place in the data set, from 0 over all files.")
    id: str = Field(description="Of the training sample.")
    image: int | None = Field(description="Its image's number, or null for a text.")
    benchmark: str = Field(description="As in the report.")
    benchmark_row: int = Field(ge=0, description="The benchmark's row: its place, from 0 over all files.")
    benchmark_id: str = Field(description="Of the benchmark's row.")
    benchmark_image: int | None = Field(description="That row's image, by number, or null for a text.")
    distance: int | None = Field(description="Bits in which the dHashes differ; null for exact and text.")
    difference: float | None = Field(description="Mean absolute difference at 64x64, of 255; null for exact and text.")
    share: float | None = Field(description="Of the benchmark text's n-grams; null for images.")

    def reason(self) -> str:
        """A sentence for the list of samples to leave out."""
        what = {
            "exact": "has the very bytes of an image",
            "near": f"is a near duplicate (distance {self.distance}, difference {self.difference}) of an image",
            "mirrored": f"is, mirrored, a near duplicate (distance {self.distance}, difference {self.difference}) "
            "of an image",
            "text": f"holds {100 * (self.share or 0):.0f}% of the n-grams of a text",
        }[self.kind]
        whose = "a text" if self.kind == "text" else f"image {self.image}"
        return f"{whose} {what} of {self.benchmark} ({self.benchmark_id})"


class ContaminationReport(StrictModel):
    """``contamination.json``: what training data and benchmarks share."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    data_md5: str = Field(description="Of the snapshot, as DVC computes it, without .dir.")
    thresholds: Thresholds = Field(description="From where on two things count as the same.")
    benchmarks: tuple[BenchmarkFindings, ...] = Field(description="In the order they were named.")
    datasets: tuple[DatasetFindings, ...] = Field(description="Of training, in the order they were named.")
    left_out: bool = Field(description="Whether training leaves out what was found: contaminated.jsonl is written.")
    examples: tuple[Pair, ...] = Field(description="A few pairs of each kind; pairs.jsonl has all.")

    @property
    def remaining_images(self) -> int:
        """Near duplicates (mirrored too, exact ones not) that training does not leave out."""
        return 0 if self.left_out else sum(row.near + row.mirrored for row in self.datasets)

    @property
    def remaining_texts(self) -> int:
        """Samples with a benchmark's text that training does not leave out."""
        return 0 if self.left_out else sum(row.overlapping for row in self.datasets)

    def headline(self) -> str:
        """One line."""
        exact = sum(row.exact for row in self.datasets)
        near = sum(row.near + row.mirrored for row in self.datasets)
        texts = sum(row.overlapping for row in self.datasets)
        return f"{exact:,} exact and {near:,} near duplicates among training images, {texts:,} samples with shared text"

    def as_markdown(self) -> str:
        """A short account for a page that shows Markdown."""
        rows = [
            [
                row.name,
                *(f"{number:,}" for number in (row.images, row.exact, row.near, row.mirrored)),
                in_training(row),
                *(f"{n:,}" for n in (row.undecidable + row.unreadable, row.texts, row.overlapping, row.too_short)),
            ]
            for row in self.benchmarks
        ]
        header = ["benchmark", "images", "exact", "near", "mirrored", "in training", "not decidable", "texts"]
        table = Table([*header, "overlapping", "too short"], rows, numbers=range(1, 10))
        return render("contamination.md", report=self, benchmarks=table)


def in_training(row: BenchmarkFindings) -> str:
    """The share of a benchmark's images that training has, in percent; a dash without images."""
    return f"{100 * (row.exact + row.near + row.mirrored) / row.images:.1f}%" if row.images else "-"


def read_contamination(folder: Path) -> ContaminationReport | None:
    """The ``contamination.json`` of a folder, or ``None`` where validation made none (it had no evaluation set)."""
    path = folder / "contamination.json"
    return ContaminationReport.model_validate_json(path.read_bytes()) if path.is_file() else None


def render_contamination(report: ContaminationReport, *, pictures: Mapping[Pair, Sequence[Picture | None]]) -> str:
    """Render the page.

    Args:
        report: What was found.
        pictures: Of the examples: training's image and the benchmark's; None for one that cannot be shown.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    return render(
        "contamination.html",
        title="Contamination",
        report=report,
        in_training=in_training,
        pairs=[(pair, pictures.get(pair, ())) for pair in report.examples],
    )
