"""The towers that only Eagle has, of any size: SAM with a neck of its own, EVA-02 of a detector, Pix2Struct.

Each is known by its tensors; their keys are Eagle's own (github.com/NVlabs/EAGLE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from manyeyes.converters.clip import escaped
from manyeyes.converters.encoder_facts import (
    GLOBAL_BLOCKS,
    HEADS,
    IMAGE_SIZE,
    WINDOW,
    changed,
    count_numbered,
    pixels_of,
    published_size,
    shape_of,
    stated,
    told_or_published,
)
from manyeyes.converters.encoder_sources import FoundEncoder
from manyeyes.converters.system import EncoderPlan
from manyeyes.converters.tables import KeyTable, Leave, Shape, Take
from manyeyes.encoders.positions import resample_positions
from manyeyes.errors import CheckpointError

SAM, EVA02, PIX2STRUCT = "sam-l16-1024-eagle", "eva02-l16-det-1024", "pix2struct-l16-1024"
_PATCH = 16


def plan_sam(found: FoundEncoder, stored: Mapping[str, Shape]) -> EncoderPlan:
    """SAM: heads and windows follow from its tables of relative positions.

    Args:
        found: What is known of it outside the checkpoint.
        stored: Shapes of its tensors, under its own names.

    Raises:
        CheckpointError: Tensors that do not go together.
    """
    width, _, patch, _ = shape_of(stored, "patch_embed.projection.weight", 4, found=found)
    grid = shape_of(stored, "pos_embed", 4, found=found)[1]
    depth = count_numbered(stored, "layers.")
    tables = [shape_of(stored, f"layers.{layer}.attn.rel_pos_h", 2, found=found) for layer in range(depth)]
    sides = [(rows + 1) // 2 for rows, _ in tables]
    told_blocks = stated(found, GLOBAL_BLOCKS)
    global_blocks = tuple(told_blocks or (layer for layer, side in enumerate(sides) if side == grid))
    windows = {side for layer, side in enumerate(sides) if layer not in global_blocks}
    if len(windows) > 1:
        raise CheckpointError(
            f'encoder "{found.name}" has windows of {sorted(windows)} cells a side',
            "one size of window",
            "This checkpoint cannot be converted.",
        )
    architecture = {
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": width // tables[0][1],
        # A window of the whole grid is none: transformers would otherwise pad to it.
        "window": next(iter(windows), stated(found, WINDOW) or grid),
        "global_blocks": global_blocks,
        "neck_channels": shape_of(stored, "neck.conv1.weight", 4, found=found)[0],
        "hidden": shape_of(stored, "layers.0.mlp.lin1.weight", 2, found=found)[0],
    }
    defaults = {"neck_channels": 256, "hidden": 4 * published_size(SAM, "width")}
    return EncoderPlan(
        name=found.name,
        row=SAM,
        image_size=grid * patch,
        architecture=changed(SAM, architecture, defaults=defaults),
        transform=pixels_of(SAM, image_size=grid * patch, fit="pad"),
    )


def plan_eva02(found: FoundEncoder, stored: Mapping[str, Shape], *, image_size: int) -> EncoderPlan:
    """EVA-02: heads, windows and global blocks from rotary tables where they are stored, else from its configuration.

    Args:
        found: What is known of it outside the checkpoint.
        stored: Shapes of its tensors, under its own names.
        image_size: Pixels a side that it runs at.

    Raises:
        CheckpointError: A fact that nothing tells; says what to pass.
    """
    width, _, patch, _ = shape_of(stored, "patch_embed.proj.weight", 4, found=found)
    depth = count_numbered(stored, "blocks.")
    sizes = {"patch_size": patch, "width": width, "depth": depth}
    blocks = [stored.get(f"blocks.{block}.attn.rope.freqs_cos") for block in range(depth)]
    # One table for windows and one for the whole grid, each under one name or under many.
    tables = {shape for key, shape in stored.items() if key.endswith("freqs_cos")}
    windowed = [shape for shape in tables if shape[0] != (image_size // patch) ** 2]
    if len(windowed) == 1:
        heads, window = width // windowed[0][-1], math.isqrt(windowed[0][0])
    else:
        heads = told_or_published(found, HEADS, row=EVA02, field="heads", sizes=sizes)
        window = told_or_published(found, WINDOW, row=EVA02, field="window", sizes=sizes)
    told_windows = stated(found, ("window_block_indexes",))
    if told_windows is not None:
        global_blocks = tuple(block for block in range(depth) if block not in told_windows)
    elif stated(found, GLOBAL_BLOCKS) is None and all(blocks) and len(windowed) == 1:
        global_blocks = tuple(block for block, table in enumerate(blocks) if table and table[0] != window * window)
    else:
        names = ("window_block_indexes", *GLOBAL_BLOCKS)
        global_blocks = tuple(told_or_published(found, names, row=EVA02, field="global_blocks", sizes=sizes))
    architecture: dict[str, Any] = {
        **sizes,
        "heads": int(heads),
        "window": int(window),
        "global_blocks": global_blocks,
        "hidden": shape_of(stored, "blocks.0.mlp.w1.weight", 2, found=found)[0],
        "span": int(stated(found, ("pt_hw_seq_len", "pt_seq_len", "span")) or 16),
    }
    defaults = {"hidden": int(published_size(EVA02, "width") * 4 * 2 / 3), "span": 16}
    return EncoderPlan(
        name=found.name,
        row=EVA02,
        image_size=image_size,
        architecture=changed(EVA02, architecture, defaults=defaults),
        transform=pixels_of(EVA02, image_size=image_size, fit="pad"),
    )


def plan_pix2struct(found: FoundEncoder, stored: Mapping[str, Shape], *, image_size: int) -> EncoderPlan:
    """Pix2Struct.

    Args:
        found: What is known of it outside the checkpoint.
        stored: Shapes of its tensors, under its own names.
        image_size: Pixels a side of the tensor that it is given; it resizes that itself.

    Raises:
        CheckpointError: Its number of heads is not told, or patches of another size than 16 pixels.
    """
    width, pixels = shape_of(stored, "embeddings.patch_projection.weight", 2, found=found)
    if pixels != 3 * _PATCH * _PATCH:
        raise CheckpointError(
            f'encoder "{found.name}" has patches of {pixels} values',
            f"{3 * _PATCH * _PATCH}, which is {_PATCH} x {_PATCH} pixels",
            "This checkpoint cannot be converted.",
        )
    inner = shape_of(stored, "encoder.layer.0.attention.query.weight", 2, found=found)[0]
    hidden = shape_of(stored, "encoder.layer.0.mlp.wi_0.weight", 2, found=found)[0]
    sizes = {"width": width, "depth": count_numbered(stored, "encoder.layer."), "hidden": hidden}
    heads = int(told_or_published(found, HEADS, row=PIX2STRUCT, field="heads", sizes=sizes))
    architecture = {
        **sizes,
        "heads": heads,
        "positions": shape_of(stored, "embeddings.row_embedder.weight", 2, found=found)[0],
        "max_patches": int(stated(found, ("max_patches",)) or published_size(PIX2STRUCT, "max_patches")),
        "head_channels": None if inner == width else inner // heads,
    }
    return EncoderPlan(
        name=found.name,
        row=PIX2STRUCT,
        image_size=image_size,
        architecture=changed(PIX2STRUCT, architecture, defaults={"head_channels": None}),
        transform=pixels_of(PIX2STRUCT, image_size=image_size, fit="pad"),
    )


def own_image_size(found: FoundEncoder, *, default: int) -> int:
    """Pixels a side that an encoder's configuration gives it."""
    return int(stated(found, IMAGE_SIZE) or default)


def plain_table(name: str, *, prefix: str) -> KeyTable:
    """Rules for a tower whose keys are ours: SAM and Pix2Struct.

    Args:
        name: Its name inside our model.
        prefix: What stands before its own names.
    """
    return KeyTable(takes=(Take(rf"encoders\.{name}\.net\.(.*)", (prefix + r"\1",)),))


def eva02_table(name: str, *, prefix: str, plan: EncoderPlan) -> KeyTable:
    """Rules for EVA-02: positions are brought to the grid that it runs at, rotary tables are computed.

    Args:
        name: Its name inside our model.
        prefix: What stands before its own names.
        plan: From ``plan_eva02``.
    """
    patch = int(plan.architecture.get("patch_size", published_size(EVA02, "patch_size")))
    grid = plan.image_size // patch

    def positions(parts: Sequence[Tensor]) -> Tensor:
        stored = parts[0]
        # The position of a class token that is not there stands first.
        bare = stored if math.isqrt(stored.shape[1]) ** 2 == stored.shape[1] else stored[:, 1:]
        return resample_positions(bare, grid=grid, num_prefix_tokens=0, method="plain")

    net = rf"encoders\.{name}\.net\."
    return KeyTable(
        takes=(
            Take(net + "pos_embed", (prefix + "pos_embed",), positions),
            Take(net + r"(.*)", (prefix + r"\1",)),
        ),
        leaves=(
            Leave(
                escaped(prefix) + r"(.*\.)?(rope|rope_win|rope_glb)\.freqs_(cos|sin)",
                "rotary tables follow from the sizes",
                recomputed=True,
            ),
        ),
    )
