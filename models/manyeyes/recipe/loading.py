"""From YAML, overrides and canonical JSON to a checked recipe."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.recipe.reading import MAX_BYTES, check_values, parse_recipe_json, read_recipe_file, read_yaml
from manyeyes.recipe.recipe import GATE_RULES, Recipe, apply_override

# Of a wrong value, in a message.
_SHOWN_CHARACTERS = 200


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    files = resources.files("manyeyes").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str, *, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        name_or_path: A shipped recipe's name, or the path of a YAML file.
        overrides: Values by dotted path, for instance ``{"stages.sft.epochs": 1}``; list items by index.

    Raises:
        RecipeError: No such recipe, not YAML, an unknown field, a wrong value, or an override that names nothing.
    """
    return _changed(_read_tree(name_or_path, folder=Path(), seen=()), overrides or {}, where=name_or_path)


def parse_recipe(text: str) -> Recipe:
    """Read a recipe back from ``Recipe.canonical_json``.

    Raises:
        RecipeError: Not a recipe.
    """
    return _check(parse_recipe_json(text, where="recipe text"), where="recipe")


def read_recipe_text(text: str, *, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe that travels as text; a file that it ``extends`` is looked for in the working directory.

    Args:
        text: YAML, of which JSON is a part.
        overrides: As for ``load_recipe``.

    Raises:
        RecipeError: As for ``load_recipe``.
    """
    return _changed(_parse_tree(text, where="recipe", folder=Path(), seen=()), overrides or {}, where="recipe")


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with some of its values replaced, checked as a whole again.

    Args:
        recipe: Left as it is.
        changes: Values by dotted path, as for ``load_recipe``.

    Raises:
        RecipeError: A path that names nothing, or a value that does not fit.
    """
    return _changed(recipe.model_dump(mode="json"), changes, where=recipe.name)


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Turn ``["a.b=1", "c=[x]"]`` into ``{"a.b": 1, "c": ["x"]}``; values are YAML.

    Raises:
        RecipeError: An assignment without ``=``, or a value that is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path:
            raise RecipeError(f'override is "{assignment}"', "path=value", "For instance: --set stages.sft.epochs=1")
        overrides[path] = read_yaml(value, where=f'value of override "{path}"')
    return overrides


def _read_tree(name_or_path: str, *, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        path = folder / path
        return _parse_tree(read_recipe_file(path), where=str(path), folder=path.parent, seen=seen)
    names = list_recipes()
    if name_or_path not in names:
        raise RecipeError(
            f'recipe is "{name_or_path}"',
            "no such recipe",
            f"{did_you_mean(name_or_path, names)}List them with: manyeyes recipe list",
        )
    text = resources.files("manyeyes").joinpath("recipes", f"{name_or_path}.yaml").read_text(encoding="utf-8")
    return _parse_tree(text, where=name_or_path, folder=Path(), seen=seen)


def _parse_tree(text: str, *, where: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """A recipe's own tree upon its parent's; ``folder`` holds a parent that is named by a relative path."""
    tree = read_yaml(text, where=where)
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{where} holds {type(tree).__name__}",
            "a mapping with name, model, stages, evaluation, gate and registry",
            "See one with: manyeyes recipe show tiny",
        )
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise RecipeError(f"{where}: extends is {parent!r}", "a recipe's name or the path of a file", "Write one.")
    if seen:
        raise RecipeError(
            f'"{seen[-1]}" extends "{where}", which extends "{parent}"',
            "one parent at most",
            f'Let "{seen[-1]}" extend "{parent}" and copy the difference.',
        )
    return _merge(_read_tree(parent, folder=folder, seen=(where,)), tree)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # A stage's learning rates are one decision: naming them again replaces all of them.
        merged[key] = _merge(merged[key], value) if both and key != "train" else value
    return merged


def _changed(tree: dict[str, Any], changes: Mapping[str, Any], *, where: str) -> Recipe:
    for path, value in changes.items():
        apply_override(tree, path, value)
    return _check(tree, where=where)


def _check(tree: Any, *, where: str) -> Recipe:
    check_values(tree, where=where)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where=where) from error
    size = len(recipe.canonical_json())
    if size > MAX_BYTES:
        raise RecipeError(
            f"{where} takes {size:,} bytes as JSON",
            f"{MAX_BYTES:,} at most: every step of a pipeline gets it on its command line",
            "Shorten its longest texts and lists.",
        )
    return recipe


def _explain(error: ValidationError, *, where: str) -> RecipeError:
    problems = error.errors()
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"]) or "recipe"
    more = f" ({len(problems) - 1} more of its fields are wrong too.)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1])
        name = str(first["loc"][-1])
        known = f"The fields there are {', '.join(fields)}." if fields else ""
        return RecipeError(f"{where}: {place}", "no such field", f"{did_you_mean(name, fields)}{known}{more}")
    if first["type"] == "missing":
        return RecipeError(f"{where}: {place} is missing", "this field has no default", f"Add it.{more}")
    message = str(first["msg"]).removeprefix("Value error, ")
    value = repr(first["input"])
    shown = "" if isinstance(first["input"], dict) or len(value) > _SHOWN_CHARACTERS else f" is {value}"
    return RecipeError(f"{where}: {place}{shown}", message, f"See a whole recipe with: manyeyes recipe show tiny{more}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        # A part that is no field is the tag of a gate rule.
        model = GATE_RULES.get(part) if field is None else _model_inside(field.annotation)
    return sorted(getattr(model, "model_fields", {}))


def _model_inside(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_inside(inner)
        if found is not None:
            return found
    return None
