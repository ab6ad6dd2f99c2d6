"""``manyeyes recipe show``: a recipe and what it needs."""

from __future__ import annotations

import json

import yaml

from manyeyes.errors import SnapshotError, SourceError
from manyeyes.estimate import RecipeEstimate, as_rows
from manyeyes.pages import readable
from manyeyes.recipe import Recipe
from manyeyes.steps.preflight_checks import RemoteData, find_data, kept_estimate


def recipe_as_json(recipe: Recipe) -> str:
    """Digest, recipe and estimate as one JSON object; ``not_estimated`` says why where there is no estimate.

    Raises:
        RecipeError: The model cannot be built as the recipe says.
        ShapeError: Its parts do not fit together.
    """
    shown = {"digest": recipe.digest, "recipe": recipe.model_dump(mode="json")}
    try:
        shown |= estimated(recipe).model_dump(mode="json")
    except (SnapshotError, SourceError) as error:
        shown["not_estimated"] = error.as_dict()
    return json.dumps(shown, indent=2)


def recipe_as_text(recipe: Recipe) -> str:
    """The recipe as YAML, and what it needs as comments below.

    Raises:
        RecipeError: As ``recipe_as_json``.
        ShapeError: As ``recipe_as_json``.
    """
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
    return "\n".join([text.rstrip(), f"# digest {recipe.digest}", "#", *_needs(recipe)])


def _needs(recipe: Recipe) -> list[str]:
    try:
        found = estimated(recipe)
    except (SnapshotError, SourceError) as error:
        return [f"# what it needs is not known here: {error}"]
    rows = as_rows(found)
    width = max(len(name) for name, _ in rows)
    return [f"# {name:<{width}}  {readable(value)}" for name, value in rows]


def estimated(recipe: Recipe) -> RecipeEstimate:
    """What a recipe needs; the snapshot of the checkout gives the sizes of a language model that lies in it.

    Raises:
        SnapshotError: There is no such snapshot here.
        SourceError: The language model's ``config.json`` cannot be had.
        RecipeError: The model cannot be built as the recipe says.
        ShapeError: Its parts do not fit together.
    """
    data: RemoteData | None = None
    if recipe.model.language_model.source.removeprefix("scratch:").startswith("snapshot:"):
        try:
            data = find_data("", "")
        except SnapshotError as error:
            raise SnapshotError(
                f"the language model is {recipe.model.language_model.source}, and {error.found}",
                "the snapshot that holds its config.json",
                "Run it in a checkout whose data remote can be reached.",
            ) from error
    return kept_estimate(recipe, data)
