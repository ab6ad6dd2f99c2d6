"""Eagle X4, X5 and other lists of its vision experts.

Code: github.com/NVlabs/EAGLE (Apache-2.0). Paper: arXiv:2408.15998.

``mm_vision_tower`` lists the experts, ``;`` between them; expert i has the keys ``model.vision_tower.vision_towers.i``,
and its channels come i-th. What an expert is, its tensors say. The released code makes one tensor of 1,024 pixels with
CLIP's statistics, resizes it for each expert with aligned corners, and brings every map to 32 x 32 cells alike; its
"clip-448" runs at 336. Reduced checkpoints: the tensor is as large as ConvNeXt's configuration says, and the grid is
1/32 of that, where ConvNeXt's map needs no resizing, unless an expert's ``grid_size`` says otherwise.

Towers that only Eagle has, of any size (SAM with a neck of its own, EVA-02 of a detector, Pix2Struct): each is known
by its tensors; their keys are Eagle's own (github.com/NVlabs/EAGLE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from manyeyes.converters.clip import clip_table, escaped, plan_clip
from manyeyes.converters.encoder_layouts import convnext_shapes, convnext_table, plan_convnext
from manyeyes.converters.llava import DEFAULT_MAX_LENGTH, plan_projector
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import (
    GLOBAL_BLOCKS,
    HEADS,
    IMAGE_SIZE,
    INPUT_SIZE,
    WINDOW,
    EncoderPlan,
    EncoderSources,
    FoundEncoder,
    Plan,
    System,
    changed,
    count_numbered,
    pixels_of,
    published_size,
    shape_of,
    stated,
    told_or_published,
)
from manyeyes.converters.tables import (
    KeyTable,
    Leave,
    Shape,
    Take,
    added_tokens,
    join_tables,
    language_table,
    plan_text_config,
)
from manyeyes.encoders.vit import resample_positions
from manyeyes.errors import CheckpointError
from manyeyes.model.configuration import SharedPixelsConfig
from manyeyes.recipe import FusionSpec, SharedSpec

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


_TOWERS = "model.vision_tower.vision_towers."
_CLIP, _CONVNEXT = "clip-l14-336-eagle", "convnext-xxl-1024"
_CANVAS, _CLIP_SIZE = 1024, 336
_LAST_STRIDE = 32
_MARKS = ("<im_start>", "<im_end>")

# A key that only one kind of expert has, and what it is called here.
_KINDS = {
    "vision_model.embeddings.class_embedding": ("clip", _CLIP),
    "stem.0.weight": ("convnext", _CONVNEXT),
    "patch_embed.projection.weight": ("sam", SAM),
    "patch_embed.proj.weight": ("eva02", EVA02),
    "embeddings.patch_projection.weight": ("pix2struct", PIX2STRUCT),
}


def recognises(config: Mapping[str, Any]) -> bool:
    """A model type of Eagle's first release."""
    return config.get("model_type") in ("eagle_llama", "eagle")


def plan(checkpoint: OriginalCheckpoint, encoders: EncoderSources) -> Plan:
    """Read configuration and shapes."""
    config = checkpoint.config()
    _check_supported(config)
    published = str(config.get("mm_vision_tower") or "").split(";")
    experts = [_Expert(checkpoint, encoders, number, name, published) for number, name in enumerate(published)]
    canvas = _canvas(experts)
    plans = tuple(_plan_expert(expert, canvas) for expert in experts)
    tables = [_expert_table(expert, entry) for expert, entry in zip(experts, plans, strict=True)]
    projector, projector_table = plan_projector(str(config.get("mm_projector_type") or "linear"))
    text_config = plan_text_config(checkpoint, "llama")
    marks = bool(config.get("mm_use_im_start_end"))
    patch = ("<im_patch>",) if config.get("mm_use_im_patch_token", True) else ()
    fit = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
    return Plan(
        text_config=text_config,
        encoders=plans,
        fusion=FusionSpec(grid=_grid(config, experts, canvas), options={"align_corners": True, "average": False}),
        projector=projector,
        keys=join_tables(
            language_table(tied=bool(text_config.get("tie_word_embeddings"))), *tables, projector_table, _NEWLINE
        ),
        template=_template(checkpoint),
        shared_pixels=SharedPixelsConfig(
            image_size=canvas, **SharedSpec().model_dump(include={"align_corners", "antialias"})
        ),
        shared_transform=pixels_of(_CONVNEXT, image_size=canvas, fit="pad" if fit == "pad" else "crop"),
        image_marks=_MARKS if marks else ("", ""),
        new_tokens=(*patch, *(_MARKS if marks else ())),
        max_length=int(config.get("tokenizer_model_max_length") or DEFAULT_MAX_LENGTH),
    )


_NEWLINE = KeyTable(takes=(), leaves=(Leave(r"model\.image_newline", "mm_patch_merge_type flat has no rows"),))


class _Expert:
    """One entry of the list: its kind, its tensors under its own names, and what is known of it elsewhere."""

    def __init__(
        self, checkpoint: OriginalCheckpoint, encoders: EncoderSources, number: int, name: str, names: list[str]
    ) -> None:
        self.prefix = f"{_TOWERS}{number}.vision_tower."
        self.stored: dict[str, Shape] = {
            key.removeprefix(self.prefix): shape
            for key, shape in checkpoint.shapes().items()
            if key.startswith(self.prefix)
        }
        kind = next((kind for marker, kind in _KINDS.items() if marker in self.stored), None)
        if kind is None:
            raise CheckpointError(
                f'config.json has mm_vision_tower "{";".join(names)}", and {checkpoint.path} has '
                + (f"unknown tensors under {self.prefix}" if self.stored else f"nothing under {self.prefix}"),
                "the weights of every expert: CLIP, ConvNeXt, SAM, EVA-02 or Pix2Struct; Eagle saves them all",
                "Fetch the whole checkpoint, not its projector alone.",
            )
        self.kind, self.row = kind
        # The same expert may stand in the list twice.
        own = self.kind if names.count(name) == 1 else f"{self.kind}-{number}"
        self.found: FoundEncoder = encoders.find(own, published=name, row=self.row, alone=False, inside=True)


def _canvas(experts: list[_Expert]) -> int:
    convnext = [expert for expert in experts if expert.kind == "convnext"]
    if not convnext:
        raise CheckpointError(
            f"mm_vision_tower lists {', '.join(expert.found.published for expert in experts)}",
            "a ConvNeXt among them, whose preprocessing Eagle takes for all",
            "This checkpoint cannot be converted.",
        )
    found = convnext[0].found
    size = int(stated(found, INPUT_SIZE) or own_image_size(found, default=_CANVAS))
    if size % _LAST_STRIDE:
        raise CheckpointError(
            f'encoder "{found.name}" has image_size {size}', f"a multiple of {_LAST_STRIDE}", "Fix --encoder-config."
        )
    return size


def _grid(config: Mapping[str, Any], experts: list[_Expert], canvas: int) -> int:
    # 32 in the released code, which is where ConvNeXt's map of 1,024 pixels needs no resizing.
    told = [config.get("grid_size"), *(stated(expert.found, ("grid_size",)) for expert in experts)]
    return int(next((size for size in told if size), canvas // _LAST_STRIDE))


def _plan_expert(expert: _Expert, canvas: int) -> EncoderPlan:
    found, stored = expert.found, expert.stored
    planners: dict[str, Callable[[], EncoderPlan]] = {
        "clip": lambda: plan_clip(
            found,
            row=_CLIP,
            fit="pad",
            stored=stored,
            prefix="vision_model.",
            image_size=_clip_size(found, canvas),
        ),
        "convnext": lambda: plan_convnext(
            found, row=_CONVNEXT, image_size=canvas, fit="pad", stored=convnext_shapes(stored)
        ),
        "sam": lambda: plan_sam(found, stored),
        "eva02": lambda: plan_eva02(
            found, stored, image_size=int(stated(found, INPUT_SIZE) or own_image_size(found, default=canvas))
        ),
        "pix2struct": lambda: plan_pix2struct(
            found, stored, image_size=int(stated(found, INPUT_SIZE) or own_image_size(found, default=canvas))
        ),
    }
    entry = planners[expert.kind]()
    # Each expert is given what the one tensor becomes at its size; what it would do to an image alone does not count.
    return replace(entry, transform=pixels_of(expert.row, image_size=entry.image_size, fit="pad"))


def _expert_table(expert: _Expert, entry: EncoderPlan) -> KeyTable:
    prefix, name = expert.prefix, entry.name
    tables: dict[str, Callable[[], KeyTable]] = {
        "clip": lambda: join_tables(
            _clip_positions(name, prefix=prefix + "vision_model.", plan=entry),
            clip_table(name, prefix=prefix + "vision_model.", plan=entry),
        ),
        "convnext": lambda: convnext_table(
            name, stem=prefix + "stem.", stages=prefix + "stages.", others=(prefix + "head.", prefix + "norm_pre.")
        ),
        "sam": lambda: plain_table(name, prefix=prefix),
        "eva02": lambda: eva02_table(name, prefix=prefix, plan=entry),
        "pix2struct": lambda: plain_table(name, prefix=prefix),
    }
    return tables[expert.kind]()


def _clip_size(found: FoundEncoder, canvas: int) -> int | None:
    size = stated(found, INPUT_SIZE) or stated(found, IMAGE_SIZE)
    if size is not None:
        return int(size)
    # Fixed in the released code, as the canvas is; a reduced canvas leaves the size that its positions tell.
    return _CLIP_SIZE if canvas == _CANVAS else None


def _clip_positions(name: str, *, prefix: str, plan: EncoderPlan) -> KeyTable:
    # Eagle resamples them where the tower runs at another size than it was made for.
    patch = int(plan.architecture.get("patch_size", published_size(_CLIP, "patch_size")))
    grid = plan.image_size // patch

    def positions(parts: Sequence[Tensor]) -> Tensor:
        return resample_positions(parts[0][None, 1:], grid=grid, num_prefix_tokens=0, method="antialias")

    rule = Take(rf"encoders\.{name}\.net\.pos_embed", (prefix + "embeddings.position_embedding.weight",), positions)
    return KeyTable(takes=(rule,))


def _check_supported(config: Mapping[str, Any]) -> None:
    refused = {
        "mm_vision_tower": not config.get("mm_vision_tower"),
        "mm_patch_merge_type": (config.get("mm_patch_merge_type") or "flat") != "flat",
        "image_aspect_ratio": config.get("image_aspect_ratio") not in (None, "square", "pad"),
        "mm_resampler_type": bool(config.get("mm_resampler_type")),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"config.json has {field} {config.get(field)!r}",
                "a list of experts, the merge type flat, the aspect ratio square or pad, and no resampler",
                "This checkpoint cannot be converted.",
            )


def _template(checkpoint: OriginalCheckpoint) -> str:
    tokens = added_tokens(checkpoint)
    if "<|start_header_id|>" in tokens:
        return "eagle_llama_3"
    return "chatml_direct" if "<|im_start|>" in tokens else "vicuna_v1"


SYSTEM = System(
    name="eagle",
    recognises=recognises,
    plan=plan,
    describes="model_type eagle_llama, and mm_vision_tower with ; between its experts",
)
