"""LLaVA's own layout: v0, v1, 1.5 and 1.6; shards with and without the vision tower, projectors, LoRA adapters.

Code: github.com/haotian-liu/LLaVA (Apache-2.0). Papers: arXiv:2304.08485, arXiv:2310.03744.

Where shards hold a vision tower, LLaVA's loader takes it only with ``unfreeze_mm_vision_tower``; else it loads the one
that ``mm_vision_tower`` names. So does this, and falls back on the shards' where no other is there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from manyeyes.converters.clip import clip_folder_is_here, clip_row, clip_table, escaped, plan_clip
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import EncoderPlan, EncoderSources, Plan, System
from manyeyes.converters.tables import (
    KeyTable,
    Leave,
    Refuse,
    Take,
    added_tokens,
    join_tables,
    language_table,
    plan_text_config,
)
from manyeyes.errors import CheckpointError
from manyeyes.recipe import FusionSpec, ProjectorSpec
from manyeyes.runtime.tiling import TokenLayout

ENCODER = "clip"
DEFAULT_MAX_LENGTH = 2048

# LLaVA's first code wrote "llama"; its later code upgrades such a checkpoint.
_LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mpt": "mpt",
    "llama": "llama",
}
_HOMES = {"mpt": "transformer."}
_EMBEDDINGS = {"mpt": "transformer.wte.weight"}
_MARKS = ("<im_start>", "<im_end>")
_MERGES = (None, "flat", "spatial", "spatial_unpad")
_FITS = {None: "crop", "square": "crop", "pad": "pad", "anyres": "crop"}


def recognises(config: Mapping[str, Any]) -> bool:
    """A LLaVA of one vision tower: no second one (Mini-Gemini), no list of them (Eagle, Cambrian-1)."""
    tower = config.get("mm_vision_tower")
    return (
        config.get("model_type") in _LANGUAGE_MODELS
        and isinstance(tower, str)
        and ";" not in tower
        and not config.get("mm_vision_tower_aux")
        and not config.get("mm_vision_tower_aux_list")
    )


def plan(checkpoint: OriginalCheckpoint, encoders: EncoderSources) -> Plan:
    """Read configuration and shapes."""
    config = checkpoint.config()
    check_supported(config)
    model_type = _LANGUAGE_MODELS[config["model_type"]]
    text_config = plan_text_config(
        checkpoint, model_type, embeddings=_EMBEDDINGS.get(model_type, "model.embed_tokens.weight")
    )
    # Inside the decoder, which MPT calls otherwise.
    home = _HOMES.get(model_type, "model.")
    encoder, tower_table = _plan_tower(checkpoint, encoders, home=home)
    grid = encoder.image_size // int(encoder.architecture.get("patch_size", 14))
    projector, projector_table = plan_projector(
        str(config.get("mm_projector_type") or "linear"), stored=home + "mm_projector"
    )
    layout = _plan_layout(config, image_size=encoder.image_size)
    marks = bool(config.get("mm_use_im_start_end"))
    patch = ("<im_patch>",) if config.get("mm_use_im_patch_token", True) else ()
    newline = KeyTable(takes=(Take("newline", (home + "image_newline",)),))
    if layout is None or not layout.newline:
        newline = KeyTable(
            takes=(), leaves=(Leave(escaped(home) + "image_newline", "no rows to end, by its configuration"),)
        )
    return Plan(
        text_config=text_config,
        encoders=(encoder,),
        fusion=FusionSpec(grid=grid),
        projector=projector,
        keys=join_tables(
            language_table(tied=bool(text_config.get("tie_word_embeddings"))),
            tower_table,
            projector_table,
            newline,
            _RESAMPLER,
        ),
        template=_template(checkpoint, model_type, marks=marks),
        layout=layout,
        image_marks=_MARKS if marks else ("", ""),
        new_tokens=(*patch, *(_MARKS if marks else ())),
        max_length=int(config.get("tokenizer_model_max_length") or DEFAULT_MAX_LENGTH),
    )


def check_supported(config: Mapping[str, Any]) -> None:
    """Refuse what LLaVA's layout can say and our model cannot do.

    Raises:
        CheckpointError: Names the field.
    """
    refused = {
        "mm_vision_select_feature": (config.get("mm_vision_select_feature") or "patch") != "patch",
        "mm_resampler_type": bool(config.get("mm_resampler_type")),
        "s2": bool(config.get("s2")),
        "mm_patch_merge_type": config.get("mm_patch_merge_type") not in _MERGES,
        "image_aspect_ratio": config.get("image_aspect_ratio") not in _FITS,
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"config.json has {field} {config[field]!r}",
                "patches without the class token, no resampler, no s2, the aspect ratio square, pad or anyres, "
                "and patches merged flat, spatial or spatial_unpad",
                "This checkpoint cannot be converted.",
            )


def plan_projector(kind: str, *, stored: str = "model.mm_projector") -> tuple[ProjectorSpec, KeyTable]:
    """LLaVA's projectors: ``linear``, ``mlp2x_gelu`` (or another number of layers) and ``identity``.

    Args:
        kind: ``mm_projector_type``.
        stored: What its keys start with.

    Returns:
        Our ``projector`` and its rules.

    Raises:
        CheckpointError: Another kind.
    """
    if kind == "identity":
        return ProjectorSpec(kind="identity"), KeyTable(takes=())
    if kind == "linear":
        rule = Take(r"projector\.layers\.linear_1\.(weight|bias)", (stored + r".\1",))
        return ProjectorSpec(kind="linear"), KeyTable(takes=(rule,))
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None or int(match[1]) < 1:
        raise CheckpointError(
            f'config.json has mm_projector_type "{kind}"', "linear, mlp<N>x_gelu or identity", "It cannot be converted."
        )
    depth = int(match[1])
    rules = tuple(
        Take(rf"projector\.layers\.linear_{layer + 1}\.(weight|bias)", (rf"{stored}.{2 * layer}.\1",))
        for layer in range(depth)
    )
    return ProjectorSpec(kind="mlp", depth=depth), KeyTable(takes=rules)


_RESAMPLER = KeyTable(
    takes=(),
    refusals=(
        Refuse(r"\w+\.vision_resampler\..*", "a resampler between tower and projector", "It cannot be converted."),
    ),
)


def _plan_tower(checkpoint: OriginalCheckpoint, encoders: EncoderSources, *, home: str) -> tuple[EncoderPlan, KeyTable]:
    config, stored = checkpoint.config(), checkpoint.shapes()
    published = str(config["mm_vision_tower"])
    marker = "embeddings.class_embedding"
    tower = home + "vision_tower."
    prefix = next((key.removesuffix(marker) for key in stored if key.startswith(tower) and key.endswith(marker)), None)
    row = clip_row(published, stored, prefix)
    found = encoders.find(ENCODER, published=published, row=row)
    unfrozen = bool(config.get("unfreeze_mm_vision_tower"))
    inside = prefix is not None and (unfrozen or not clip_folder_is_here(found.path))
    fit = _FITS[config.get("image_aspect_ratio")]
    encoder = plan_clip(
        found,
        row=row,
        fit="pad" if fit == "pad" else "crop",
        select_layer=int(config.get("mm_vision_select_layer", -2)),
        stored=stored if inside else None,
        prefix=prefix or "",
    )
    if inside and prefix is not None:
        return encoder, clip_table(ENCODER, prefix=prefix, plan=encoder)
    why = f"unfreeze_mm_vision_tower is not set, so LLaVA loads the tower from {published}"
    return encoder, KeyTable(takes=(), leaves=(Leave(escaped(tower) + ".*", why),))


def _plan_layout(config: Mapping[str, Any], *, image_size: int) -> TokenLayout | None:
    if config.get("image_aspect_ratio") != "anyres":
        # An image of one tile has no newline, whatever the merge: process_images makes one tensor of such images, and
        # LLaVA's code merges lists alone.
        return None
    merge = str(config.get("mm_patch_merge_type") or "flat")
    unpads = "unpad" in merge
    if not merge.startswith("spatial"):
        raise CheckpointError(
            f'config.json has image_aspect_ratio "anyres" and mm_patch_merge_type "{merge}"',
            "spatial or spatial_unpad with anyres",
            "This checkpoint cannot be converted.",
        )
    pinpoints = _read_pinpoints(config.get("image_grid_pinpoints"))
    if not pinpoints or any(side < 1 or side % image_size for pair in pinpoints for side in pair):
        raise CheckpointError(
            f"config.json has image_grid_pinpoints {config.get('image_grid_pinpoints')!r}",
            f"a list of [width, height], each a multiple of the tower's {image_size} pixels",
            "Check that the tower belongs to the checkpoint.",
        )
    return TokenLayout(
        tiling="anyres",
        pinpoints=tuple((width // image_size, height // image_size) for width, height in pinpoints),
        newline=unpads,
        unpad=unpads,
        tile_size=image_size,
    )


def _read_pinpoints(value: Any) -> list[tuple[int, int]]:
    """Pairs of a list, or of its text, as LLaVA's training script stores what it got; empty for anything else."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return []
    if not isinstance(value, list | tuple):
        return []
    pairs = [tuple(pair) for pair in value if isinstance(pair, list | tuple) and len(pair) == 2]
    whole = len(pairs) == len(value) and all(isinstance(side, int) for pair in pairs for side in pair)
    return [(width, height) for width, height in pairs] if whole else []


def _template(checkpoint: OriginalCheckpoint, model_type: str, *, marks: bool) -> str:
    # LLaVA's own programs choose by the name of the folder; what a checkpoint says of itself is this.
    if model_type == "mpt":
        return "mpt"
    if marks:
        return "llava_v0"
    tokens = added_tokens(checkpoint)
    if "<|im_start|>" in tokens:
        return "chatml_direct"
    if "<|start_header_id|>" in tokens:
        return "llama_3"
    return "mistral" if model_type == "mistral" else "vicuna_v1"


SYSTEM = System(
    name="llava",
    recognises=recognises,
    plan=plan,
    describes="model_type llava, llava_llama, llava_mistral, llava_mpt or llama, and one mm_vision_tower",
)
