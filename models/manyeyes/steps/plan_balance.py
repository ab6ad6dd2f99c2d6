"""Turns the draws of a balance into variants, and makes each once: who draws nothing is refused before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from manyeyes.data.curation.stage_draw import count_drawn, draw_of_stage
from manyeyes.data.quarantine import read_quarantine
from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import cache_dir, parse_pinned
from manyeyes.pages import Table, step_page
from manyeyes.recipe import STAGE_NAMES, DrawSpec
from manyeyes.search.variant import balance_grid, in_batches
from manyeyes.steps.plan_ablation import pinned_variants


def plan_balance(
    reporter: Reporter, *, pinned: str, validation: Path, balance_draws: str, balance_stage: str = "sft"
) -> StepResult:
    """Make every draw, and count what it takes of each category.

    Args:
        reporter: Shows the progress.
        pinned: From ``preflight``, for ``train_trial``.
        validation: Folder of ``validate_data``: what is in its quarantine is not drawn.
        balance_draws: One ``field=[value, value, ...]`` of a stage's draw a line, for instance
            ``cap=[150000, 250000]``.
        balance_stage: The stage whose draw it is.

    Returns:
        Values: ``grid``, the same as an ablation's, and ``batches``, the variants' texts, shared among a few steps.

    Raises:
        RecipeError: A wrong grid, no such stage, or a draw that is none.
        DataError: A category of a ratio has no sample, or a draw takes nothing.
    """
    inputs = parse_pinned(pinned)
    recipe = inputs.recipe
    stages = [name for name, _ in recipe.present_stages()]
    if balance_stage not in stages:
        raise RecipeError(
            f'balance_stage is "{balance_stage}"',
            f"a stage of {recipe.name}: {', '.join(stages)}",
            did_you_mean(balance_stage, STAGE_NAMES) or "Name one.",
        )
    grid = balance_grid(balance_draws, stage=balance_stage)
    variants = pinned_variants(grid)
    quarantine = read_quarantine(validation)
    counts: list[dict[str, int]] = []
    for number, variant in enumerate(variants):
        stage = getattr(variant.apply(recipe).stages, balance_stage)
        spec = stage.draw or DrawSpec()
        drawn = draw_of_stage(
            spec,
            [part.dataset for part in stage.mixture],
            inputs.snapshot,
            quarantine=quarantine,
            cache_dir=cache_dir(),
            progress=partial(_show, reporter, number, len(variants)),
        )
        counts.append(count_drawn(drawn, spec))
    table = _table([variant.label for variant in variants], counts)
    totals = [sum(each.values()) for each in counts]
    return StepResult(
        headline=f"{len(variants)} draws, {min(totals):,} to {max(totals):,} samples",
        metrics={"draws": float(len(variants)), "fewest": float(min(totals)), "most": float(max(totals))},
        html=step_page(
            f"Draws of {recipe.name}",
            "What each draw takes of every category; the first is what the others are compared with.",
            {"Samples": table},
        ),
        markdown=table.markdown() + "\n",
        values={"grid": grid, "batches": in_batches(variants)},
        metadata={"data_md5": inputs.data_md5},
    )


def _show(reporter: Reporter, number: int, count: int, sentence: str, done: float) -> None:
    reporter.progress(f"draw {number + 1} of {count}: {sentence}", done=(number + done) / count)


def _table(labels: Sequence[str], counts: Sequence[dict[str, int]]) -> Table:
    categories = list(dict.fromkeys(name for each in counts for name, count in each.items() if count))
    rows = []
    for label, each in zip(labels, counts, strict=True):
        total = sum(each.values())
        shares = [f"{each.get(name, 0):,} ({100 * each.get(name, 0) / total:.1f}%)" for name in categories]
        rows.append([label, f"{total:,}", *shares])
    header = ("draw", "samples", *categories)
    return Table(header, rows, numbers=range(1, len(header)))


STEP = Step("plan_balance", plan_balance, imports=("pyarrow.parquet",), tracked=False)
