"""``manyeyes evaluate``: a model's scores on benchmarks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyeyes.cli.group import OutPath
from manyeyes.errors import EvaluationError

if TYPE_CHECKING:
    from manyeyes.recipe import Recipe
    from manyeyes.registry.model_location import ModelLocation


@click.command("evaluate")
@click.argument("model")
@click.option("--recipe", default="tiny", show_default=True, help="Says what is asked, and how.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")
@click.option("--benchmarks", default="", metavar="A,B", help="Ask these; the recipe's own by default.")
@click.option("--max-items", type=click.IntRange(min=1), help="First so many questions of each benchmark only.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="[BENCHMARK=]NAME",
    help="Whose scoring, of one benchmark or of all; what papers report by default.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="How many answer side by side, each with the whole model; one a CUDA device by default, else 1.",
)
@click.option("--data-md5", default="", help="Snapshot; the checkout's data.dvc says it by default.")
@click.option("--data-remote", default="", help="A folder or s3://; the checkout's default remote by default.")
@click.option("--out", type=OutPath(), default=Path("runs/evaluation"), show_default=True)
def evaluate_command(
    model: str,
    recipe: str,
    assignments: tuple[str, ...],
    benchmarks: str,
    max_items: int | None,
    variants: tuple[str, ...],
    processes: int | None,
    data_md5: str,
    data_remote: str,
    out: Path,
) -> None:
    """Score MODEL on a recipe's benchmarks: a checkpoint's or a bundle's folder, s3://, or NAME[@ALIAS or /VERSION].

    Stopped or killed, the same command goes on where it stopped.
    """
    from manyeyes.cli.step import run_from_files
    from manyeyes.recipe import load_recipe, parse_overrides
    from manyeyes.registry.model_location import locate_model

    loaded = load_recipe(recipe, overrides=parse_overrides(list(assignments)))
    asked = choose_benchmarks(loaded, names=benchmarks, max_items=max_items, variants=variants)
    location = locate_model(model)
    run_from_files(
        "evaluate",
        {"kind": location.kind, "model": model_folder(location), "processes": processes},
        recipe=asked,
        data_md5=data_md5,
        data_remote=data_remote,
        out=out,
    )


def choose_benchmarks(recipe: Recipe, *, names: str, max_items: int | None, variants: Sequence[str]) -> Recipe:
    """The recipe with other benchmarks, fewer items, other variants.

    Args:
        recipe: Left as it is.
        names: Benchmarks, separated by commas or spaces; empty: the recipe's own.
        max_items: Of each benchmark; the recipe's own limit for ``None``.
        variants: ``BENCHMARK=NAME`` or, for all that are asked, ``NAME``.

    Raises:
        EvaluationError: Unknown benchmark or variant, or a variant of a benchmark that is not asked.
    """
    from manyeyes.evaluation.benchmarks import find_benchmark
    from manyeyes.recipe import change_recipe
    from manyeyes.steps.plan_evaluation import ask_benchmarks

    named = list(dict.fromkeys(name for name in re.split(r"[,\s]+", names) if name))
    if named:
        recipe = ask_benchmarks(recipe, [find_benchmark(name).name for name in named])
    rows = {name: find_benchmark(name) for name in recipe.evaluation.benchmarks}
    chosen = dict(recipe.evaluation.variants)
    for text in variants:
        benchmark, equals, variant = text.rpartition("=")
        if equals and find_benchmark(benchmark).name not in rows:
            raise EvaluationError(
                f"--variant names {benchmark}", f"a benchmark that is asked: {', '.join(rows)}", "Add it to them."
            )
        for row in [rows[benchmark]] if equals else rows.values():
            chosen[row.name] = row.check_variant(variant)
    changes: dict[str, Any] = {} if max_items is None else {"evaluation.max_items": max_items}
    if variants:
        changes["evaluation.variants"] = chosen
    return change_recipe(recipe, changes) if changes else recipe


def model_folder(location: ModelLocation) -> Path:
    """Folder of a model on this machine, fetched when it is not there yet.

    Args:
        location: From ``locate_model``.

    Raises:
        CheckpointError: As ``fetch_model``, and so are the others.
        BundleError: It is another one than was located.
        RegistryError: The registry has lost it.
        StorageError: No space, or no permission.
    """
    from manyeyes.harness.inputs import cache_dir
    from manyeyes.registry.model_location import fetch_model

    if "://" not in location.place and not location.place.startswith("models:/"):
        return Path(location.place)
    folder = cache_dir() / "models" / location.digest[:16]
    if not folder.is_dir():
        fetch_model(location, folder)
    return folder
