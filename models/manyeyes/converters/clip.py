"""CLIP towers inside published checkpoints, and beside them, in transformers' layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import CLIPVisionConfig

from manyeyes.converters.system import EncoderPlan, FoundEncoder
from manyeyes.converters.tables import KeyTable, Leave, Shape, Take
from manyeyes.encoders import encoder_row, encoder_transform
from manyeyes.errors import CheckpointError
from manyeyes.runtime.preprocess import ImageTransform

_RESAMPLE: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "hidden_act",
    "layer_norm_eps",
)


def plan_clip(
    found: FoundEncoder,
    *,
    row: str,
    fit: Literal["stretch", "crop", "pad"],
    select_layer: int | None = None,
    stored: Mapping[str, Shape] | None = None,
    prefix: str = "",
    image_size: int | None = None,
) -> EncoderPlan:
    """A CLIP tower of any size.

    Args:
        found: What is known of it outside the checkpoint.
        row: The published encoder that it is, or a reduced form of.
        fit: What happens to an image that is not square.
        select_layer: Index of ``hidden_states`` whose output is taken; the row's own when left out.
        stored: Shapes of the checkpoint's tensors, when the tower is among them.
        prefix: What stands before ``embeddings.class_embedding`` there.
        image_size: Pixels a side that it runs at, where that is not its own.

    Raises:
        CheckpointError: Its size cannot be told; says what to pass. Or a layer that is no block's output.
    """
    config = _clip_config(found, row=row, stored=stored, prefix=prefix)
    published = encoder_row(row).architecture
    width, depth = int(config.hidden_size), int(config.num_hidden_layers)
    changes = {
        "width": width,
        "depth": depth,
        "heads": int(config.num_attention_heads),
        "patch_size": int(config.patch_size),
        "mlp_ratio": exact_ratio(int(config.intermediate_size), width),
        "activation": str(config.hidden_act),
        "epsilon": float(config.layer_norm_eps),
    }
    if select_layer is not None:
        changes["layer"] = _layer(select_layer, depth)
    own = {"mlp_ratio": 4.0, **published}
    size = image_size or int(config.image_size)
    if image_size is None:
        _check_preprocessor(found, size)
    return EncoderPlan(
        name=found.name,
        row=row,
        image_size=size,
        architecture={key: value for key, value in changes.items() if own.get(key) != value},
        transform=clip_transform(found, row=row, image_size=size, fit=fit),
        weights=None if stored is not None else found.weights(),
    )


def clip_transform(
    found: FoundEncoder, *, row: str, image_size: int, fit: Literal["stretch", "crop", "pad"]
) -> ImageTransform:
    """How a tower wants its pixels: as its ``preprocessor_config.json`` says, else as its row."""
    known = encoder_transform(row, image_size=image_size)
    says = found.preprocessor or {}
    return ImageTransform(
        size=image_size,
        mean=_three(says.get("image_mean"), known.mean),
        std=_three(says.get("image_std"), known.std),
        resample=_RESAMPLE.get(int(says.get("resample") or 3), "bicubic"),
        fit=fit,
    )


def clip_table(name: str, *, prefix: str, plan: EncoderPlan) -> KeyTable:
    """Rules for a tower inside a checkpoint.

    Args:
        name: Its name inside our model.
        prefix: What stands before ``embeddings.class_embedding``, such as ``model.vision_tower.vision_tower.
            vision_model.``.
        plan: From ``plan_clip``.
    """
    architecture = {**encoder_row(plan.row).architecture, **plan.architecture}
    sees_class = bool(architecture["class_token"])
    blocks = int(architecture["depth"]) + int(architecture["layer"]) + 1  # type: ignore[call-overload]
    net, here, layer = rf"encoders\.{name}\.net\.", prefix, prefix + r"encoder.layers.\1."

    def positions(parts: Sequence[Tensor]) -> Tensor:
        return parts[0][None] if sees_class else parts[0][None, 1:]

    takes = (
        Take(net + "cls_token", (here + "embeddings.class_embedding",), lambda parts: parts[0].reshape(1, 1, -1)),
        Take(net + "pos_embed", (here + "embeddings.position_embedding.weight",), positions),
        Take(net + r"patch_embed\.proj\.(weight|bias)", (here + r"embeddings.patch_embedding.\1",)),
        Take(net + r"norm_pre\.(weight|bias)", (here + r"pre_layrnorm.\1",)),
        Take(
            net + r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)",
            tuple(layer + rf"self_attn.{letter}_proj.\2" for letter in "qkv"),
        ),
        Take(net + r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", (layer + r"self_attn.out_proj.\2",)),
        Take(net + r"blocks\.(\d+)\.norm([12])\.(weight|bias)", (layer + r"layer_norm\2.\3",)),
        Take(net + r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", (layer + r"mlp.fc\2.\3",)),
    )
    quoted = escaped(prefix)
    leaves = [
        Leave(quoted + r"embeddings\.position_ids", "a table of numbers from 0", recomputed=True),
        Leave(quoted + r"post_layernorm\..*", "features are taken before CLIP's last norm"),
        *(
            Leave(quoted + rf"encoder\.layers\.{block}\..*", f"features are taken after block {blocks}")
            for block in range(blocks, int(architecture["depth"]))  # type: ignore[call-overload]
        ),
    ]
    if not sees_class:
        leaves.append(Leave(quoted + r"embeddings\.class_embedding", "its patches never see the class token"))
    return KeyTable(takes=takes, leaves=tuple(leaves))


def exact_ratio(hidden: int, width: int) -> float:
    """A ratio of which ``int(width * ratio)`` is ``hidden``, whatever rounding does."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def escaped(prefix: str) -> str:
    """A prefix of keys as a regular expression."""
    return prefix.replace(".", r"\.")


def _clip_config(found: FoundEncoder, *, row: str, stored: Mapping[str, Shape] | None, prefix: str) -> CLIPVisionConfig:
    if found.config is not None:
        # What the tensors tell need not be said again.
        told = {} if stored is None else _told_by_tensors(found, stored, prefix)
        return CLIPVisionConfig(**{**told, **{key: found.config[key] for key in _FIELDS if key in found.config}})
    published = encoder_row(row)
    if stored is None:
        # Weights without a configuration: those that the row names.
        return CLIPVisionConfig(**_published_fields(row))
    told = _told_by_tensors(found, stored, prefix)
    same = {key: value for key, value in _published_fields(row).items() if key in told}
    if told != same:
        raise CheckpointError(
            f'encoder "{found.name}" has {", ".join(f"{key} {value}" for key, value in told.items())}; '
            f"{published.paper} has {', '.join(f'{key} {value}' for key, value in same.items())}",
            "its number of heads, which no tensor tells",
            f'Pass --encoder-config FILE.json with {{"{found.name}": {{"num_attention_heads": ..., ...}}}}, the fields '
            "of its own config.json; or --encoders DIR with that file in it.",
        )
    return CLIPVisionConfig(**_published_fields(row))


def _told_by_tensors(found: FoundEncoder, stored: Mapping[str, Shape], prefix: str) -> dict[str, int]:
    try:
        width, _, patch, _ = stored[prefix + "embeddings.patch_embedding.weight"]
        positions, _ = stored[prefix + "embeddings.position_embedding.weight"]
        hidden, _ = stored[prefix + "encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f'encoder "{found.name}" has no usable {error}',
            f"the tensors of a CLIP tower under {prefix}",
            "Fetch the checkpoint again.",
        ) from error
    layers = prefix + "encoder.layers."
    numbers = {int(key.removeprefix(layers).partition(".")[0]) for key in stored if key.startswith(layers)}
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(numbers),
        "patch_size": patch,
        "image_size": math.isqrt(positions - 1) * patch,
    }


def _published_fields(row: str) -> dict[str, Any]:
    known = encoder_row(row)
    architecture: dict[str, Any] = {"mlp_ratio": 4.0, **known.architecture}
    return {
        "hidden_size": architecture["width"],
        "intermediate_size": int(architecture["width"] * architecture["mlp_ratio"]),
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["heads"],
        "patch_size": architecture["patch_size"],
        "image_size": known.image_size,
        "hidden_act": architecture["activation"],
        "layer_norm_eps": architecture["epsilon"],
    }


def _layer(select_layer: int, depth: int) -> int:
    # hidden_states has depth + 1 entries, the first of them what enters block 1.
    index = select_layer if select_layer < 0 else select_layer - depth - 1
    if not -depth <= index <= -1:
        raise CheckpointError(
            f"mm_vision_select_layer is {select_layer}",
            f"the output of one of {depth} blocks",
            "Use 1 and above, or -1 and below.",
        )
    return index


def _check_preprocessor(found: FoundEncoder, size: int) -> None:
    for field in ("size", "crop_size"):
        says = (found.preprocessor or {}).get(field)
        sides = set(says.values()) if isinstance(says, dict) else {says}
        if not sides <= {size, None}:
            raise CheckpointError(
                f'encoder "{found.name}" has {field} {says} in preprocessor_config.json, and image_size {size}',
                "images of the size that the encoder takes",
                "Check that both files belong to it.",
            )


def _three(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if values is None:
        return default
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def clip_folder_is_here(path: Path | None) -> bool:
    """Whether a folder has weights, not only a configuration."""
    return path is not None and (path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")))


def clip_row(published: str, stored: Mapping[str, Shape], prefix: str | None) -> str:
    """The published tower that a checkpoint names, or whose size it holds; else the one of most systems.

    Args:
        published: What the checkpoint calls it; only the whole id of a row counts.
        stored: Shapes of the checkpoint's tensors.
        prefix: What stands before ``embeddings.class_embedding``; None without a tower.
    """
    rows = ("clip-l14-336", "clip-l14-224")
    for row in rows:
        if encoder_row(row).source.startswith(f"hub:{published}@"):
            return row
    positions = stored.get(f"{prefix}embeddings.position_embedding.weight", (0,))[0]
    return next((row for row in rows if (encoder_row(row).image_size // 14) ** 2 + 1 == positions), rows[0])
