"""Starts a search for the best set of encoders: checks what is asked for and names the start set."""

from __future__ import annotations

from pathlib import Path

from manyeyes.errors import RecipeError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import parse_pinned
from manyeyes.pages import facts_table, step_page
from manyeyes.search.search import MAX_ROUNDS, Search, write_search
from manyeyes.search.variant import Variant, in_batches


def start_search(
    reporter: Reporter,  # noqa: ARG001  (every step has one)
    *,
    pinned: str,
    search_start: str,
    search_rounds: int,
    search_min_gain: float,
    search: Path,
) -> StepResult:
    """Write ``search.json`` of a search that has not begun.

    Args:
        reporter: Not needed.
        pinned: From ``preflight``.
        search_start: Names of the start set, separated by commas; empty: the recipe's first encoder.
        search_rounds: Rounds at most.
        search_min_gain: Points that a round must gain.
        search: Folder to write.

    Returns:
        Values: ``candidates``, with the start set.

    Raises:
        RecipeError: An unknown encoder, nothing to add, a set that is no recipe, or an impossible number of rounds.
    """
    recipe = parse_pinned(pinned).recipe
    pool = tuple(encoder.name for encoder in recipe.model.encoders)
    named = [name.strip() for name in search_start.split(",") if name.strip()] or [pool[0]]
    if not 1 <= search_rounds <= MAX_ROUNDS:
        raise RecipeError(f"search_rounds is {search_rounds}", f"1 to {MAX_ROUNDS}", "Search on from the result.")
    if search_min_gain < 0:
        raise RecipeError(f"search_min_gain is {search_min_gain}", "0 points or more", "Leave it at 0.")
    if len(named) >= len(pool):
        raise RecipeError(
            f'the start set is {", ".join(named)}, and recipe "{recipe.name}" has {", ".join(pool)}',
            "at least one encoder to add",
            "Name all encoders to choose from in model.encoders, and fewer in search_start.",
        )
    Variant(encoders=tuple(named)).apply(recipe)  # refuses an unknown name, and a name given twice
    begun = Search(
        recipe=recipe.name,
        pool=pool,
        start=tuple(name for name in pool if name in named),
        max_rounds=search_rounds,
        min_gain=search_min_gain,
    )
    remaining = [name for name in pool if name not in begun.start]
    for name in remaining:
        Variant(encoders=(*begun.start, name)).apply(recipe)
    write_search(begun, search)
    rows: list[tuple[str, object]] = [
        ("recipe", recipe.name),
        ("start set", ", ".join(begun.start)),
        ("encoders to add", ", ".join(remaining)),
        ("rounds at most", search_rounds),
        ("points to gain in a round", search_min_gain),
        ("benchmarks", ", ".join(recipe.evaluation.benchmarks)),
    ]
    return StepResult(
        headline=f"from {' + '.join(begun.start)}, {len(remaining)} to add, {search_rounds} rounds at most",
        html=step_page(
            f"Search in recipe {recipe.name}", "Which of its encoders belong together.", {"": facts_table(rows)}
        ),
        markdown=facts_table(rows).markdown() + "\n",
        values={"candidates": in_batches(begun.next_sets(()))},
    )


STEP = Step("start_search", start_search, outputs=("search",), tracked=False)
