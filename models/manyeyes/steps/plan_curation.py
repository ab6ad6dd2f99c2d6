"""Pins curation recipe, snapshot and code, and shares the shards out among steps. Never cached."""

from __future__ import annotations

from manyeyes.data.curation.parts import cut_into_parts, part_key
from manyeyes.data.curation.planned import PlannedCuration
from manyeyes.data.curation.recipe import load_curation_recipe, read_curation_text
from manyeyes.data.fetching import normalise_md5
from manyeyes.data.remote import open_writable_remote
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import locate_data
from manyeyes.harness.kept import code_digest
from manyeyes.pages import Table, facts_table, step_page


def plan_curation(
    reporter: Reporter,
    *,
    curate_recipe: str,
    curate_recipe_text: str = "",
    curate_remote: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> StepResult:
    """Turn the parameters of ``curate`` into what its steps take; refuse before any shard is read.

    Args:
        reporter: Shows the progress.
        curate_recipe: A curation recipe that ships with the package, or the path of a YAML file.
        curate_recipe_text: Text of a curation recipe, taken instead.
        curate_remote: A folder or ``s3://`` for the new snapshot; the remote of the data when empty.
        data_md5: Snapshot; ``data.dvc`` of the working directory says it when empty.
        data_remote: A folder, ``s3://`` or ``hub:``; the default remote of the working directory when empty.

    Returns:
        Values: what ``gather_facts`` and ``curate_data`` take as ``pinned``, and ``parts``: what ``gather_facts`` is
        run for, side by side.

    Raises:
        RecipeError: No such recipe, a wrong one, or one that names folders.
        SnapshotError: Nothing says which snapshot, it lacks a data set, or nothing can be written to the remote.
        DataError: There is nothing to draw from.
    """
    reporter.progress("reading the recipe", done=0.1)
    if curate_recipe_text:
        recipe = read_curation_text(curate_recipe_text, where="curate_recipe_text")
    else:
        recipe = load_curation_recipe(curate_recipe)
    given, remote = locate_data(data_md5, data_remote)
    planned = PlannedCuration(
        recipe=recipe,
        data_md5=normalise_md5(given),
        data_remote=remote,
        out_remote=curate_remote or remote,
        code_digest=code_digest(),
    )
    open_writable_remote(planned.out_remote)
    reporter.progress("reading manifests", done=0.5)
    planned = planned.with_inputs()
    shards = planned.list_shards()
    parts = cut_into_parts(shards)
    samples = sum(shard.rows for shard in shards)
    facts = facts_table(
        [
            ("curation recipe", recipe.name),
            ("recipe digest", recipe.digest),
            ("snapshot (md5)", planned.data_md5),
            *((f"snapshot of {name} (md5)", md5) for name, md5 in planned.elsewhere.items()),
            ("remote", planned.data_remote),
            ("the new snapshot goes to", planned.out_remote),
            ("code digest", planned.code_digest),
        ]
    )
    rows = []
    for part in parts:
        own = planned.read_part(part)
        size = sum(shard.size_bytes for shard in own)
        rows.append([part_key(part), f"{len(own)}", f"{sum(shard.rows for shard in own):,}", f"{size / 1e6:,.1f}"])
    table = Table(("step", "shards", "samples", "MB"), rows, numbers=(1, 2, 3))
    return StepResult(
        headline=f"curation {recipe.name} {recipe.digest[:8]}, {samples:,} samples in {len(parts)} parts",
        metrics={"samples": float(samples), "shards": float(len(shards)), "parts": float(len(parts))},
        html=step_page(
            f"Curation {recipe.name}",
            "What is drawn from, and which step reads what of it.",
            {"": facts, "Parts": table},
        ),
        markdown=f"{facts.markdown()}\n\n{table.markdown()}\n",
        values={"gather_facts": planned.for_gathering().text(), "curate_data": planned.text(), "parts": parts},
        metadata={
            "recipe": recipe.name,
            "recipe_digest": recipe.digest,
            "data_md5": planned.data_md5,
            "code_digest": planned.code_digest,
        },
    )


STEP = Step("plan_curation", plan_curation, imports=("pyarrow.parquet",), tracked=False)
