"""Pins recipe, snapshot and code, and shares the shards to validate out among steps. Never cached."""

from __future__ import annotations

from manyeyes.data.curation.parts import cut_into_parts, parse_part, part_key
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import training_datasets
from manyeyes.pages import Table, facts_table, step_page
from manyeyes.steps.resolve_data import resolve


def plan_validation(
    reporter: Reporter,
    *,
    recipe: str,
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> StepResult:
    """Turn the parameters of ``validate`` into what its steps take; no shard is read.

    Args:
        reporter: Shows the progress.
        recipe: As for ``resolve_data``.
        recipe_overrides: The same.
        recipe_text: The same.
        data_md5: The same.
        data_remote: The same.

    Returns:
        Values: ``validate_data``, what ``profile_shards`` and ``judge_snapshot`` take as ``pinned``, and ``parts``, for
        each of which ``profile_shards`` is run.

    Raises:
        RecipeError: Unknown recipe or field, or no stage that makes a model.
        SourceError: Weights that the recipe names cannot be read, or have no commit.
        SnapshotError: Nothing says which snapshot, or it lacks a data set.
        DataError: It has no sample.
    """
    from manyeyes.data.curation.draw import list_shards
    from manyeyes.data.curation.recipe import CurationRecipe, InputSpec

    reporter.progress("reading the recipe", done=0.1)
    resolved = resolve(
        recipe=recipe,
        recipe_overrides=recipe_overrides,
        recipe_text=recipe_text,
        data_md5=data_md5,
        data_remote=data_remote,
    )
    inputs = resolved.pinned.of("validate_data")
    reporter.progress("reading the snapshot's manifest", done=0.5)
    names = tuple(dict.fromkeys([*training_datasets(inputs.recipe), *inputs.recipe.data.eval_datasets]))
    everything = CurationRecipe(name="all", inputs=(InputSpec(datasets=names),))
    parts = cut_into_parts(list_shards(everything, [inputs.snapshot]))
    rows, samples = [], 0
    for part in parts:
        entries = [
            entry for name, first, end in parse_part(part) for entry in inputs.snapshot.dataset(name).shards[first:end]
        ]
        count, size = sum(entry.rows for entry in entries), sum(entry.bytes for entry in entries)
        rows.append([part_key(part), f"{len(entries)}", f"{count:,}", f"{size / 1e6:,.1f}"])
        samples += count
    facts = facts_table([row for row in resolved.facts if row[0] not in ("encoders to prealign", "registered as")])
    table = Table(("step", "shards", "samples", "MB"), rows, numbers=(1, 2, 3))
    return StepResult(
        headline=f"{resolved.headline}, {samples:,} samples in {len(parts)} parts",
        metrics={"samples": float(samples), "parts": float(len(parts))},
        html=step_page(
            f"Validation for {resolved.pinned.recipe.name}",
            "What is looked at, and which step reads what of it.",
            {"": facts, "Parts": table},
        ),
        markdown=f"{facts.markdown()}\n\n{table.markdown()}\n",
        values={"validate_data": inputs.text(), "parts": parts},
        metadata=resolved.metadata,
    )


STEP = Step("plan_validation", plan_validation, imports=("pyarrow.parquet",), tracked=False)
