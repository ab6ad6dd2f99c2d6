"""``manyeyes encoders, fusions, projectors``: the parts that a recipe may name, and the options of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from manyeyes.encoders import EncoderRow


@click.command("encoders")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="JSON: the row NAME, or all rows by name.")
def encoders_command(name: str | None, as_json: bool) -> None:
    """The vision encoders that a recipe may name; everything about one with NAME."""
    from manyeyes.encoders import ENCODERS, encoder_row

    if as_json:
        every = {key: _encoder_facts(row) for key, row in ENCODERS.items()}
        click.echo(json.dumps(_encoder_facts(encoder_row(name)) if name else every, indent=2))
        return
    if name is not None:
        row = encoder_row(name)
        for field, value in _encoder_facts(row).items():
            click.echo(f"{field:<14} {_in_words(value)}")
        if not row.is_pinned:
            click.echo(f"Not pinned: write source: {row.source.partition('@')[0]}@<commit> in the recipe.")
        return
    for key, row in ENCODERS.items():
        click.echo(
            f"{key:<24} {row.family:<16} {row.image_size:>4} px, stride {row.stride}, {row.channels} channels; "
            f"{row.pretraining}; {row.licence}{'' if row.is_pinned else '; source not pinned'}"
        )
    loose = sum(not row.is_pinned for row in ENCODERS.values())
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
    from manyeyes.fusion import FUSIONS, fusion_row

    if name is None:
        for key, row in FUSIONS.items():
            click.echo(f"{key:<26} {row.description}")
        return
    row = fusion_row(name)
    click.echo(f"{name}: {row.description}")
    click.echo(f"source    {row.source}")
    click.echo(f"encoders  at least {row.min_encoders}")
    _show_options(row.options, where="model.fusion.options")


@click.command("projectors")
@click.argument("name", required=False)
def projectors_command(name: str | None) -> None:
    """The projectors that a recipe may name; the options of one with NAME."""
    from manyeyes.projector import PROJECTORS, projector_options

    if name is None:
        for key, options in PROJECTORS.items():
            click.echo(f"{key:<26} {', '.join(options.model_fields) or 'no options'}")
        return
    _show_options(projector_options(name), where="model.projector.options")


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


def _show_options(options: type[Any], *, where: str) -> None:
    if not options.model_fields:
        click.echo("options   none")
        return
    click.echo(f"{where}:")
    kinds = options.model_json_schema()["properties"]
    for key, field in options.model_fields.items():
        default = json.dumps(field.default)
        click.echo(f"  {key:<14} {_kind(kinds[key])}, default {default}")
        click.echo(f"  {'':<14} {field.description}")


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
