"""A part of a recipe: the fields that somebody reads, and no others.

It is a ``Recipe`` whose other fields are missing. Reading one of them is an error that names the field and the reader;
so what a reader is given decides what it can depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import create_model
from pydantic_core import PydanticUndefined

from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.recipe.model import PART, FusionSpec, Part, Strict, model_inside
from manyeyes.recipe.recipe import Recipe

# Fields by name; None for a field that is taken whole.
Fields = Mapping[str, "Fields | None"]


def take_fields(recipe: Recipe, paths: Sequence[str], *, reader: str) -> Recipe:
    """The part of a recipe that ``reader`` reads.

    Args:
        recipe: Whole, or a part that has these fields.
        paths: Dotted, for instance ``stages.sft``; one through a list takes the field of each entry.
        reader: Named by the error.
    """
    tree = recipe.model_dump(mode="json", exclude_defaults=True)
    return read_fields(_select(tree, _tree(paths)), paths, reader=reader)


def read_fields(tree: Mapping[str, Any], paths: Sequence[str], *, reader: str) -> Recipe:
    """A part of a recipe from what ``model_dump`` made of it.

    Args:
        tree: Fields that are left out have their defaults.
        paths: As for ``take_fields``.
        reader: As for ``take_fields``.

    Raises:
        ValidationError: A field that is not among ``paths``, a wrong value, or one missing that has no default.
        RecipeError: Stages and model, where it has both whole, do not fit together.
    """
    part = _read(Recipe, tree, _tree(paths), Part(reader, "", tuple(paths)))
    assert isinstance(part, Recipe)
    if {"model", "stages"} <= set(paths):
        try:
            part.check_stages()
        except ValueError as error:
            raise RecipeError("the recipe", str(error), "See a whole recipe with: manyeyes recipe show tiny") from error
    return part


def one_encoder(recipe: Recipe, name: str) -> Recipe:
    """The recipe as ``prealign`` trains one encoder: one that is alone knows nothing of its company.

    Args:
        recipe: With a prealign stage.
        name: Of the encoder.

    Raises:
        RecipeError: The stage does not train it.
    """
    stage, known = recipe.stages.prealign, recipe.prealigned_encoders()
    if stage is None or name not in known:
        raise RecipeError(
            f'encoder is "{name}"',
            f"prealign trains {', '.join(known) or 'none: the recipe has no such stage'}",
            did_you_mean(name, known) or "Name one of them.",
        )
    model = recipe.stage_model("prealign")
    # Shared pixels are as large as the encoder that needs most.
    if len(model.encoders) > 1 and model.preprocess == "independent":
        model = model.model_copy(
            update={
                "encoders": tuple(encoder for encoder in model.encoders if encoder.name == name),
                "fusion": FusionSpec(grid=model.fusion.grid),
                "layout": None,
                "reinjection": None,
            }
        )
    others = {f"encoders.{encoder.name}" for encoder in recipe.model.encoders if encoder.name != name}
    train = {group: rate for group, rate in stage.train.items() if group not in others}
    stage = stage.model_copy(update={"model": None, "encoders": (name,), "train": train or stage.train})
    stages = recipe.stages.model_copy(update={"prealign": stage})
    return recipe.model_copy(update={"model": model, "stages": stages})


def _tree(paths: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        *above, last = path.split(".")
        for name in above:
            node = node.setdefault(name, {})
        node[last] = None
    return tree


def _select(tree: Any, fields: Fields | None) -> Any:
    if fields is None or tree is None:
        return tree
    if isinstance(tree, list):
        return [_select(entry, fields) for entry in tree]
    return {name: _select(tree[name], below) for name, below in fields.items() if name in tree}


@lru_cache
def _whole_fields(model: type[Strict], names: tuple[str, ...]) -> type[Strict]:
    """A model that checks these fields of ``model`` as ``model`` does."""
    fields: Any = {name: (model.model_fields[name].annotation, model.model_fields[name]) for name in names}
    made: type[Strict] = create_model(model.__name__, __base__=Strict, **fields)
    return made


def _read(model: type[Strict], tree: Mapping[str, Any], fields: Fields, part: Part) -> Strict:
    values: dict[str, Any] = {}
    whole = {name: tree[name] for name in tree if name not in fields or fields[name] is None}
    checked = _whole_fields(model, tuple(sorted(name for name in fields if fields[name] is None))).model_validate(whole)
    for name, below in fields.items():
        if below is None:
            values[name] = getattr(checked, name)
            continue
        field = model.model_fields[name]
        given = tree.get(name, {} if field.default is PydanticUndefined else field.default)
        inner = model_inside(field.annotation)
        assert issubclass(inner, Strict)
        below_part = Part(part.reader, f"{part.place}.{name}".lstrip("."), ())
        if isinstance(given, Strict):
            given = given.model_dump(mode="json", exclude_defaults=True)
        if given is None:
            values[name] = None
        elif isinstance(given, Mapping):
            values[name] = _read(inner, given, below, below_part)
        else:
            values[name] = tuple(_read(inner, entry, below, below_part) for entry in given)
    made = model.model_construct(_fields_set=set(values), **values)
    for name in set(made.__dict__) - set(values):
        del made.__dict__[name]
    made.__dict__[PART] = part
    return made
