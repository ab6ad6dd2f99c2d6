"""``report.json``, ``report.html`` and ``report.md``: what a scorecard means, with the images behind it.

The page and the Markdown are rendered from the JSON's contents and the images alone, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyeyes.evaluation.benchmarks import Benchmark
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.output import write_file
from manyeyes.evaluation.report.building import build_report, read_pictures
from manyeyes.evaluation.report.comparison import NO_CHAMPION, Champion
from manyeyes.evaluation.report.contents import Report, Reproduction, read_report
from manyeyes.evaluation.report.page import render_html, render_markdown
from manyeyes.evaluation.scorecard import Scorecard
from manyeyes.recipe import Recipe

__all__ = ["NO_CHAMPION", "Champion", "Report", "build_report", "read_report", "write_report"]


def write_report(
    folder: Path,
    scorecard: Scorecard,
    outcomes: Sequence[Outcome],
    benchmarks: Sequence[Benchmark],
    *,
    recipe: Recipe | None = None,
    champion: Champion = NO_CHAMPION,
    reproduction: Reproduction | None = None,
) -> Report:
    """Write the three files into a folder.

    Args:
        folder: For the files.
        scorecard: The figures.
        outcomes: Every item's answer.
        benchmarks: For images, titles and prompts, in any order.
        recipe: What was asked.
        champion: What to compare with.
        reproduction: Where other processes answered; this one did when left out.

    Returns:
        What ``report.json`` holds.

    Raises:
        RecordError: An image of an example cannot be decoded.
        StorageError: No space, or no permission.
    """
    report = build_report(scorecard, outcomes, benchmarks, recipe=recipe, champion=champion, reproduction=reproduction)
    write_file(folder / "report.html", render_html(report, read_pictures(report, benchmarks)).encode())
    write_file(folder / "report.md", render_markdown(report).encode())
    write_file(folder / "report.json", report.model_dump_json(indent=2).encode() + b"\n")
    return report
