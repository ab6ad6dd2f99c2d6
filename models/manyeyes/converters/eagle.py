"""Eagle X4, X5 and other lists of its vision experts.

Code: github.com/NVlabs/EAGLE (Apache-2.0). Paper: arXiv:2408.15998.

``mm_vision_tower`` lists the experts, ``;`` between them; expert i has the keys ``model.vision_tower.vision_towers.i``,
and its channels come i-th. What an expert is, its tensors say. The released code makes one tensor of 1,024 pixels with
CLIP's statistics, resizes it for each expert with aligned corners, and brings every map to 32 x 32 cells alike; its
"clip-448" runs at 336. Reduced checkpoints: the tensor is as large as ConvNeXt's configuration says, and the grid is
1/32 of that, where ConvNeXt's map needs no resizing, unless an expert's ``grid_size`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from manyeyes.converters.clip import clip_table, plan_clip
from manyeyes.converters.convnext import convnext_shapes, convnext_table, plan_convnext
from manyeyes.converters.eagle_encoders import (
    EVA02,
    PIX2STRUCT,
    SAM,
    eva02_table,
    own_image_size,
    plain_table,
    plan_eva02,
    plan_pix2struct,
    plan_sam,
)
from manyeyes.converters.encoder_facts import IMAGE_SIZE, INPUT_SIZE, pixels_of, published_size, stated
from manyeyes.converters.encoder_sources import EncoderSources, FoundEncoder
from manyeyes.converters.language import added_tokens, language_table, plan_text_config
from manyeyes.converters.llava import DEFAULT_MAX_LENGTH, plan_projector
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import EncoderPlan, Plan, System
from manyeyes.converters.tables import KeyTable, Leave, Shape, Take, join_tables
from manyeyes.encoders.positions import resample_positions
from manyeyes.errors import CheckpointError
from manyeyes.recipe import FusionSpec, SharedSpec

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
        fusion=FusionSpec(
            grid=_grid(config, experts, canvas), options={"align_corners": True, "average": False}
        ).model_dump(),
        projector=projector,
        keys=join_tables(
            language_table(tied=bool(text_config.get("tie_word_embeddings"))), *tables, projector_table, _NEWLINE
        ),
        template=_template(checkpoint),
        shared_pixels={"image_size": canvas, **SharedSpec().model_dump(include={"align_corners", "antialias"})},
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
            f'encoder "{found.name}" has image_size {size}', f"a multiple of {_LAST_STRIDE}", "Mend --encoder-config."
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
