"""Cambrian-1: several frozen encoders, the spatial vision aggregator, and looks back from inside the model.

Code: github.com/cambrian-mllm/cambrian (Apache-2.0). Paper: arXiv:2406.16860.

Encoders are not in a released checkpoint: they were frozen; trained ones are. ``mm_vision_tower_aux_list`` names them;
``-resNNN`` in a name is the size it runs at, ``-interpNNN`` its number of tokens, which
``mm_vision_tower_aux_token_len_list`` says as well. Released code looks back at a fixed place in the sequence
(``image_position``); here the image's own place counts, and the two are compared when a checkpoint is converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from manyeyes.converters.clip import clip_table, plan_clip
from manyeyes.converters.encoder_layouts import (
    convnext_shapes,
    convnext_table,
    dinov2_table,
    plan_convnext,
    plan_dinov2,
    plan_outside_clip,
    plan_siglip,
    siglip_table,
)
from manyeyes.converters.llava import DEFAULT_MAX_LENGTH, plan_projector
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import (
    IMAGE_SIZE,
    INPUT_SIZE,
    EncoderPlan,
    EncoderSources,
    FoundEncoder,
    Plan,
    System,
    stated,
)
from manyeyes.converters.tables import (
    KeyTable,
    Leave,
    Shape,
    Take,
    added_tokens,
    image_factor,
    join_tables,
    language_table,
    plan_text_config,
    scale_last,
)
from manyeyes.errors import CheckpointError
from manyeyes.recipe import FusionSpec, ReinjectionSpec
from manyeyes.runtime.chat import encode_conversation, get_chat_template
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.tokenizer_files import load_published_tokenizer

_LANGUAGE_MODELS = {
    "cambrian_llama": "llama",
    # What the first uploads said.
    "llava_llama": "llama",
    "cambrian_mistral": "mistral",
    "cambrian_gemma": "gemma",
    "cambrian_phi3": "phi3",
    "cambrian_cohere": "cohere",
}
# Where config.json need not say that the head shares the embedding table.
_TIED = ("gemma", "cohere")
# Which loader the published code takes, by what is in a name and in its order; and the row, at any size.
_ENCODERS = (
    (r"openai/clip-vit-large-patch14$", "clip", "clip-l14-224"),
    (r"openai/clip", "clip", "clip-l14-336"),
    (r"siglip", "siglip", "siglip-so400m14-384"),
    (r"clip-convnext-xxl.*multi-stage", "convnext", "convnext-xxl-1024-stages"),
    (r"clip-convnext-xxl", "convnext", "convnext-xxl-1024"),
    (r"clip-convnext.*multi-stage", "convnext", "convnext-l-1536-stages"),
    (r"clip-convnext", "convnext", "convnext-l-1024"),
    (r"dinov2-giant", "dinov2", "dinov2-g14-518"),
    (r"dinov2", "dinov2", "dinov2-l14-518"),
)
_CONVNEXT_SIZE = 1024
# SigLIP's processor carries CLIP's statistics where it pads (the wrapper's default), its own where it normalises.
_CLIP_FILL = (122, 116, 104)
# Fixed in the published code.
_NUM_HEADS = 16
# Without these the published code stops, too.
_FIELDS = ("mm_vision_tower_aux_token_len_list", "image_token_len")
_SVA_FIELDS = ("query_num_list", "vision_hidden_size", "connector_depth")
_LOOKS_BACK_FIELDS = (
    "start_of_vision_sampler_layers",
    "stride_of_vision_sampler_layers",
    "num_of_vision_sampler_layers",
)
# The key of a block's parameter here, and there.
_BLOCK = (
    (r"context_projection\.weight", "proj_context.weight"),
    (r"input_projection\.weight", "proj_in.weight"),
    (r"mlp\.0\.weight", "proj_out.linear_1.weight"),
    (r"mlp\.2\.weight", "proj_out.linear_2.weight"),
    (r"norm\.(weight|bias)", r"norm.\g<last>"),
    (r"query\.([01])\.(weight|bias)", r"cross_attn.q_proj.\g<n>.\g<last>"),
    (r"keys\.(\d+)\.([01])\.(weight|bias)", r"cross_attn.k_proj_\g<i>.\g<n>.\g<last>"),
    (r"values\.(\d+)\.([01])\.(weight|bias)", r"cross_attn.v_proj_\g<i>.\g<n>.\g<last>"),
    (r"attention_output\.weight", "cross_attn.o_proj.weight"),
    (r"positions\.(\d+)", r"pos_embed_\g<i>"),
)


def recognises(config: Mapping[str, Any]) -> bool:
    """A list of towers under Cambrian-1's name, which the first uploads have under LLaVA's model type."""
    return config.get("model_type") in _LANGUAGE_MODELS and "mm_vision_tower_aux_list" in config


def plan(checkpoint: OriginalCheckpoint, encoders: EncoderSources) -> Plan:
    """Read configuration and shapes."""
    config = checkpoint.config()
    _check_supported(config)
    model_type = _LANGUAGE_MODELS[config["model_type"]]
    text_config = plan_text_config(checkpoint, model_type)
    grid = _side(config["image_token_len"], "image_token_len")
    token_sides = [
        _side(count, "mm_vision_tower_aux_token_len_list") for count in config["mm_vision_tower_aux_token_len_list"]
    ]
    plans, tower_tables = _plan_encoders(checkpoint, token_sides, encoders)
    aggregates = config.get("mm_projector_type") == "sva"
    reinjects = aggregates and not config.get("connector_only", True)
    if aggregates:
        fusion = _plan_aggregator(config, grid=grid, token_sides=token_sides)
        projector, projector_table = plan_projector("mlp2x_gelu")
    else:
        fusion = FusionSpec(grid=grid, options={"align_corners": False, "average": False})
        projector, projector_table = plan_projector(str(config.get("mm_projector_type") or "linear"))
    factor = image_factor(text_config)
    template = _template(checkpoint, model_type)
    _compare_image_position(checkpoint, config, template, model_type=model_type)
    return Plan(
        text_config=text_config,
        encoders=plans,
        fusion=fusion,
        projector=projector,
        keys=join_tables(
            language_table(tied=bool(text_config.get("tie_word_embeddings", model_type in _TIED))),
            scale_last(projector_table, factor),
            _aggregator_table() if aggregates else KeyTable(takes=()),
            *tower_tables,
            scale_last(_NEWLINE, factor),
        ),
        template=template,
        reinjection=_plan_reinjection(config) if reinjects else None,
        layout=TokenLayout(newline=True, unpad=True, tile_size=plans[0].image_size),
        max_length=int(config.get("tokenizer_model_max_length") or DEFAULT_MAX_LENGTH),
    )


_NEWLINE = KeyTable(
    takes=(Take("newline", ("model.image_newline",)),),
    leaves=(Leave(r"model\.vision_sampler_layers\..*", "connector_only: the language model does not look back"),),
)


def _plan_encoders(
    checkpoint: OriginalCheckpoint, token_sides: Sequence[int], encoders: EncoderSources
) -> tuple[tuple[EncoderPlan, ...], list[KeyTable]]:
    config = checkpoint.config()
    published = [str(name) for name in config["mm_vision_tower_aux_list"]]
    if len(published) != len(token_sides):
        raise CheckpointError(
            f"mm_vision_tower_aux_list names {len(published)} encoders, "
            f"mm_vision_tower_aux_token_len_list has {len(token_sides)} entries",
            "one number of tokens an encoder",
            "Fix config.json.",
        )
    kinds = [_kind(name) for name in published]
    select_layer = int(config.get("mm_vision_select_layer", -2))
    plans, tables = [], []
    for place, (name, (kind, row), side) in enumerate(zip(published, kinds, token_sides, strict=True)):
        prefix = f"model.vision_tower_aux_list.{place}.vision_tower."
        stored = {
            key.removeprefix(prefix): shape for key, shape in checkpoint.shapes().items() if key.startswith(prefix)
        }
        alike = [other for other, _ in kinds].count(kind) > 1
        found = encoders.find(
            f"{kind}-{place}" if alike else kind,
            published=name,
            row=row,
            alone=len(published) == 1,
            inside=bool(stored),
        )
        entry = _plan_encoder(found, kind, row, select_layer=select_layer, side=side, stored=stored or None)
        plans.append(entry)
        if stored:
            tables.append(_tower_table(kind, prefix=prefix, plan=entry))
    return tuple(plans), tables


def _plan_encoder(
    found: FoundEncoder,
    kind: str,
    row: str,
    *,
    select_layer: int,
    side: int,
    stored: Mapping[str, Shape] | None,
) -> EncoderPlan:
    resolution = re.search(r"-res(\d+)", found.published)
    forced = stated(found, INPUT_SIZE) or (int(resolution[1]) if resolution else None)
    if kind == "clip" and stored is None:
        return plan_outside_clip(found, row=row, fit="pad", select_layer=select_layer)
    if kind == "clip":
        return plan_clip(found, row=row, fit="pad", select_layer=select_layer, stored=stored, prefix="vision_model.")
    if kind == "siglip":
        return plan_siglip(found, row=row, fill=_CLIP_FILL, stored=stored)
    if kind == "dinov2":
        return plan_dinov2(found, row=row, image_size=forced, stored=stored)
    size = int(forced or stated(found, IMAGE_SIZE) or _CONVNEXT_SIZE)
    shapes = None if stored is None else convnext_shapes(stored)
    return plan_convnext(found, row=row, image_size=size, fit="pad", grid=side, stored=shapes)


def _tower_table(kind: str, *, prefix: str, plan: EncoderPlan) -> KeyTable:
    if kind == "clip":
        return clip_table(plan.name, prefix=prefix + "vision_model.", plan=plan)
    if kind == "siglip":
        return siglip_table(plan.name, prefix=prefix)
    if kind == "dinov2":
        return dinov2_table(plan.name, prefix=prefix, plan=plan)
    others = (prefix + "head.", prefix + "norm_pre.")
    return convnext_table(plan.name, stem=prefix + "stem.", stages=prefix + "stages.", others=others)


def _kind(published: str) -> tuple[str, str]:
    for pattern, kind, row in _ENCODERS:
        if re.search(pattern, published.lower()):
            return kind, row
    raise CheckpointError(
        f'mm_vision_tower_aux_list names "{published}"',
        "SigLIP SO400M, OpenAI's CLIP, DINOv2 or OpenCLIP's ConvNeXt, as Cambrian-1 names them",
        "This checkpoint cannot be converted.",
    )


def _plan_aggregator(config: Mapping[str, Any], *, grid: int, token_sides: Sequence[int]) -> FusionSpec:
    query_grids = [_side(count, "query_num_list") for count in config["query_num_list"]]
    width = int(config["vision_hidden_size"])
    if width % _NUM_HEADS:
        raise CheckpointError(
            f"config.json has vision_hidden_size {width}",
            f"a multiple of {_NUM_HEADS}, the published number of heads",
            "Fix config.json.",
        )
    odd = [side for side in token_sides if side % grid]
    if odd:
        raise CheckpointError(
            f"mm_vision_tower_aux_token_len_list has {odd[0] ** 2}",
            f"squares of multiples of {grid}, the side of image_token_len",
            "Fix config.json.",
        )
    options = {
        "channels": width,
        "depth": int(config["connector_depth"]),
        "num_heads": _NUM_HEADS,
        "query_grids": query_grids,
        "windows": [side // grid for side in token_sides],
        "mask_padding": True,
    }
    return FusionSpec(strategy="spatial-vision-aggregator", grid=grid, options=options)


def _plan_reinjection(config: Mapping[str, Any]) -> ReinjectionSpec:
    return ReinjectionSpec(
        start=int(config["start_of_vision_sampler_layers"]),
        stride=int(config["stride_of_vision_sampler_layers"]),
        count=int(config["num_of_vision_sampler_layers"]),
    )


def _aggregator_table() -> KeyTable:
    takes = [
        Take(r"fusion\.queries", ("model.vision_query",)),
        Take(r"fusion\.projections\.(\d+)\.([023])\.(weight|bias)", (r"model.mm_projector_aux_\1.\2.\3",)),
    ]
    for ours, there in _BLOCK:
        takes.append(
            _block_rule(r"fusion\.samplers\.(\d+)\.(\d+)\.", r"model.vision_sampler_\1.layers.\2.", ours, there)
        )
        takes.append(
            _block_rule(r"reinjection\.samplers\.(\d+)\.", r"model.vision_sampler_layers.\1.layers.0.", ours, there)
        )
    return KeyTable(takes=tuple(takes))


def _block_rule(prefix: str, stored_prefix: str, ours: str, there: str) -> Take:
    """A rule for one parameter of a block; the groups of ``there`` are counted from behind the prefix's."""
    first = re.compile(prefix).groups
    groups = re.compile(ours).groups
    places = {"last": first + groups, "i": first + 1, "n": first + groups - 1}
    numbered = re.sub(r"\\g<(\w+)>", lambda match: rf"\g<{places[match[1]]}>", there)
    return Take(prefix + ours, (stored_prefix + numbered,))


def _check_supported(config: Mapping[str, Any]) -> None:
    aggregates = config.get("mm_projector_type") == "sva"
    looks_back = aggregates and not config.get("connector_only", True)
    needed = [*_FIELDS, *(_SVA_FIELDS if aggregates else ()), *(_LOOKS_BACK_FIELDS if looks_back else ())]
    missing = [field for field in needed if config.get(field) in (None, [])]
    if missing:
        raise CheckpointError(
            f"config.json has no {', '.join(missing)}",
            "the numbers of tokens of each encoder and of an image, and with mm_projector_type sva the sizes of the "
            "samplers",
            "Take config.json from the same place as the weights.",
        )
    refused = {
        "mm_vision_select_feature": (config.get("mm_vision_select_feature") or "patch") != "patch",
        "image_aspect_ratio": config.get("image_aspect_ratio") not in (None, "pad"),
        "mm_use_im_start_end": bool(config.get("mm_use_im_start_end")),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"config.json has {field} {config[field]!r}",
                "patches without the class token, the aspect ratio pad, and no marks around images",
                "This checkpoint cannot be converted.",
            )


def _side(count: Any, field: str) -> int:
    side = math.isqrt(int(count))
    if side * side != int(count):
        raise CheckpointError(f"config.json has {field} {count}", "the square of a whole number", "Fix it.")
    return side


def _template(checkpoint: OriginalCheckpoint, model_type: str) -> str:
    tokens = added_tokens(checkpoint)
    if model_type == "phi3":
        return "phi_3"
    if "<|start_header_id|>" in tokens:
        return "cambrian_llama_3"
    return "cambrian_chatml" if "<|im_start|>" in tokens else "vicuna_v1"


def _compare_image_position(
    checkpoint: OriginalCheckpoint, config: Mapping[str, Any], template: str, *, model_type: str
) -> None:
    stated_position = config.get("image_position")
    if stated_position is None:
        return
    encoded = encode_conversation(
        load_published_tokenizer(checkpoint.tokenizer_path, model_type=model_type).backend_tokenizer,
        get_chat_template(template),
        [("human", "<image>")],
        image_tokens=[1],
        image_token_id=0,
        generation_prompt=True,
    )
    found = encoded.image_spans[0][0]
    if found != stated_position:
        checkpoint.notes.append(
            f"image_position is {stated_position}, and {template} puts an image at {found}: the published code would "
            "look back from other tokens than the image's"
        )


SYSTEM = System(
    name="cambrian",
    recognises=recognises,
    plan=plan,
    describes="model_type cambrian_llama and others of cambrian, and mm_vision_tower_aux_list",
)
