"""CLIP, SigLIP, DINOv2 and ConvNeXt of any size in their publishers' layouts, beside a checkpoint and inside one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from manyeyes.converters.clip import escaped, exact_ratio, plan_clip
from manyeyes.converters.system import (
    EPSILON,
    HEADS,
    IMAGE_SIZE,
    EncoderPlan,
    FoundEncoder,
    changed,
    count_numbered,
    outside_shapes,
    pixels_of,
    published_size,
    shape_of,
    stated,
    told_or_published,
    weights_file,
)
from manyeyes.converters.tables import KeyTable, Leave, Shape, Take
from manyeyes.encoders import encoder_row
from manyeyes.encoders.dinov2 import dinov2_keys
from manyeyes.encoders.siglip import siglip_keys
from manyeyes.encoders.vit import resample_positions

_CLASS = "embeddings.class_embedding"


def plan_outside_clip(
    found: FoundEncoder, *, row: str, fit: Literal["stretch", "crop", "pad"], select_layer: int
) -> EncoderPlan:
    """A CLIP tower in its own folder; what its configuration leaves out, its tensors tell.

    Args:
        found: The encoder.
        row: The published encoder that it is, or a reduced form of.
        fit: What happens to an image that is not square.
        select_layer: Index of ``hidden_states`` whose output is taken.

    Raises:
        CheckpointError: Its size cannot be told; says what to pass.
        SourceError: It cannot be had.
    """
    file = weights_file(found, row=row)
    stored = outside_shapes(file)
    prefix = next((key.removesuffix(_CLASS) for key in stored if key.endswith(_CLASS)), None)
    if prefix is None:
        # Shapes of a tower in another layout cannot be asked; its configuration can.
        return replace(plan_clip(found, row=row, fit=fit, select_layer=select_layer), weights=file)
    entry = plan_clip(found, row=row, fit=fit, select_layer=select_layer, stored=stored, prefix=prefix)
    return replace(entry, weights=file)


def plan_siglip(
    found: FoundEncoder,
    *,
    row: str,
    fill: tuple[int, int, int] | None,
    stored: Mapping[str, Shape] | None = None,
) -> EncoderPlan:
    """A SigLIP trunk: timm's, as open_clip builds it.

    Args:
        found: The encoder.
        row: The published encoder that it is, or a reduced form of.
        fill: Colour around an image that is padded.
        stored: Shapes of its tensors when the checkpoint holds it; left out, its own file is looked into.

    Raises:
        CheckpointError: Its size cannot be told; says what to pass.
        SourceError: It cannot be had.
    """
    shapes, file = _stored_or_own(found, stored, row=row)
    shapes = _timm_shapes(siglip_keys(_on_meta(shapes)))
    sizes = _sizes(shapes, row=row, found=found)
    grid = math.isqrt(shape_of(shapes, "pos_embed", 3, found=found)[1])
    published = encoder_row(row)
    patch = int(sizes["patch_size"])
    # At 384 pixels some are left over beyond the last whole patch, which positions do not tell.
    same = grid == published.image_size // patch and patch == published.architecture["patch_size"]
    image_size = int(stated(found, IMAGE_SIZE) or (published.image_size if same else grid * patch))
    return _plan(found, row=row, sizes=sizes, image_size=image_size, fill=fill, weights=file)


def plan_dinov2(
    found: FoundEncoder, *, row: str, image_size: int | None, stored: Mapping[str, Shape] | None = None
) -> EncoderPlan:
    """A DINOv2; its positions are resampled as its own code does.

    Args:
        found: The encoder.
        row: The published encoder that it is, or a reduced form of.
        image_size: Pixels a side that it runs at; that of its configuration when left out.
        stored: Shapes of its tensors when the checkpoint holds it; left out, its own file is looked into.

    Raises:
        CheckpointError: Its size cannot be told; says what to pass.
        SourceError: It cannot be had.
    """
    shapes, file = _stored_or_own(found, stored, row=row)
    shapes = _timm_shapes(dinov2_keys(_on_meta(shapes)))
    sizes = _sizes(shapes, row=row, found=found)
    grid = math.isqrt(shape_of(shapes, "pos_embed", 3, found=found)[1] - 1)
    gate = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, found=found)[0]
    swiglu = gate == 2 * shape_of(shapes, "blocks.0.mlp.fc2.weight", 2, found=found)[1]
    size = image_size or int(stated(found, IMAGE_SIZE) or grid * int(sizes["patch_size"]))
    return _plan(found, row=row, sizes={**sizes, "swiglu": swiglu}, image_size=size, fill=None, weights=file)


def siglip_table(name: str, *, prefix: str) -> KeyTable:
    """Rules for a trunk of timm's inside a checkpoint.

    Args:
        name: Its name inside our model.
        prefix: What stands before its own names.
    """
    return KeyTable(
        takes=(Take(rf"encoders\.{name}\.net\.(.*)", (prefix + r"\1",)),),
        leaves=(Leave(escaped(prefix) + r"(attn_pool|head|fc_norm)\..*", "features are taken before the pool"),),
    )


def dinov2_table(name: str, *, prefix: str, plan: EncoderPlan) -> KeyTable:
    """Rules for a DINOv2 in transformers' layout inside a checkpoint.

    Args:
        name: Its name inside our model.
        prefix: What stands before its own names.
        plan: From ``plan_dinov2``.
    """
    grid = plan.image_size // int(plan.architecture.get("patch_size", published_size(plan.row, "patch_size")))
    net, block = rf"encoders\.{name}\.net\.", rf"encoders\.{name}\.net\.blocks\.(\d+)\."
    embeddings, layer = prefix + "embeddings.", prefix + r"encoder.layer.\1."

    def positions(parts: Sequence[Tensor]) -> Tensor:
        return resample_positions(parts[0], grid=grid, num_prefix_tokens=1, method="offset")

    takes = (
        Take(net + "cls_token", (embeddings + "cls_token",)),
        Take(net + "pos_embed", (embeddings + "position_embeddings",), positions),
        Take(net + r"patch_embed\.proj\.(weight|bias)", (embeddings + r"patch_embeddings.projection.\1",)),
        Take(net + r"norm\.(weight|bias)", (prefix + r"layernorm.\1",)),
        Take(
            block + r"attn\.qkv\.(weight|bias)",
            tuple(layer + rf"attention.attention.{part}.\2" for part in ("query", "key", "value")),
        ),
        Take(block + r"attn\.proj\.(weight|bias)", (layer + r"attention.output.dense.\2",)),
        Take(block + r"norm([12])\.(weight|bias)", (layer + r"norm\2.\3",)),
        Take(block + r"ls([12])\.gamma", (layer + r"layer_scale\2.lambda1",)),
        Take(block + r"mlp\.fc1\.(weight|bias)", (layer + r"mlp.fc1.\2",)),
        Take(block + r"mlp\.fc2\.(weight|bias)", (layer + r"mlp.fc2.\2",)),
        Take(block + r"mlp\.fc1\.(weight|bias)", (layer + r"mlp.weights_in.\2",)),
        Take(block + r"mlp\.fc2\.(weight|bias)", (layer + r"mlp.weights_out.\2",)),
    )
    leaves = (Leave(escaped(embeddings) + "mask_token", "only pretraining masks patches"),)
    return KeyTable(takes=takes, leaves=leaves)


def _plan(
    found: FoundEncoder,
    *,
    row: str,
    sizes: Mapping[str, Any],
    image_size: int,
    fill: tuple[int, int, int] | None,
    weights: Path | None,
) -> EncoderPlan:
    told = {name: sizes[name] for name in ("patch_size", "width", "depth")}
    architecture = {
        **sizes,
        "heads": int(told_or_published(found, HEADS, row=row, field="heads", sizes=told)),
        "epsilon": float(stated(found, EPSILON) or 1e-6),
    }
    defaults = {"mlp_ratio": 4.0, "epsilon": 1e-6, "swiglu": False}
    return EncoderPlan(
        name=found.name,
        row=row,
        image_size=image_size,
        architecture=changed(row, architecture, defaults=defaults),
        transform=pixels_of(row, image_size=image_size, fit="pad", fill=fill),
        weights=weights,
    )


def _sizes(shapes: Mapping[str, Shape], *, row: str, found: FoundEncoder) -> dict[str, Any]:
    width, _, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 4, found=found)
    hidden = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, found=found)[0]
    published = float(encoder_row(row).architecture.get("mlp_ratio", 4.0))  # type: ignore[arg-type]
    return {
        "patch_size": patch,
        "width": width,
        "depth": count_numbered(shapes, "blocks."),
        "mlp_ratio": published if int(width * published) == hidden else exact_ratio(hidden, width),
    }


def _stored_or_own(
    found: FoundEncoder, stored: Mapping[str, Shape] | None, *, row: str
) -> tuple[Mapping[str, Shape], Path | None]:
    if stored is not None:
        return stored, None
    file = weights_file(found, row=row)
    return outside_shapes(file), file


def _on_meta(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _timm_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


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
