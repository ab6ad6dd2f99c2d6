"""The image encoder of Segment Anything, published and as Eagle changes it.

Code: transformers (Apache-2.0). Paper: "Segment Anything", arXiv:2304.02643. Weights: Meta, Apache-2.0.

The published neck (two convolutions, two norms) gives 256 channels on the patch grid. Eagle (arXiv:2408.15998) puts a
neck of its own there: a 1 x 1 convolution without bias to 256 channels and one norm over the channels, freshly drawn.
Its cells are then folded 2 x 2 into the channels (pixel unshuffle). Eagle neither seeds that neck nor saves it with the
projector, so its second stage starts from another one than its first; here it is always drawn from the same seed, and
is saved with the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from manyeyes.encoders.clip import MEAN, STD
from manyeyes.encoders.encoder import BlockEncoder, Encoder, EncoderFamily, EncoderRow, TensorMap, check_image_size
from manyeyes.encoders.vit import resample_positions
from manyeyes.encoders.weights import strip_prefix

_NECK_CHANNELS = 256
_NECK_SEED = 0
# The second convolution and norm of the published neck.
_PUBLISHED_ONLY = 9 * _NECK_CHANNELS**2 + 2 * _NECK_CHANNELS
_FOLD = 2


@dataclass(frozen=True)
class _Architecture:
    """``neck`` is the published one, or Eagle's with its folding, and ``neck_channels`` its width.

    ``hidden`` is the width inside a block's mlp, four times ``width`` when None.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    neck: Literal["published", "eagle"]
    neck_channels: int = _NECK_CHANNELS
    hidden: int | None = None


class EagleNeck(nn.Module):
    """1 x 1 convolution to (as published 256) channels and a norm over them; drawn from its own seed."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, kernel_size=1, bias=False)
        self.layer_norm1 = nn.LayerNorm(channels, eps=1e-6)
        if not self.conv1.weight.is_meta:
            # torch's default for a convolution: uniform within 1 / sqrt(inputs).
            generator = torch.Generator().manual_seed(_NECK_SEED)
            drawn = torch.rand(self.conv1.weight.shape, generator=generator)
            with torch.no_grad():
                self.conv1.weight.copy_((2 * drawn - 1) * width**-0.5)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """``[B, H, W, width]`` to ``[B, channels, H, W]``."""
        narrow = self.conv1(map_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.layer_norm1(narrow).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class SamEncoder(BlockEncoder):
    """SAM's image encoder; the feature map leaves the neck."""

    net: SamVisionEncoder

    def __init__(self, net: SamVisionEncoder, plan: _Architecture, image_size: int) -> None:
        self_fold = _FOLD if plan.neck == "eagle" else 1
        super().__init__(
            net,
            channels=plan.neck_channels * self_fold**2,
            stride=plan.patch_size * self_fold,
            image_size=image_size,
            width=plan.width,
        )
        self.fold = self_fold
        self.patch_grid = image_size // plan.patch_size

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.net.layers)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches and learned positions."""
        return (self.net.patch_embed(pixel_values) + self.net.pos_embed).flatten(1, 2)  # type: ignore[no-any-return]

    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        """Run some of the blocks."""
        map_BHWC = tokens_BNC.unflatten(1, (self.patch_grid, self.patch_grid))
        for layer in self.net.layers[start:stop]:
            map_BHWC = self.run_part(layer, map_BHWC)
        return map_BHWC.flatten(1, 2)  # type: ignore[no-any-return]

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """Neck, and folding in Eagle's form."""
        feature: Tensor = self.net.neck(tokens_BNC.unflatten(1, (self.patch_grid, self.patch_grid)))
        return functional.pixel_unshuffle(feature, self.fold) if self.fold > 1 else feature


def _build(architecture: Mapping[str, object], image_size: int) -> SamEncoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    check_image_size(image_size, multiple=plan.patch_size * (_FOLD if plan.neck == "eagle" else 1))
    config = SamVisionConfig(
        hidden_size=plan.width,
        num_hidden_layers=plan.depth,
        num_attention_heads=plan.heads,
        image_size=image_size,
        patch_size=plan.patch_size,
        window_size=plan.window,
        global_attn_indexes=list(plan.global_blocks),
        output_channels=plan.neck_channels,
        mlp_dim=plan.hidden or 4 * plan.width,
        initializer_range=0.02,
    )
    net = SamVisionEncoder(config)
    if plan.neck == "eagle":
        net.neck = EagleNeck(plan.width, plan.neck_channels)
    return SamEncoder(net, plan, image_size)


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From transformers' ``vision_encoder.`` or Eagle's tower; resamples absolute and relative positions.

    Eagle's neck is not in SAM's weights: it then stays as it was drawn.
    """
    wanted = encoder.net.state_dict()
    published = strip_prefix(tensors, marker="patch_embed.projection.weight") or tensors
    state = {
        key: tensor for key, tensor in published.items() if key.startswith(("patch_embed.", "pos_embed", "layers."))
    }
    necks = {key: tensor for key, tensor in published.items() if key.startswith("neck.")}
    if isinstance(encoder.net.neck, EagleNeck) and "neck.conv2.weight" in necks:
        necks = {key: tensor for key, tensor in wanted.items() if key.startswith("neck.")}
    state.update(necks)
    if "pos_embed" in state:
        positions = state["pos_embed"]
        side = wanted["pos_embed"].shape[1]
        flat = resample_positions(positions.flatten(1, 2), grid=side, num_prefix_tokens=0, method="antialias")
        state["pos_embed"] = flat.unflatten(1, (side, side))
    for key in [key for key in state if key.endswith((".rel_pos_h", ".rel_pos_w"))]:
        if key in wanted and wanted[key].shape[0] != state[key].shape[0]:
            line = state[key].float().T[None]
            resampled = functional.interpolate(line, size=wanted[key].shape[0], mode="linear", align_corners=False)
            state[key] = resampled[0].T.contiguous().to(state[key].dtype)
    return state


FAMILY = EncoderFamily(build=_build, convert=_convert)

_LARGE = EncoderRow(
    family="sam",
    channels=256,
    stride=16,
    image_size=1024,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    parameters=308_278_272,
    pretraining="promptable segmentation, SA-1B (from masked image modelling)",
    licence="Apache-2.0",
    source="hub:facebook/sam-vit-large@70009d56dac23ebb3265377257158b1d6ed4c802",
    paper="arXiv:2304.02643",
    architecture={
        "patch_size": 16,
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "window": 14,
        "global_blocks": (5, 11, 17, 23),
        "neck": "published",
    },
    small={"width": 32, "depth": 2, "heads": 2, "window": 3, "global_blocks": (1,)},
    files=("model.safetensors", "pytorch_model.bin"),
    features="published neck; no class token",
    image_sizes=(1024,),
    small_image_size=64,
)
_HUGE = replace(
    _LARGE,
    parameters=637_026_048,
    source="hub:facebook/sam-vit-huge@87aecf0df4ce6b30cd7de76e87673c49644bdf67",
    architecture={
        "patch_size": 16,
        "width": 1280,
        "depth": 32,
        "heads": 16,
        "window": 14,
        "global_blocks": (7, 15, 23, 31),
        "neck": "published",
    },
)


def _with_eagle_neck(row: EncoderRow) -> EncoderRow:
    # Eagle gives every expert CLIP's normalisation.
    return replace(
        row,
        channels=_NECK_CHANNELS * _FOLD**2,
        stride=32,
        parameters=row.parameters - _PUBLISHED_ONLY,
        mean=MEAN,
        std=STD,
        architecture={**row.architecture, "neck": "eagle"},
        features="Eagle's neck, cells folded 2 x 2; no class token",
    )


ROWS: dict[str, EncoderRow] = {
    "sam-l16-1024": _LARGE,
    "sam-h16-1024": _HUGE,
    "sam-l16-1024-eagle": _with_eagle_neck(_LARGE),
    "sam-h16-1024-eagle": _with_eagle_neck(_HUGE),
}
