"""``manyeyes recipe show``: a recipe and what it needs.

``manyeyes encoders, fusions, projectors``: the parts that a recipe may name, and the options of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import yaml

from manyeyes.errors import SnapshotError, SourceError
from manyeyes.recipe import Recipe

if TYPE_CHECKING:
    from manyeyes.encoders import EncoderRow
    from manyeyes.estimate import RecipeEstimate


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
    from manyeyes.estimate import as_rows
    from manyeyes.pages import readable

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
    from manyeyes.steps.preflight import find_data, kept_estimate

    data = None
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


@click.command("encoders")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="JSON: the row NAME, or all rows by name.")
def encoders_command(name: str | None, as_json: bool) -> None:
    """The vision encoders that a recipe may name; everything about one with NAME."""
    rows = _kept("encoders", _all_encoders)
    if name is not None and name not in rows:
        from manyeyes.encoders import encoder_row

        encoder_row(name)  # says which name is nearest
    if as_json:
        click.echo(json.dumps(rows[name] if name else rows, indent=2))
        return
    if name is not None:
        row = rows[name]
        for field, value in row.items():
            click.echo(f"{field:<14} {_in_words(value)}")
        if not row["pinned"]:
            click.echo(f"Not pinned: write source: {row['source'].partition('@')[0]}@<commit> in the recipe.")
        return
    for key, row in rows.items():
        click.echo(
            f"{key:<24} {row['family']:<16} {row['image_size']:>4} px, stride {row['stride']}, "
            f"{row['channels']} channels; {row['pretraining']}; {row['licence']}"
            f"{'' if row['pinned'] else '; source not pinned'}"
        )
    loose = sum(not row["pinned"] for row in rows.values())
    if loose:
        click.echo(
            f"{loose} sources are not pinned to a commit: what they hold may change. "
            "Write source: hub:<id>@<commit> in the recipe.",
            err=True,
        )


@click.command("fusions")
@click.argument("name", required=False)
def fusions_command(name: str | None) -> None:
    """The ways to join encoders that a recipe may name; the options of one with NAME."""
    rows = _kept("fusions", _all_fusions)
    if name is None:
        for key, row in rows.items():
            click.echo(f"{key:<26} {row['description']}")
        return
    if name not in rows:
        from manyeyes.fusion import fusion_row

        fusion_row(name)  # says which name is nearest
    row = rows[name]
    click.echo(f"{name}: {row['description']}")
    click.echo(f"source    {row['source']}")
    click.echo(f"encoders  at least {row['min_encoders']}")
    _show_options(row["options"], where="model.fusion.options")


@click.command("projectors")
@click.argument("name", required=False)
def projectors_command(name: str | None) -> None:
    """The projectors that a recipe may name; the options of one with NAME."""
    rows = _kept("projectors", _all_projectors)
    if name is None:
        for key, options in rows.items():
            click.echo(f"{key:<26} {', '.join(options) or 'no options'}")
        return
    if name not in rows:
        from manyeyes.model.projector import projector_options

        projector_options(name)  # says which name is nearest
    _show_options(rows[name], where="model.projector.options")


def _kept(kind: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from manyeyes.harness.kept import kept

    rows: dict[str, Any] = json.loads(kept(kind, make=lambda: json.dumps(make())))
    return rows


def _all_encoders() -> dict[str, Any]:
    from manyeyes.encoders import ENCODERS

    return {key: _encoder_facts(row) for key, row in ENCODERS.items()}


def _all_fusions() -> dict[str, Any]:
    from manyeyes.fusion import FUSIONS

    return {
        key: {
            "description": row.description,
            "source": row.source,
            "min_encoders": row.min_encoders,
            "options": _options(row.options),
        }
        for key, row in FUSIONS.items()
    }


def _all_projectors() -> dict[str, Any]:
    from manyeyes.model.projector import PROJECTORS

    return {key: _options(options) for key, options in PROJECTORS.items()}


def _encoder_facts(row: EncoderRow) -> dict[str, Any]:
    return {
        "family": row.family,
        "channels": row.channels,
        "stride": row.stride,
        "image_size": row.image_size,
        "image_sizes": list(row.image_sizes or (row.image_size,)),
        "mean": list(row.mean),
        "std": list(row.std),
        "resample": row.resample,
        "fit": row.fit,
        "fill": list(row.fill or (int(255 * channel) for channel in row.mean)),
        "parameters": row.parameters,
        "features": row.features,
        "pretraining": row.pretraining,
        "licence": row.licence,
        "paper": row.paper,
        "source": row.source,
        "pinned": row.is_pinned,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"{entry:.6g}" if isinstance(entry, float) else str(entry) for entry in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _options(options: type[Any]) -> dict[str, list[str]]:
    kinds = options.model_json_schema().get("properties", {})
    return {
        key: [f"{_kind(kinds[key])}, default {json.dumps(field.default)}", str(field.description)]
        for key, field in options.model_fields.items()
    }


def _show_options(options: dict[str, list[str]], *, where: str) -> None:
    if not options:
        click.echo("options   none")
        return
    click.echo(f"{where}:")
    for key, lines in options.items():
        for label, line in zip((key, ""), lines, strict=True):
            click.echo(f"  {label:<14} {line}")


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(entry) for entry in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}s"
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
    return " ".join([words.get(schema["type"], schema["type"]), *bounds])


_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
