"""ConvNeXt towers of any size, inside published checkpoints and beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from manyeyes.converters.clip import escaped
from manyeyes.converters.encoder_sources import (
    EPSILON,
    FoundEncoder,
    changed,
    count_numbered,
    outside_shapes,
    pixels_of,
    shape_of,
    stated,
    weights_file,
)
from manyeyes.converters.system import EncoderPlan
from manyeyes.converters.tables import KeyTable, Leave, Shape, Take
from manyeyes.encoders import encoder_row

_STEM = "stem.0.weight"


def plan_convnext(
    found: FoundEncoder,
    *,
    row: str,
    image_size: int,
    fit: Literal["stretch", "crop", "pad"],
    stored: Mapping[str, Shape] | None = None,
    grid: int | None = None,
) -> EncoderPlan:
    """A ConvNeXt of any size.

    Args:
        found: What is known of it outside the checkpoint.
        row: The published encoder that it is, or a reduced form of.
        image_size: Pixels a side that it runs at.
        fit: What happens to an image that is not square.
        stored: Shapes of its tensors when the checkpoint holds it, with timm's names (``stem.0.weight``); left out,
            its own file is looked into.
        grid: Where all stages are taken: side of the grid that they are brought to; None for the first stage's own.

    Raises:
        CheckpointError: Its tensors are no ConvNeXt's.
        SourceError: It cannot be had.
    """
    file = weights_file(found, row=row) if stored is None else None
    shapes = stored if file is None else convnext_shapes(outside_shapes(file))
    assert shapes is not None
    stem = shape_of(shapes, _STEM, 4, found=found)
    stages = range(count_numbered(shapes, "stages."))
    depths = tuple(count_numbered(shapes, f"stages.{stage}.blocks.") for stage in stages)
    widths = (
        stem[0],
        *(shape_of(shapes, f"stages.{stage}.downsample.1.weight", 4, found=found)[0] for stage in stages[1:]),
    )
    architecture: dict[str, Any] = {"depths": depths, "widths": widths}
    epsilon = stated(found, EPSILON)
    if epsilon is not None:
        architecture["epsilon"] = float(epsilon)
    if encoder_row(row).architecture.get("stages") == "all":
        architecture["grid"] = grid
    return EncoderPlan(
        name=found.name,
        row=row,
        image_size=image_size,
        architecture=changed(row, architecture),
        transform=pixels_of(row, image_size=image_size, fit=fit),
        weights=file,
    )


def convnext_shapes(stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors of a ConvNeXt under timm's names, from timm's, open_clip's or Mini-Gemini's; empty when none are."""
    renamed = {key.replace("vision_stem.", "stem.").replace("vision_stages.", "stages."): key for key in stored}
    prefixes = [key.removesuffix(_STEM) for key in renamed if key == _STEM or key.endswith("." + _STEM)]
    if not prefixes:
        return {}
    prefix = min(prefixes, key=len)
    return {name.removeprefix(prefix): stored[key] for name, key in renamed.items() if name.startswith(prefix)}


def convnext_table(name: str, *, stem: str, stages: str, others: tuple[str, ...] = ()) -> KeyTable:
    """Rules for a ConvNeXt inside a checkpoint.

    Args:
        name: Its name inside our model.
        stem: What stands before the stem's ``0.weight``.
        stages: What stands before the number of a stage.
        others: What stands before parts that no system uses (``head.``).
    """
    net = rf"encoders\.{name}\.net\."
    block = rf"{net}stages\.(\d+)\.blocks\.(\d+)\.gamma"
    return KeyTable(
        takes=(
            Take(net + r"stem\.(.*)", (stem + r"\1",)),
            # transformers renames gamma to weight on some ways of loading.
            Take(block, (stages + r"\1.blocks.\2.gamma",)),
            Take(block, (stages + r"\1.blocks.\2.weight",)),
            Take(net + r"stages\.(.*)", (stages + r"\1",)),
        ),
        leaves=tuple(Leave(escaped(other) + ".*", "features are taken before the head") for other in others),
    )
