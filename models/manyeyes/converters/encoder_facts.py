"""What is known of a published encoder besides its tensors: its own configuration, and the row that it equals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from manyeyes.converters.encoder_sources import FoundEncoder
from manyeyes.converters.tables import Shape
from manyeyes.converters.tensor_files import list_tensors
from manyeyes.encoders import encoder_row, encoder_transform
from manyeyes.errors import CheckpointError, SourceError
from manyeyes.runtime.preprocess import ImageTransform

# Publishers name one thing differently: transformers, timm and detectron2, in this order.
HEADS = ("num_attention_heads", "num_heads", "heads")
EPSILON = ("layer_norm_eps", "norm_eps", "epsilon")
WINDOW = ("window_size", "window")
GLOBAL_BLOCKS = ("global_attn_indexes", "global_block_indexes", "global_blocks")
IMAGE_SIZE = ("image_size", "img_size")
# Pixels a side that the published code runs it at, whatever its configuration says.
INPUT_SIZE = ("input_image_size",)

_FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")


def stated(found: FoundEncoder, names: tuple[str, ...]) -> Any:
    """The first of these fields that the encoder's configuration has; None when it has none.

    Args:
        found: The encoder.
        names: What publishers call the field.
    """
    config = found.config or {}
    return next((config[name] for name in names if config.get(name) is not None), None)


def told_or_published(
    found: FoundEncoder, names: tuple[str, ...], *, row: str, field: str, sizes: Mapping[str, Any]
) -> Any:
    """A fact that no tensor tells: from the encoder's configuration, else from the row, where all sizes are the row's.

    Args:
        found: The encoder.
        names: What publishers call the fact.
        row: Row of ENCODERS that it is, at any size.
        field: What the row's architecture calls it.
        sizes: What the tensors tell, by the names of the row's architecture.

    Raises:
        CheckpointError: Neither; says what to pass.
    """
    value = stated(found, names)
    if value is not None:
        return value
    published = encoder_row(row).architecture
    if all(published.get(name) == size for name, size in sizes.items()):
        return published[field]
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise CheckpointError(
        f'encoder "{found.name}" ("{found.published}") has {told}, unlike the published one',
        f"its {names[0]}, which no tensor tells",
        f'Pass --encoder-config FILE.json with {{"{found.name}": {{"{names[0]}": ..., ...}}}}, the fields of its own '
        "configuration.",
    )


def changed(row: str, architecture: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of an architecture that differ from the row's own."""
    own = {**(defaults or {}), **encoder_row(row).architecture}
    return {key: value for key, value in architecture.items() if own.get(key) != value}


def published_size(row: str, field: str) -> int:
    """A whole number of a row's architecture."""
    value = encoder_row(row).architecture[field]
    assert isinstance(value, int), field
    return value


def count_numbered(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many numbered children a prefix such as ``blocks.`` has.

    Args:
        shapes: Stored tensors.
        prefix: Up to and with the dot before the number.
    """
    return len({key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)})


def shape_of(shapes: Mapping[str, Shape], key: str, rank: int, *, found: FoundEncoder) -> Shape:
    """The shape of a tensor that an encoder cannot be without.

    Raises:
        CheckpointError: Not there, or of another rank.
    """
    shape = shapes.get(key)
    if shape is None or len(shape) != rank:
        raise CheckpointError(
            f'encoder "{found.name}" ("{found.published}") has '
            + (f'no "{key}"' if shape is None else f'"{key}" {list(shape)}'),
            f"a tensor of {rank} dimensions",
            "Check that the weights belong to config.json, or fetch them again.",
        )
    return shape


def weights_file(found: FoundEncoder, *, row: str) -> Path:
    """The one file with an encoder's weights outside the checkpoint.

    Raises:
        SourceError: It cannot be had; says what to pass.
    """
    path = found.weights()
    if path.is_file():
        return path
    names = dict.fromkeys([*encoder_row(row).files, *_FILES])
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise SourceError(
            f'{path} for encoder "{found.name}" has no weights', f"one of {', '.join(names)}", "Put them there."
        )
    return file


def outside_shapes(file: Path) -> dict[str, Shape]:
    """Shapes of the tensors in an encoder's own file, without reading one.

    Raises:
        CheckpointError: It cannot be read.
    """
    return {key: stored.shape for key, stored in list_tensors(file).items()}


def pixels_of(
    row: str,
    *,
    image_size: int,
    fit: Literal["stretch", "crop", "pad"],
    fill: tuple[int, int, int] | None = None,
) -> ImageTransform:
    """How a row wants its pixels, with another fit."""
    return replace(encoder_transform(row, image_size=image_size, fill=fill), fit=fit)
