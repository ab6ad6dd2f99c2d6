"""From YAML, overrides and canonical JSON to a checked recipe.

Whatever is not UTF-8, not YAML, too large or too deep, names one key twice, or holds what JSON has no word for (dates,
sets, NaN) is refused here, by its place, so that everything behind it sees mappings, lists, texts, numbers and truth
values alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.recipe.gate_rules import GATE_RULES
from manyeyes.recipe.model import PART, Part, model_inside
from manyeyes.recipe.partial import read_fields
from manyeyes.recipe.recipe import Recipe, apply_override

MAX_BYTES = 32_768
"""Longest recipe as canonical JSON.

Each step of a pipeline takes the recipe as one argument of its command line, where Linux allows 131,072 bytes and JSON
inside JSON doubles quotes; Kubeflow keeps it six times a step in a workflow whose status may have 1 MB, compressed.
Published recipes have 4,200 bytes at most.
"""
MAX_FILE_BYTES = 8 * MAX_BYTES
"""Longest file: comments and indentation included."""
_MAX_DEPTH = 32
_MAX_VALUES = 10_000
_MAX_INTEGER = 2**63 - 1


def read_recipe_file(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        RecipeError: No such file, not readable, too long, or not UTF-8.
    """
    try:
        if path.is_dir():
            raise RecipeError(f'recipe file is "{path}"', "a file, and this is a folder", "Name the file in it.")
        if not path.is_file():
            raise RecipeError(f'recipe file is "{path}"', "no such file", "Check the path.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RecipeError(f"{path} has {size:,} bytes", f"{MAX_FILE_BYTES:,} at most", "Name a recipe's file.")
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f'recipe file is "{path}" ({error.strerror})', "a file that can be read", "Check path and permission."
        ) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path} is UTF-16", "UTF-8", f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
    try:
        # Some editors put a byte order mark in front.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path} is not UTF-8 (byte 0x{data[error.start]:02x} in line {line})",
            "text in UTF-8",
            f"Save it as UTF-8, or convert it: iconv -f ISO-8859-1 -t UTF-8 {path.name}",
        ) from error


def read_yaml(text: str, *, where: str) -> Any:
    """Read one YAML document as plain values.

    Args:
        text: YAML, of which JSON is a part.
        where: What messages call it.

    Raises:
        RecipeError: Not YAML, or with something in it that a recipe cannot hold.
    """
    if len(text) > MAX_FILE_BYTES:
        raise RecipeError(f"{where} has {len(text):,} characters", f"{MAX_FILE_BYTES:,} at most", "Shorten it.")
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(f"{where} is not YAML ({reason})", "a YAML mapping", "Fix the line named above.") from error
    check_values(tree, where=where)
    return tree


def parse_recipe_json(text: str, *, where: str) -> Any:
    """Read JSON as plain values; arguments and errors as for ``read_yaml``."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where} is not JSON ({'nested too deep' if isinstance(error, RecursionError) else error})",
            "the text that Recipe.canonical_json wrote",
            "Pass it on unchanged.",
        ) from error
    check_values(tree, where=where)
    return tree


def check_values(tree: Any, *, where: str) -> None:
    """Refuse whatever is no plain value, is too large, or is too much.

    Raises:
        RecipeError: Names the place.
    """
    left = _MAX_VALUES

    def look(value: Any, place: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RecipeError(f"{where} has more than {_MAX_VALUES:,} values", "fewer", "Expand no alias so often.")
        if depth > _MAX_DEPTH:
            raise RecipeError(f"{where}: {place} is nested too deep", f"{_MAX_DEPTH} levels at most", "Flatten it.")
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise RecipeError(f"{where}: {place or 'recipe'} has the key {_short(key)}", "a text", "Quote it.")
                look(key, place, depth)
                look(inner, f"{place}.{key}" if place else key, depth + 1)
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                look(inner, f"{place}.{index}", depth + 1)
        else:
            problem = _wrong(value)
            if problem:
                raise RecipeError(f"{where}: {place or 'recipe'} is {_short(value)}", *problem)

    look(tree, "", 0)


def _wrong(value: Any) -> tuple[str, str] | None:
    """What is needed instead of a single value, and what to do; None where it is fine."""
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            return "text without NUL and half characters", "Leave them out."
        return None
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else ("a finite number", "Write one, or leave the field out.")
    if isinstance(value, int):
        return None if abs(value) <= _MAX_INTEGER else (f"a number up to {_MAX_INTEGER:,}", "Write a smaller one.")
    return "a text, number, truth value, list or mapping", "Quote it, if it is a text."


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key named twice, deep nesting, and merges that multiply."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH * 2:  # keys and values are nodes below each other
            raise yaml.composer.ComposerError(None, None, "nested too deep", self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in seen:
                    raise yaml.composer.ComposerError(None, None, f'the key "{key.value}" twice', key.start_mark)
                seen.add(name)
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) that multiply", node.start_mark)


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


def write_recipe_text(recipe: Recipe) -> str:
    """A recipe as ``read_recipe_text`` reads it: ``write_line`` without what has its default."""
    return write_line(recipe.model_dump(mode="json", exclude_defaults=True))


def write_line(tree: Mapping[str, Any]) -> str:
    """Sorted YAML in one line.

    Kubeflow writes a parameter as JSON in JSON in JSON, where each quotation mark of it takes eight bytes, six
    times a task (``kubeflow/sizes.py``); YAML has none around names and plain words.

    Args:
        tree: Plain values.
    """
    return yaml.dump(tree, Dumper=yaml.SafeDumper, default_flow_style=True, width=math.inf, allow_unicode=True).strip()


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with some of its values replaced, checked as a whole again.

    Args:
        recipe: Left as it is; of a part, a part of the same fields is made.
        changes: Values by dotted path, as for ``load_recipe``.

    Raises:
        RecipeError: A path that names nothing, or a value that does not fit.
    """
    part: Part | None = recipe.__dict__.get(PART)
    for path in changes:
        if part and not any(f"{path}.".startswith(f"{known}.") for known in part.paths):
            raise RecipeError(
                f'"{path}" is to change',
                f"one of {', '.join(part.paths)}: {part.reader} reads no others",
                "Leave it out; it would change nothing here.",
            )
    where = "recipe" if part else recipe.name
    return _changed(recipe.model_dump(mode="json"), changes, where=where, part=part)


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


def _changed(tree: dict[str, Any], changes: Mapping[str, Any], *, where: str, part: Part | None = None) -> Recipe:
    for path, value in changes.items():
        apply_override(tree, path, value)
    return _check(tree, where=where, part=part)


def _check(tree: Any, *, where: str, part: Part | None = None) -> Recipe:
    check_values(tree, where=where)
    try:
        recipe = read_fields(tree, part.paths, reader=part.reader) if part else Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain_invalid(error, where=where) from error
    size = len(recipe.canonical_json())
    if size > MAX_BYTES:
        raise RecipeError(
            f"{where} takes {size:,} bytes as JSON",
            f"{MAX_BYTES:,} at most: every step of a pipeline gets it on its command line",
            "Shorten its longest texts and lists.",
        )
    return recipe


def explain_invalid(
    error: ValidationError,
    *,
    where: str,
    model: type[BaseModel] = Recipe,
    see: str = "See a whole recipe with: manyeyes recipe show tiny",
) -> RecipeError:
    """What pydantic says of a recipe, in words for people.

    Args:
        error: Of ``model``.
        where: What messages call the recipe.
        model: What it was to be.
        see: Where one can look up how it is written.
    """
    problems = error.errors()
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"]) or "recipe"
    more = f" ({len(problems) - 1} more of its fields are wrong too.)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1], model)
        name = str(first["loc"][-1])
        known = f"The fields there are {', '.join(fields)}." if fields else ""
        return RecipeError(f"{where}: {place}", "no such field", f"{did_you_mean(name, fields)}{known}{more}")
    if first["type"] == "missing":
        return RecipeError(f"{where}: {place} is missing", "this field has no default", f"Add it.{more}")
    message = str(first["msg"]).removeprefix("Value error, ")
    value = repr(first["input"])
    shown = "" if isinstance(first["input"], dict) or len(value) > _SHOWN_CHARACTERS else f" is {value}"
    return RecipeError(f"{where}: {place}{shown}", message, f"{see}{more}")


def _fields_at(location: tuple[int | str, ...], model: Any) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        # A part that is no field is the tag of a gate rule, or a key of a mapping.
        model = GATE_RULES.get(part, model) if field is None else model_inside(field.annotation)
    return sorted(getattr(model, "model_fields", {}))
