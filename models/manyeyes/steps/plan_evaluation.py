"""Finds the model to score and the benchmarks to ask, and refuses before any machine time is spent. Never cached."""

from __future__ import annotations

import re
from dataclasses import replace

from manyeyes.errors import RegistryUnreachableError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import EVALUATION_STEPS
from manyeyes.pages import facts_table, step_page
from manyeyes.recipe import Recipe
from manyeyes.registry.pull import locate_model
from manyeyes.steps.resolve_data import resolve


def plan_evaluation(
    reporter: Reporter,
    *,
    evaluate_model: str,
    evaluate_benchmarks: str,
    recipe: str,
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> StepResult:
    """Pin recipe, data and code, the model and the list of benchmarks.

    Args:
        reporter: Shows the progress.
        evaluate_model: As for ``locate_model``.
        evaluate_benchmarks: Names separated by commas, spaces or lines; empty: the recipe's own.
        recipe: As for ``resolve_data``.
        recipe_overrides: The same.
        recipe_text: The same.
        data_md5: The same.
        data_remote: The same.

    Returns:
        Values: what ``fetch_model``, ``score_benchmark`` and ``merge_scorecards`` take as ``pinned``, ``benchmarks``
        (never empty), ``kind``, ``model``, ``model_digest``, and ``champion``: what the report compares with.

    Raises:
        RecipeError: Unknown recipe or field, or no stage that makes a model.
        EvaluationError: Unknown benchmark.
        SnapshotError: The snapshot lacks a benchmark's data set.
        CheckpointError: No model there.
        RegistryError: No such registered model.
    """
    from manyeyes.evaluation.benchmarks import find_benchmark

    resolved = resolve(
        recipe=recipe,
        recipe_overrides=recipe_overrides,
        recipe_text=recipe_text,
        data_md5=data_md5,
        data_remote=data_remote,
    )
    inputs = resolved.pinned.of("plan_evaluation")
    read = inputs.recipe
    benchmarks = named_benchmarks(evaluate_benchmarks) or list(read.evaluation.benchmarks)
    rows = [find_benchmark(name) for name in benchmarks]
    planned = replace(inputs, recipe=ask_benchmarks(read, benchmarks))
    reporter.progress("looking for the model", done=0.2)
    location = locate_model(evaluate_model)
    reporter.progress("looking for the benchmarks", done=0.6)
    champion = _champion(location.place, read)
    counts = {row.name: inputs.snapshot.dataset(row.dataset).rows for row in rows}
    shown: list[tuple[str, object]] = [
        ("model", location.place),
        ("kind", "checkpoint in PyTorch" if location.kind == "torch" else "ONNX bundle"),
        ("model digest", location.digest),
        ("compared with", _in_words(champion)),
        ("recipe", read.name),
        ("snapshot (md5)", inputs.data_md5),
        ("items at most", read.evaluation.max_items or "all"),
        *((f"records of {name}", count) for name, count in counts.items()),
    ]
    return StepResult(
        headline=f"{location.kind} {location.digest[:8]}, {', '.join(benchmarks)}",
        metrics={"benchmarks": float(len(benchmarks)), "records": float(sum(counts.values()))},
        html=step_page(
            f"To score: {evaluate_model.strip()}", "Which model, and on which benchmarks.", {"": facts_table(shown)}
        ),
        markdown=facts_table(shown).markdown() + "\n",
        values={
            **{name: planned.of(name).text() for name in EVALUATION_STEPS},
            "benchmarks": benchmarks,
            "kind": location.kind,
            "model": location.place,
            "model_digest": location.digest,
            "champion": champion,
        },
        metadata=resolved.metadata,
    )


def named_benchmarks(text: str) -> list[str]:
    """Names in a text, separated by commas, spaces or lines; each once."""
    return list(dict.fromkeys(name for name in re.split(r"[,\s]+", text) if name))


def _in_words(champion: str) -> str:
    if not champion:
        return "no champion: the registry did not answer"
    return f"champion {champion}" if "/" in champion else f"no champion: {champion} has none yet"


def _champion(place: str, recipe: Recipe) -> str:
    """The champion of the model that is scored where it is registered, of the recipe's model otherwise."""
    from manyeyes.registry.references import CHAMPION, find_alias
    from manyeyes.registry.tracking import connect

    name = place.split("/")[1] if place.startswith("models:/") else recipe.registry.model
    try:
        version = find_alias(connect(), name, CHAMPION)
    except RegistryUnreachableError:
        return ""
    return name if version is None else f"{name}/{version}"


def ask_benchmarks(recipe: Recipe, benchmarks: list[str]) -> Recipe:
    """The recipe with other benchmarks, to be asked and not to be judged by.

    Args:
        recipe: Left as it is.
        benchmarks: At least one.
    """
    evaluation = recipe.evaluation.model_copy(update={"benchmarks": tuple(benchmarks)})
    return recipe.model_copy(update={"evaluation": evaluation})


STEP = Step(
    "plan_evaluation", plan_evaluation, imports=("pyarrow.parquet", "manyeyes.registry.tracking"), tracked=False
)
