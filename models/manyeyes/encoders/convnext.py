"""ConvNeXt of OpenCLIP, the high-resolution encoder of Mini-Gemini, Eagle and Cambrian-1.

Code: timm (Apache-2.0), stem and four stages; no head. Paper: "A ConvNet for the 2020s", arXiv:2201.03545. Weights:
LAION-2B by OpenCLIP (arXiv:2212.07143), MIT.

Eagle (arXiv:2408.15998) takes the last stage. Mini-Gemini (arXiv:2403.18814) and Cambrian-1 (arXiv:2406.16860) take
all four: each is resampled (bilinear, corners not aligned) to one grid and the channels are joined in the order of the
stages. That grid is the first stage's in Mini-Gemini, 96 x 96 in Cambrian-1.
Mini-Gemini left stochastic depth on while the encoder was frozen (github.com/dvlab-research/MGM, issue 43); here is
none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from manyeyes.encoders.clip import MEAN, STD
from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap, check_image_size, resample_bilinear
from manyeyes.encoders.weights import strip_prefix

_FIRST_STRIDE, _LAST_STRIDE = 4, 32


@dataclass(frozen=True)
class _Architecture:
    """``stages``: take the last, or all of them, resampled to ``grid`` (None: the first stage's own)."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    epsilon: float
    stages: Literal["last", "all"] = "last"
    grid: int | None = None


class ConvNextEncoder(Encoder):
    """Stem and stages."""

    net: ConvNeXt

    def __init__(self, net: ConvNeXt, plan: _Architecture, image_size: int) -> None:
        every = plan.stages == "all"
        grid = plan.grid or image_size // _FIRST_STRIDE if every else image_size // _LAST_STRIDE
        super().__init__(
            net,
            channels=sum(plan.widths) if every else plan.widths[-1],
            stride=-(-image_size // grid),
            image_size=image_size,
            grid=grid,
        )
        self.every_stage = every

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, channels, grid, grid]``."""
        feature = self.net.stem(pixel_values)
        maps: list[Tensor] = []
        for stage in self.net.stages:
            feature = self.run_part(stage.downsample, feature)
            for block in stage.blocks:
                feature = self.run_part(block, feature)
            maps.append(feature)
        if not self.every_stage:
            return maps[-1]
        return torch.cat([resample_bilinear(stage_map, self.grid) for stage_map in maps], dim=1)


def _build(architecture: Mapping[str, object], image_size: int) -> ConvNextEncoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    check_image_size(image_size, multiple=_LAST_STRIDE)
    net = ConvNeXt(depths=plan.depths, dims=plan.widths, norm_eps=plan.epsilon, num_classes=0)
    net.norm_pre = nn.Identity()
    net.head = nn.Identity()
    return ConvNextEncoder(net, plan, image_size)


# transformers renames gamma to weight on some ways of saving; Eagle's checkpoints carry that name.
_GAMMA = re.compile(r"(stages\.\d+\.blocks\.\d+)\.weight")


def _convert(tensors: TensorMap, _encoder: Encoder) -> TensorMap:
    """From open_clip's layout (``visual.trunk.``), timm's, Eagle's or Mini-Gemini's (``vision_stem``)."""
    names = {key.replace("vision_stem.", "stem.").replace("vision_stages.", "stages."): key for key in tensors}
    state = strip_prefix({name: tensors[key] for name, key in names.items()}, marker="stem.0.weight") or tensors
    state = {_GAMMA.sub(r"\1.gamma", key): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in state.items() if key.startswith(("stem.", "stages."))}


FAMILY = EncoderFamily(build=_build, convert=_convert)

_LARGE = EncoderRow(
    family="convnext",
    channels=1536,
    stride=32,
    image_size=768,
    mean=MEAN,
    std=STD,
    parameters=196_227_264,
    pretraining="contrastive, LAION-2B",
    licence="MIT",
    source="hub:laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup@654d0f80ff73c58e7281a3ca7dc425589049e2e1",
    paper="arXiv:2201.03545",
    architecture={"depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536), "epsilon": 1e-6},
    small={"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32)},
    files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"),
    features="last of 4 stages, no norm",
    image_sizes=(512, 768, 1024, 1536),
    small_image_size=64,
)
_LARGE_STAGES = replace(
    _LARGE,
    channels=2880,
    stride=4,
    architecture={**_LARGE.architecture, "stages": "all"},
    features="all 4 stages at the first one's grid, no norm",
)
_XXL = replace(
    _LARGE,
    channels=3072,
    parameters=843_391_872,
    image_size=1024,
    source="hub:laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup@9f3e8ee3f383c672388d9178afe70af9e63ac9df",
    architecture={"depths": (3, 4, 30, 3), "widths": (384, 768, 1536, 3072), "epsilon": 1e-5},
    image_sizes=(1024,),
)

ROWS: dict[str, EncoderRow] = {
    "convnext-l-512": replace(_LARGE, image_size=512),
    "convnext-l-768": _LARGE,
    "convnext-l-1024": replace(_LARGE, image_size=1024),
    "convnext-l-1536": replace(_LARGE, image_size=1536),
    "convnext-l-768-stages": _LARGE_STAGES,
    "convnext-l-1536-stages": replace(_LARGE_STAGES, image_size=1536),
    "convnext-xxl-1024": _XXL,
    "convnext-xxl-1024-stages": replace(
        _XXL,
        channels=5760,
        stride=11,
        architecture={**_XXL.architecture, "stages": "all", "grid": 96},
        small={**_XXL.small, "grid": 6},
        features="all 4 stages at 96 x 96, no norm",
    ),
}
