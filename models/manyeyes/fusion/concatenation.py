"""Put every encoder's feature map beside the others': channels joined, or tokens one after the other.

Source: Eagle, arXiv:2408.15998, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manyeyes.fusion.fusion import Fusion, FusionRow, ResampleOptions, check_features, resample_to_grid


class ChannelConcat(Fusion):
    """Resample every encoder to one square grid, then join their channels.

    The number of tokens does not depend on how many encoders there are. There is nothing to train.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        grid: int,
        *,
        encoder_grids: Sequence[int] | None = None,  # noqa: ARG002 - every fusion is built alike
        options: ResampleOptions | None = None,
    ) -> None:
        super().__init__(channels=sum(encoder_channels), num_tokens=grid * grid)
        self.encoder_channels = tuple(encoder_channels)
        self.grid = grid
        self.options = options or ResampleOptions()

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``[B, C_k, h_k, w_k]`` per encoder to ``[B, grid * grid, sum(C_k)]``."""
        check_features(features, self.encoder_channels)
        resample = self.options.model_dump()
        maps = [resample_to_grid(feature, self.grid, **resample) for feature in features]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


CONCAT = FusionRow(
    build=ChannelConcat,
    description="joins channels; as many tokens as the grid has cells, however many encoders",
    source="Eagle, arXiv:2408.15998",
    options=ResampleOptions,
)


class SequenceAppend(Fusion):
    """Resample every encoder to one square grid, bring each to one width, and append their tokens.

    The number of tokens grows with the number of encoders.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        grid: int,
        *,
        encoder_grids: Sequence[int] | None = None,  # noqa: ARG002 - every fusion is built alike
        options: ResampleOptions | None = None,
    ) -> None:
        width = max(encoder_channels)
        super().__init__(channels=width, num_tokens=grid * grid * len(encoder_channels))
        self.encoder_channels = tuple(encoder_channels)
        self.grid = grid
        self.options = options or ResampleOptions()
        self.widen = nn.ModuleList(nn.Linear(channels, width) for channels in encoder_channels)

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``[B, C_k, h_k, w_k]`` per encoder to ``[B, encoders * grid * grid, max(C_k)]``."""
        check_features(features, self.encoder_channels)
        resample = self.options.model_dump()
        tokens = [
            widen(resample_to_grid(feature, self.grid, **resample).flatten(2).transpose(1, 2))
            for feature, widen in zip(features, self.widen, strict=True)
        ]
        return torch.cat(tokens, dim=1)


APPEND = FusionRow(
    build=SequenceAppend,
    description="appends tokens; as many as the grid has cells, for each encoder",
    source="Eagle, arXiv:2408.15998",
    options=ResampleOptions,
)
