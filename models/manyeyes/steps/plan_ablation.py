"""Turns the grid of an ablation into variants, and refuses a wrong one before anything is trained."""

from __future__ import annotations

from manyeyes.errors import RecipeError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import parse_pinned
from manyeyes.pages import Table, step_page
from manyeyes.search.variant import Variant, in_batches, read_grid
from manyeyes.sources import pin_sources


def plan_ablation(
    reporter: Reporter,  # noqa: ARG001  (every step has one)
    *,
    pinned: str,
    ablate_grid: str,
) -> StepResult:
    """Check every variant of the grid.

    Args:
        reporter: Not needed.
        pinned: From ``preflight``.
        ablate_grid: One ``path=[value, value, ...]`` a line.

    Returns:
        Values: ``batches``, their texts, shared among a few steps.

    Raises:
        RecipeError: A wrong grid, or a variant that is no recipe, has no model, or is judged on other questions.
    """
    recipe = parse_pinned(pinned).recipe
    variants = pinned_variants(ablate_grid)
    for variant in variants:
        changed = variant.apply(recipe)
        if changed.stages.pretrain is None and changed.stages.sft is None:
            raise RecipeError(f'variant "{variant.label}" trains no model', "pretrain, sft or both", "Keep one.")
        if (changed.evaluation.benchmarks, changed.evaluation.max_items) != (
            recipe.evaluation.benchmarks,
            recipe.evaluation.max_items,
        ):
            raise RecipeError(
                f'variant "{variant.label}" is asked other questions than the rest',
                "the same benchmarks and max_items for all, or nothing can be compared",
                "Change them in recipe_overrides.",
            )
    rows = [[str(number), variant.label] for number, variant in enumerate(variants, start=1)]
    table = Table(("", "variant"), rows, numbers=(0,))
    return StepResult(
        headline=f"{len(variants)} variants of {recipe.name}",
        html=step_page(
            f"Ablation of {recipe.name}", "Every variant; the first is what the others are compared with.", {"": table}
        ),
        markdown=table.markdown() + "\n",
        values={"batches": in_batches(variants)},
    )


def pinned_variants(ablate_grid: str) -> list[Variant]:
    """The variants of a grid, with their sources pinned: a variant's text is the cache key of its training.

    Args:
        ablate_grid: One ``path=[value, value, ...]`` a line.

    Raises:
        RecipeError: A wrong grid.
    """
    return [variant.model_copy(update={"changes": pin_sources(variant.changes)}) for variant in read_grid(ablate_grid)]


STEP = Step("plan_ablation", plan_ablation, tracked=False)
