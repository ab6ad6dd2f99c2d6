"""``manyeyes encoders, fusions, projectors``: the parts that a recipe may name, and the options of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from manyeyes.encoders import EncoderRow


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
    from manyeyes.steps.kept import kept

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
