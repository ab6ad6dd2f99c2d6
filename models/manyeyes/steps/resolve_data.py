"""Pins recipe, data and code: what the cache keys of every later step are made of.

In a pipeline ``preflight`` or ``plan_evaluation`` does so at its end, once it has seen that all of it can be had; here
it is alone, for ``manyeyes step resolve_data``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manyeyes.data.fetching import normalise_md5
from manyeyes.errors import RecipeError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import EVALUATION_STEPS, SLICES, Pinned, locate_data
from manyeyes.harness.kept import code_digest
from manyeyes.harness.stage import note_branches
from manyeyes.pages import facts_table, step_page
from manyeyes.recipe import Recipe, load_recipe, parse_overrides, read_recipe_text
from manyeyes.registry.references import check_registry_name
from manyeyes.sources import pin_recipe

# Steps that take their slice from here, in the order of preflight's component; gate takes register's, in whose pod it
# runs, and plan_evaluation makes its own and those of the steps after it.
_GIVEN = tuple(step for step in SLICES if step not in ("gate", "plan_evaluation", *EVALUATION_STEPS))


@dataclass(frozen=True)
class Resolved:
    """What a run trains, on which data, with which code.

    Attributes:
        pinned: The whole recipe, the snapshot and the code.
        registry_model: Name in the registry.
        facts: The same for people.
    """

    pinned: Pinned
    registry_model: str
    facts: Sequence[tuple[str, str]]

    @property
    def headline(self) -> str:
        """In a few words."""
        recipe = self.pinned.recipe
        parts = (recipe.digest[:8], f"data {self.pinned.data_md5[:8]}", f"code {self.pinned.code_digest[:8]}")
        return f"recipe {recipe.name} {', '.join(parts)}"

    @property
    def metadata(self) -> dict[str, str | int | float]:
        """For the report's metadata, where a run's summary finds it."""
        return {
            "recipe": self.pinned.recipe.name,
            "recipe_digest": self.pinned.recipe.digest,
            "data_md5": self.pinned.data_md5,
            "code_digest": self.pinned.code_digest,
        }


def resolve(
    *,
    recipe: str,
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
    registry_model: str = "",
) -> Resolved:
    """Pin recipe, data and code; arguments as for ``resolve_data``.

    Raises:
        SourceError: Weights that the recipe names cannot be read, or have no commit.
        RecipeError: Unknown recipe or field, or no stage that makes a model.
        SnapshotError: Neither a parameter nor a checkout names the snapshot.
        RegistryError: Not a model name.
    """
    resolved = pin_recipe(read_recipe(recipe_text or recipe, recipe_overrides))
    model = registry_model or resolved.registry.model
    check_registry_name(model)
    _check_stages(resolved)
    given, remote = locate_data(data_md5, data_remote)
    md5 = normalise_md5(given)
    digest = code_digest()
    encoders = resolved.prealigned_encoders()
    note_branches(len(encoders))
    facts = [
        ("recipe", resolved.name),
        ("recipe digest", resolved.digest),
        ("overrides", recipe_overrides.replace("\n", ", ") or "none"),
        ("snapshot (md5)", md5),
        ("remote", remote),
        ("code digest", digest),
        ("encoders to prealign", ", ".join(encoders) or "none"),
        ("registered as", model),
    ]
    return Resolved(Pinned(resolved, data_md5=md5, data_remote=remote, code_digest=digest), model, facts)


def resolve_data(
    reporter: Reporter,
    *,
    recipe: str,
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
    registry_model: str = "",
) -> StepResult:
    """Turn a pipeline's parameters into what every later step takes.

    Args:
        reporter: Shows the progress.
        recipe: A shipped recipe's name, the path of a YAML file, or the text of a recipe (YAML or JSON).
        recipe_overrides: One ``a.b=value`` a line.
        recipe_text: Text of a recipe, taken instead of ``recipe``; a cluster's form offers shipped names only there.
        data_md5: Snapshot; ``data.dvc`` of the working directory says it when empty.
        data_remote: A folder, ``s3://`` or ``hub:OWNER/NAME@COMMIT``; the working directory's default when empty.
        registry_model: Name in the registry; the recipe's own when empty.

    Returns:
        Values: by its name, what each step takes as ``pinned``; of ``prealign_encoder`` a list with ``encoder`` and
        ``pinned`` (one with an empty name when there is no such stage); and ``registry_model``.

    Raises:
        SourceError: Weights that the recipe names cannot be read, or have no commit.
        RecipeError: Unknown recipe or field, or no stage that makes a model.
        SnapshotError: Neither a parameter nor a checkout names the snapshot.
        RegistryError: Not a model name.
    """
    reporter.progress("reading the recipe", done=0.1)
    resolved = resolve(
        recipe=recipe,
        recipe_overrides=recipe_overrides,
        recipe_text=recipe_text,
        data_md5=data_md5,
        data_remote=data_remote,
        registry_model=registry_model,
    )
    table = facts_table(resolved.facts)
    return StepResult(
        headline=resolved.headline,
        html=step_page(
            f"Recipe {resolved.pinned.recipe.name}",
            "What this run trains, on which data, with which code.",
            {"": table},
        ),
        markdown=table.markdown() + "\n",
        values={**pin_steps(resolved.pinned), "registry_model": resolved.registry_model},
        metadata=resolved.metadata,
    )


def pin_steps(pinned: Pinned) -> dict[str, Any]:
    """What each step starts from, by step; for ``prealign_encoder`` an item for each encoder."""
    return {
        **{step: pinned.of(step).text() for step in _GIVEN},
        # kfp cannot loop over nothing.
        "prealign_encoder": [
            {"encoder": name, "pinned": pinned.of("prealign_encoder", encoder=name).text()}
            for name in pinned.recipe.prealigned_encoders() or [""]
        ],
    }


def read_recipe(recipe: str, overrides: str) -> Recipe:
    """A recipe by name, path or text, with overrides, one a line.

    Raises:
        RecipeError: No such recipe, or one that is wrong.
    """
    parsed = parse_overrides([line.strip() for line in overrides.split("\n") if line.strip()])
    if "\n" not in recipe and not recipe.lstrip().startswith("{"):
        return load_recipe(recipe, overrides=parsed)
    return read_recipe_text(recipe, overrides=parsed)


def _check_stages(recipe: Recipe) -> None:
    if recipe.stages.pretrain is None and recipe.stages.sft is None:
        raise RecipeError(
            f'recipe "{recipe.name}" has no stage that makes a model', "pretrain, sft or both", "Add stages.sft."
        )


STEP = Step("resolve_data", resolve_data, tracked=False)
