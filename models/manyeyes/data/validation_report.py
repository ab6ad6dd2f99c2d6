"""What validation found, as JSON and as Markdown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manyeyes.pages import Table, Text, render
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
