"""EfficientNet-Lite, as timm builds it, cut where the feature map has stride 16.

Code: timm (Apache-2.0). Paper: "EfficientNet", arXiv:1905.11946; the lite variants drop squeeze-and-excitation and use
ReLU6 (github.com/tensorflow/tpu, models/official/efficientnet/lite). Published weights come from TensorFlow: padding is
TensorFlow's "SAME" (asymmetric), the epsilon of batch normalisation 0.001, and pixels are (x - 127) / 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from manyeyes.encoders.encoder import Encoder, EncoderFamily, TensorMap
from manyeyes.errors import SourceError

_STRIDE = 16


@dataclass(frozen=True)
class _Architecture:
    stages: tuple[str, ...]
    stem: int
    channels: int


class EfficientNetEncoder(Encoder):
    """Stem and stages up to stride 16."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, channels, grid, grid]``."""
        # Channels last: depthwise convolutions run 2.6 times as fast on a CPU. Only the pixels are laid out so; weights
        # that change their layout would change the last bits of the output after saving and loading.
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        feature = self.net.bn1(self.net.conv_stem(pixels))  # type: ignore[operator]
        for stage in self.net.blocks:  # type: ignore[union-attr]
            feature = self.run_part(stage, feature)
        return feature  # type: ignore[no-any-return]


def _build(architecture: Mapping[str, object], image_size: int) -> EfficientNetEncoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    net = EfficientNet(
        block_args=decode_arch_def([[stage] for stage in plan.stages]),
        num_classes=0,
        num_features=0,
        stem_size=plan.stem,
        fix_stem=True,
        pad_type="same",
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
    )
    return EfficientNetEncoder(net, channels=plan.channels, stride=_STRIDE, image_size=image_size)


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """Rename by place: publishers name the parts differently but write them in one order.

    Stages after stride 16 and the classifier come last and are left out.
    """
    wanted = encoder.net.state_dict()
    if set(wanted) <= set(tensors):
        return {key: tensors[key] for key in wanted}
    pairs = list(zip(wanted.items(), tensors.items(), strict=False))
    for (key, parameter), (published, tensor) in pairs:
        same_kind = key.rpartition(".")[2] == published.rpartition(".")[2]
        if not same_kind or parameter.shape != tensor.shape:
            raise SourceError(
                f'published tensor "{published}" is {list(tensor.shape)}',
                f'"{key}", {list(parameter.shape)}, stands at this place',
                "Use weights of this very network.",
            )
    if len(pairs) < len(wanted):
        raise SourceError(
            f"{len(tensors)} published tensors",
            f"at least {len(wanted)} are needed",
            "Use weights of this very network.",
        )
    return {key: tensor for (key, _), (_, tensor) in pairs}


FAMILY = EncoderFamily(build=_build, convert=_convert)
