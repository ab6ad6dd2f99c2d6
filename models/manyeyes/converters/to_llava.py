"""From our checkpoint to LLaVA's own layout, for what that layout holds.

One CLIP tower, a projector of linear layers and a Llama, Mistral or MPT. The tower goes into a folder of its own,
``vision_tower``, which ``mm_vision_tower`` names: LLaVA finds it when it is started in the checkpoint's folder, or once
that field says its full path. It holds the blocks that are run, so ``mm_vision_select_layer`` is -1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyeyes.converters.clip import clip_table
from manyeyes.converters.llava import plan_projector
from manyeyes.converters.source import OriginalCheckpoint, open_checkpoint
from manyeyes.converters.system import EncoderPlan
from manyeyes.converters.tables import KeyTable, Take, join_tables, language_table
from manyeyes.converters.tensor_files import Planned, write_tensors
from manyeyes.encoders import encoder_row
from manyeyes.errors import CheckpointError
from manyeyes.model import ManyEyesConfig, checkpoint_digest
from manyeyes.model.configuration import EncoderConfig
from manyeyes.processor import ManyEyesProcessor
from manyeyes.recipe import ProjectorSpec
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.storage import new_folder

TOWER_FOLDER = "vision_tower"
_TOWER = "vision_model."
_MODEL_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def write_llava(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint of ours as LLaVA's.

    Args:
        checkpoint: Ours.
        out: A new folder; it appears when it is complete.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is something that LLaVA's layout has no place for.
        StorageError: No space or no permission.
    """
    checkpoint_digest(checkpoint)
    if out.exists():
        raise CheckpointError(f"{out} exists", "a new folder", "Name another.")
    ours = open_checkpoint(checkpoint)
    config = ManyEyesConfig.from_pretrained(checkpoint, local_files_only=True)
    processor = ManyEyesProcessor.from_pretrained(checkpoint, local_files_only=True)
    entry = _check(config)
    name = entry.name
    transform = processor.image_transforms[name]
    architecture = {**encoder_row(entry.encoder).architecture, **(entry.architecture or {})}
    plan = EncoderPlan(
        name=name,
        row=entry.encoder,
        image_size=entry.image_size,
        architecture=entry.architecture or {},
        transform=transform,
    )
    kind = _projector_type(config.projector)
    table = join_tables(
        language_table(),
        clip_table(name, prefix=_TOWER, plan=plan),
        plan_projector(kind)[1],
        KeyTable(takes=(Take("newline", ("model.image_newline",)),)),
    )
    theirs = _reverse(table, ours)
    blocks = architecture["depth"] + architecture["layer"] + 1
    with new_folder(out) as folder:
        _write(folder, ours, {key: origin for key, origin in theirs.items() if not key.startswith(_TOWER)})
        tower = folder / TOWER_FOLDER
        tower.mkdir()
        _write(
            tower,
            ours,
            {key: origin for key, origin in theirs.items() if key.startswith(_TOWER)},
            # CLIP's last norm, which no layer but the last output passes.
            extra={
                f"{_TOWER}post_layernorm.weight": torch.ones(architecture["width"]),
                f"{_TOWER}post_layernorm.bias": torch.zeros(architecture["width"]),
            },
        )
        _write_json(tower / "config.json", _tower_config(architecture, blocks=blocks, size=entry.image_size))
        _write_json(tower / "preprocessor_config.json", _preprocessor(transform))
        _write_json(folder / "config.json", _llava_config(config, processor, kind, transform, architecture))
        processor.tokenizer.save_pretrained(folder)
    ours.release()


def _check(config: ManyEyesConfig) -> EncoderConfig:
    encoders = config.encoders
    names = [entry.encoder for entry in encoders]
    row = encoder_row(names[0])
    grid = encoders[0].image_size // int({**row.architecture, **(encoders[0].architecture or {})}["patch_size"])
    problems = {
        f"the encoders {', '.join(names)}": len(names) != 1
        or row.family != "clip"
        or not row.architecture["class_token"]
        or encoders[0].small,
        f"the fusion {config.fusion.strategy} on a grid of {config.fusion.grid}": config.fusion.strategy
        != "channel-concat"
        or config.fusion.grid != grid,
        f"the projector {config.projector.kind}": config.projector.kind not in ("linear", "mlp", "identity"),
        "reinjection": config.reinjection is not None,
        "shared pixels": config.shared_pixels is not None,
        "tiles of a fixed grid": config.layout is not None and config.layout.tiling == "grid",
        f"the language model {config.text_config.model_type}": config.text_config.model_type not in _MODEL_TYPES,
    }
    for found, refused in problems.items():
        if refused:
            raise CheckpointError(
                f"the checkpoint has {found}",
                "LLaVA's layout holds one CLIP tower at its own grid, linear layers, and Llama, Mistral or MPT",
                "It cannot be written as LLaVA's.",
            )
    return encoders[0]


def _reverse(table: KeyTable, ours: OriginalCheckpoint) -> dict[str, tuple[str, int, int]]:
    """By their key: our key, which part of its rows, of how many."""
    theirs = {}
    for key in ours.keys():  # noqa: SIM118 - a checkpoint, not a mapping
        for rule in table.takes:
            match = re.fullmatch(rule.ours, key)
            if match is not None:
                for part, source in enumerate(rule.sources):
                    theirs[match.expand(source)] = (key, part, len(rule.sources))
                break
        else:
            raise CheckpointError(f'the checkpoint has "{key}"', "a key that LLaVA has too", "It cannot be written.")
    return theirs


def _write(
    folder: Path,
    ours: OriginalCheckpoint,
    theirs: Mapping[str, tuple[str, int, int]],
    *,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    stored, added = ours.keys(), dict(extra or {})

    def shape_of(key: str) -> tuple[int, ...]:
        origin, _, parts = theirs[key]
        shape = stored[origin].shape
        if origin.endswith("cls_token"):
            return shape[2:]
        if origin.endswith("pos_embed"):
            return shape[1:]
        return (shape[0] // parts, *shape[1:])

    def read(key: str) -> Tensor:
        if key in added:
            return added[key]
        origin, part, parts = theirs[key]
        return ours.tensor(origin).reshape(parts, *shape_of(key))[part]

    dtype = stored[next(iter(theirs.values()))[0]].dtype
    planned = {key: Planned(shape_of(key), stored[theirs[key][0]].dtype) for key in theirs}
    planned |= {key: Planned(tuple(tensor.shape), dtype) for key, tensor in added.items()}
    write_tensors(folder, planned, read)


def _projector_type(projector: ProjectorSpec) -> str:
    return f"mlp{projector.depth}x_gelu" if projector.kind == "mlp" else projector.kind


def _llava_config(
    config: ManyEyesConfig,
    processor: ManyEyesProcessor,
    kind: str,
    transform: ImageTransform,
    architecture: Mapping[str, Any],
) -> dict[str, Any]:
    text = {key: value for key, value in config.text_config.to_dict().items() if key not in ("dtype", "_name_or_path")}
    rope = text.pop("rope_parameters", None)
    if isinstance(rope, dict):
        # LLaVA's transformers reads the older fields.
        text["rope_theta"] = rope.get("rope_theta", 10_000.0)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        text["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    model_type, architecture_name = _MODEL_TYPES[config.text_config.model_type]
    layout = config.layout or TokenLayout()
    anyres = layout.tiling == "anyres"
    if transform.fit == "stretch" and not anyres:
        raise CheckpointError('images are fitted by "stretch"', "pad or crop", "It cannot be written as LLaVA's.")
    return {
        **text,
        "architectures": [architecture_name],
        "model_type": model_type,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
        "mm_vision_tower": TOWER_FOLDER,
        "mm_hidden_size": architecture["width"],
        "mm_projector_type": kind,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": processor.image_marks is not None,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": _merge_type(layout),
        "image_aspect_ratio": "anyres" if anyres else {"pad": "pad", "crop": "square"}[transform.fit],
        "image_grid_pinpoints": (
            [[columns * transform.size, rows * transform.size] for columns, rows in layout.pinpoints]
            if anyres
            else None
        ),
        "tokenizer_model_max_length": processor.max_length,
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }


def _merge_type(layout: TokenLayout) -> str:
    if layout.newline:
        return "spatial_unpad"
    return "spatial" if layout.tiling == "anyres" else "flat"


def _tower_config(architecture: Mapping[str, Any], *, blocks: int, size: int) -> dict[str, Any]:
    width = architecture["width"]
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": int(width * architecture.get("mlp_ratio", 4.0)),
        "num_hidden_layers": blocks,
        "num_attention_heads": architecture["heads"],
        "patch_size": architecture["patch_size"],
        "image_size": size,
        "hidden_act": architecture["activation"],
        "layer_norm_eps": architecture["epsilon"],
        "num_channels": 3,
        "projection_dim": width,
    }


def _preprocessor(transform: ImageTransform) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": transform.size},
        "resample": _RESAMPLE[transform.resample],
        "do_center_crop": True,
        "crop_size": {"height": transform.size, "width": transform.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "do_convert_rgb": True,
    }


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
