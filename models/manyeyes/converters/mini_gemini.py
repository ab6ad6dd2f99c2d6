"""Mini-Gemini (MGM), normal and HD: a small image asks, a large one answers.

Code: github.com/dvlab-research/MGM (Apache-2.0). Paper: arXiv:2403.18814.

The large image is made first; the small one is interpolated from it after normalisation (corners not aligned, no
antialiasing), and in HD is as many times as large and cut into tiles, the whole in front. Checkpoints may hold both
towers; they were frozen, so the published ones are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manyeyes.converters.clip import clip_row, clip_table, plan_clip
from manyeyes.converters.encoder_layouts import convnext_shapes, convnext_table, plan_convnext, plan_outside_clip
from manyeyes.converters.llava import DEFAULT_MAX_LENGTH, plan_projector
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import EncoderPlan, EncoderSources, Plan, System, published_size
from manyeyes.converters.tables import (
    KeyTable,
    Take,
    added_tokens,
    image_factor,
    join_tables,
    language_table,
    plan_text_config,
    scale_last,
)
from manyeyes.errors import CheckpointError
from manyeyes.model.configuration import SharedPixelsConfig
from manyeyes.processor import SHARED
from manyeyes.recipe import FusionSpec
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.tokenizer_files import load_published_tokenizer

_CLIP, _CONVNEXT = "clip", "convnext"
_CLIP_TOWER = "model.vision_tower.vision_tower.vision_model."
_AUX_TOWER = "model.vision_tower_aux."
_STEM, _STAGES = _AUX_TOWER + "vision_stem.", _AUX_TOWER + "vision_stages."
_MARKS = ("<im_start>", "<im_end>")
_LANGUAGE_MODELS = {
    "mgm": "llama",
    "mgm_llama": "llama",
    "mgm_gemma": "gemma",
    "mgm_mistral": "mistral",
    "mgm_mixtral": "mixtral",
    # Before the project was renamed.
    "mini_gemini": "llama",
    "mini_gemini_llama": "llama",
    "mini_gemini_gemma": "gemma",
    "mini_gemini_mistral": "mistral",
    "mini_gemini_mixtral": "mixtral",
}


def recognises(config: Mapping[str, Any]) -> bool:
    """A model type of Mini-Gemini's, and a second tower."""
    return config.get("model_type") in _LANGUAGE_MODELS and bool(config.get("mm_vision_tower_aux"))


def plan(checkpoint: OriginalCheckpoint, encoders: EncoderSources) -> Plan:
    """Read configuration and shapes."""
    config = checkpoint.config()
    _check_supported(config)
    model_type = _LANGUAGE_MODELS[config["model_type"]]
    text_config = plan_text_config(checkpoint, model_type)
    canvas, image_grid = int(config["image_size_aux"]), int(config.get("image_grid") or 1)
    clip, clip_rules = _plan_clip(checkpoint, encoders)
    convnext, convnext_rules = _plan_convnext(checkpoint, encoders, canvas)
    grid = clip.image_size // int(clip.architecture.get("patch_size", published_size(clip.row, "patch_size")))
    if (canvas // 4) % (grid * image_grid):
        raise CheckpointError(
            f"config.json has image_size_aux {canvas}, whose map is {canvas // 4} cells a side",
            f"a multiple of {grid * image_grid} cells, for {image_grid} x {image_grid} times {grid} x {grid} tokens",
            "Check that the towers belong to the checkpoint.",
        )
    projector, projector_table = plan_projector(str(config.get("mm_projector_type") or "linear"))
    template = _template(checkpoint, model_type)
    _compare_beginnings(checkpoint, template, model_type=model_type)
    layout = None
    if image_grid > 1:
        layout = TokenLayout(tiling="grid", image_grid=image_grid, whole=(_CONVNEXT,), tile_size=canvas)
    fit = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
    marks = bool(config.get("mm_use_im_start_end"))
    patch = ("<im_patch>",) if config.get("mm_use_im_patch_token", True) else ()
    return Plan(
        text_config=text_config,
        encoders=(clip, convnext),
        fusion=FusionSpec(strategy="patch-info-mining", grid=grid, options={"image_grid": image_grid}),
        projector=projector,
        keys=join_tables(
            _mixtral_table(text_config) if model_type == "mixtral" else KeyTable(takes=()),
            language_table(tied=bool(text_config.get("tie_word_embeddings", model_type == "gemma"))),
            clip_rules,
            convnext_rules,
            scale_last(projector_table, image_factor(text_config)),
            _MINING,
        ),
        template=template,
        layout=layout,
        shared_pixels=SharedPixelsConfig(image_size=canvas, align_corners=False, antialias=False),
        shared_transform=replace(clip.transform, size=canvas, fit="pad" if fit == "pad" else "crop"),
        processor_layout=None if layout is None else replace(layout, whole=(SHARED,)),
        image_marks=_MARKS if marks else ("", ""),
        new_tokens=(*patch, *(_MARKS if marks else ())),
        max_length=int(config.get("tokenizer_model_max_length") or DEFAULT_MAX_LENGTH),
    )


_MINING = KeyTable(
    takes=(
        Take(r"fusion\.query\.([01])\.(weight|bias)", (r"model.vlm_uni_query_projector.\1.\2",)),
        Take(r"fusion\.key\.([01])\.(weight|bias)", (r"model.vlm_uni_aux_projector.\1.\2",)),
        Take(r"fusion\.value\.([01])\.(weight|bias)", (r"model.vlm_uni_val_projector.\1.\2",)),
    )
)


def _plan_clip(checkpoint: OriginalCheckpoint, encoders: EncoderSources) -> tuple[EncoderPlan, KeyTable]:
    config, stored = checkpoint.config(), checkpoint.shapes()
    published = str(config["mm_vision_tower"])
    inside = checkpoint.has(_CLIP_TOWER)
    row = clip_row(published, stored, _CLIP_TOWER if inside else None)
    found = encoders.find(_CLIP, published=published, row=row, alone=False, inside=inside)
    layer = int(config.get("mm_vision_select_layer", -2))
    if not inside:
        return plan_outside_clip(found, row=row, fit="pad", select_layer=layer), KeyTable(takes=())
    entry = plan_clip(found, row=row, fit="pad", select_layer=layer, stored=stored, prefix=_CLIP_TOWER)
    return entry, clip_table(_CLIP, prefix=_CLIP_TOWER, plan=entry)


def _plan_convnext(
    checkpoint: OriginalCheckpoint, encoders: EncoderSources, canvas: int
) -> tuple[EncoderPlan, KeyTable]:
    published = str(checkpoint.config()["mm_vision_tower_aux"])
    inside = checkpoint.has(_AUX_TOWER)
    # The names of ConvNeXt's sizes differ in how deep and wide they are, which the tensors tell, and in epsilon.
    row = "convnext-xxl-1024-stages" if "xxlarge" in published else "convnext-l-768-stages"
    found = encoders.find(_CONVNEXT, published=published, row=row, alone=False, inside=inside)
    shapes = None
    if inside:
        shapes = convnext_shapes(
            {key: shape for key, shape in checkpoint.shapes().items() if key.startswith(_AUX_TOWER)}
        )
    entry = plan_convnext(found, row=row, image_size=canvas, fit="pad", stored=shapes)
    return entry, convnext_table(_CONVNEXT, stem=_STEM, stages=_STAGES) if inside else KeyTable(takes=())


def _mixtral_table(text_config: Mapping[str, Any]) -> KeyTable:
    """Published Mixtral keeps each expert apart; transformers since 5.0 stacks them."""
    experts = range(int(text_config["num_local_experts"]))
    layer = r"language_model\.model\.layers\.(\d+)\.mlp\."
    stored = r"model.layers.\1.block_sparse_moe."

    def stacked_gates(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.cat(list(parts[place : place + 2])) for place in range(0, len(parts), 2)])

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts))

    gates = tuple(f"{stored}experts.{expert}.{name}.weight" for expert in experts for name in ("w1", "w3"))
    downs = tuple(f"{stored}experts.{expert}.w2.weight" for expert in experts)
    return KeyTable(
        takes=(
            Take(layer + r"gate\.weight", (stored + "gate.weight",)),
            Take(layer + r"experts\.gate_up_proj", gates, stacked_gates),
            Take(layer + r"experts\.down_proj", downs, stacked),
        )
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    image_grid = int(config.get("image_grid") or 1)
    refused = {
        "mm_vision_tower": not config.get("mm_vision_tower"),
        "image_size_aux": not config.get("image_size_aux"),
        "mm_vision_select_feature": (config.get("mm_vision_select_feature") or "patch") != "patch",
        "image_aspect_ratio": config.get("image_aspect_ratio") not in (None, "square", "pad"),
        "image_global": (image_grid > 1) != bool(config.get("image_global")),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"config.json has {field} {config.get(field)!r}",
                "two towers, image_size_aux, patches without the class token, the aspect ratio square or pad, and "
                "image_global just where image_grid is 2 or more",
                "This checkpoint cannot be converted.",
            )


def _template(checkpoint: OriginalCheckpoint, model_type: str) -> str:
    if model_type == "gemma":
        return "mini_gemini_gemma"
    if model_type == "mixtral":
        return "mini_gemini_mistral"
    tokens = added_tokens(checkpoint)
    if "<|start_header_id|>" in tokens:
        return "mini_gemini_llama_3"
    return "chatml_direct" if "<|im_start|>" in tokens else "vicuna_v1"


def _compare_beginnings(checkpoint: OriginalCheckpoint, template: str, *, model_type: str) -> None:
    # The published text holds no beginning of sequence, and leaves it to the tokenizer; ours holds one.
    if template != "mini_gemini_llama_3":
        return
    tokenizer = load_published_tokenizer(checkpoint.tokenizer_path, model_type=model_type)
    if tokenizer("").input_ids:
        return
    checkpoint.notes.append(
        "its tokenizer puts no beginning of sequence in front of a text, so that the published code gives the model "
        "none; here there is one"
    )


SYSTEM = System(
    name="mini-gemini",
    recognises=recognises,
    plan=plan,
    describes="model_type mgm and others of mgm, and mm_vision_tower_aux",
)
