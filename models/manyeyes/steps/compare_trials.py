"""Puts the trials of an ablation side by side: ``comparison.json`` and one page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from manyeyes.errors import PipelineError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import parse_pinned
from manyeyes.pages import duration, span
from manyeyes.search.trial import (
    Difference,
    Row,
    Trial,
    curve_axis,
    difference,
    read_trial,
    render_trials,
    score_curve,
    short_table,
    trial_folders,
)
from manyeyes.steps.plan_ablation import pinned_variants
from manyeyes.strict import StrictModel

COMPARISON_FILE = "comparison.json"


class ComparedTrial(StrictModel):
    """One row of the table."""

    label: str = Field(description="The variant, for people.")
    trial: Trial = Field(description="What was found.")
    difference: float | None = Field(description="Mean score minus the first row's; points. Null for the first row.")
    difference_ci95: tuple[float, float] | None = Field(description="Its 95% interval, paired; points.")


class AblationComparison(StrictModel):
    """``comparison.json``: the trials of an ablation."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    recipe: str = Field(description="Name of the recipe that all are variants of.")
    recipe_digest: str = Field(description="sha256 of what the comparison was given of it.")
    trials: tuple[ComparedTrial, ...] = Field(description="In the order of the grid.")


def compare_trials(
    reporter: Reporter,
    *,
    pinned: str,
    ablate_grid: str,
    trials: Sequence[Path],
    comparison: Path,
) -> StepResult:
    """Write ``comparison.json``, every trial, and the page.

    Args:
        reporter: Gets the scores by the number in which the trials differ, for MLflow.
        pinned: From ``preflight``.
        ablate_grid: As for ``plan_ablation``; its first variant is what the others are compared with.
        trials: Folders of ``train_trial``, in any order.
        comparison: Folder to write.

    Raises:
        PipelineError: A trial is missing.
        EvaluationError: The trials were asked different questions.
    """
    recipe = parse_pinned(pinned).recipe
    folders = {read_trial(folder).variant.text(): folder for folder in trial_folders(trials)}
    wanted = pinned_variants(ablate_grid)
    missing = [variant.label for variant in wanted if variant.text() not in folders]
    if missing:
        raise PipelineError(f"no trial of {', '.join(missing)}", "one of every variant", "Run the ablation again.")
    first = folders[wanted[0].text()]
    rows: list[Row] = []
    for number, variant in enumerate(wanted):
        folder = folders[variant.text()]
        gained: Difference | None = difference(folder, first) if number else None
        rows.append(Row(variant.label, read_trial(folder), gained))
        shutil.copytree(folder, comparison / "trials" / f"{number:02d}-{variant.key}", dirs_exist_ok=True)
    best = max(range(len(rows)), key=lambda index: rows[index].trial.mean)
    rows[best] = Row(rows[best].name, rows[best].trial, rows[best].difference, wins=True)
    written = AblationComparison(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        trials=tuple(
            ComparedTrial(
                label=row.name,
                trial=row.trial,
                difference=row.difference.mean if row.difference else None,
                difference_ci95=row.difference.ci95 if row.difference else None,
            )
            for row in rows
        ),
    )
    if axis := curve_axis(rows):
        # MLflow's axis has whole numbers.
        places = [int(value) for value in axis[1]] if all(map(float.is_integer, axis[1])) else range(len(rows))
        reporter.curves({place: _scores(row.trial) for place, row in zip(places, rows, strict=True)})
    (comparison / COMPARISON_FILE).write_text(written.model_dump_json(indent=2) + "\n", encoding="utf-8")
    winner = rows[best]
    return StepResult(
        headline=f"best of {len(rows)}: {winner.name}, {winner.trial.mean:.1f}%",
        metrics={"trials": float(len(rows)), "mean_score": winner.trial.mean},
        html=comparison_html(recipe.name, rows),
        markdown=short_table(rows, "variant", "the first").markdown() + "\n",
        metadata={"recipe_digest": recipe.digest, "best": winner.name},
    )


def _scores(trial: Trial) -> dict[str, float]:
    low, high = trial.mean_ci95
    return {"mean_score": trial.mean, "mean_score_low": low, "mean_score_high": high}


def comparison_html(recipe: str, rows: Sequence[Row]) -> str:
    """The whole page: the first row is what the others are compared with."""
    winner = next(row for row in rows if row.wins)
    certain = sum(1 for row in rows if row.difference is not None and row.difference.is_certain)
    axis = curve_axis(rows)
    draws = all(".draw." in path for row in rows for path in row.trial.variant.changes)
    return render_trials(
        "ablation.html",
        title=f"{'Draws' if draws else 'Ablation'} of {recipe}",
        curve=score_curve(rows),
        curve_label=axis[0] if axis else "",
        rows=rows,
        winner=winner,
        tiles=[
            (f"{winner.trial.mean:.2f}%", "mean score of the best", span(winner.trial.mean_ci95)),
            (f"{winner.trial.mean - rows[0].trial.mean:+.2f}", "points over the first row", rows[0].name),
            (f"{certain} of {len(rows) - 1}", "differences that are certain", "the 95% interval excludes 0"),
            (f"{len(rows)}", "variants trained", duration(sum(row.trial.train_seconds for row in rows))),
        ],
    )


STEP = Step(
    "compare_trials", compare_trials, imports=("pyarrow.parquet", "manyeyes.registry.tracking"), outputs=("comparison",)
)
