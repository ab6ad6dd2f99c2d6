"""A high-resolution encoder's map is mixed into a low-resolution encoder between its blocks.

Source: LLaVA-HR, arXiv:2403.03003, and its published code (github.com/luogen1996/LLaVA-HR).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.errors import ShapeError
from manyeyes.fusion.fusion import (
    BlockwiseEncoder,
    FusionOptions,
    FusionRow,
    InjectingFusion,
    check_features,
    join_maps,
)


class MixtureOptions(FusionOptions):
    """Options of the mixture of resolutions."""

    adapters: bool = Field(
        default=True,
        description="Mix between the blocks too. LLaVA-HR does where the encoders train; false mixes at the end only.",
    )
    num_groups: int = Field(default=4, ge=2, description="Groups of blocks; an adapter follows each but the last.")


class ResolutionAdapter(nn.Module):
    """Adds a slow (high-resolution) map to a fast (low-resolution) one.

    ::

        s    = align(W_2 GELU(W_1 slow))                   1x1 convolutions
        f    = fast + W_4 GELU(W_3 * fast)                 7x7 depthwise, then 1x1
        gate = tanh(MLP(mean over cells of [f ; s]))       one number an image; 2 C -> C / 2 -> 1, GELU between
        out  = f + gate s

    W_2 and W_4 start at zero, so that the fast encoder starts as it was published.

    Source:
        LLaVA-HR, arXiv:2403.03003, section 3.3.
    """

    def __init__(self, fast_channels: int, slow_channels: int) -> None:
        super().__init__()
        self.slow_conv = nn.Conv2d(slow_channels, slow_channels, kernel_size=1)
        self.slow_projection = nn.Conv2d(slow_channels, fast_channels, kernel_size=1)
        self.fast_conv = nn.Conv2d(fast_channels, fast_channels, kernel_size=7, padding=3, groups=fast_channels)
        self.fast_projection = nn.Conv2d(fast_channels, fast_channels, kernel_size=1)
        self.gate = nn.Sequential(
            nn.Linear(2 * fast_channels, fast_channels // 2), nn.GELU(), nn.Linear(fast_channels // 2, 1)
        )
        if self.fast_conv.weight.device.type != "meta":
            for convolution in (self.slow_conv, self.fast_conv):
                nn.init.xavier_uniform_(convolution.weight)
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            for convolution in (self.slow_projection, self.fast_projection):
                nn.init.zeros_(convolution.weight)
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, fast: Tensor, slow: Tensor) -> Tensor:
        """``[B, C_f, h, w]`` and ``[B, C_s, H, W]`` to ``[B, C_f, h, w]``."""
        slow = align_to_fast(self.slow_projection(functional.gelu(self.slow_conv(slow))), fast)
        fast = fast + self.fast_projection(functional.gelu(self.fast_conv(fast)))
        gate = self.gate(torch.cat([fast, slow], dim=1).mean(dim=(2, 3))).tanh()
        mixed: Tensor = fast + gate[:, :, None, None] * slow
        return mixed


class MixtureOfResolutions(InjectingFusion):
    """The first encoder is the fast one; the others, joined at the second's size, are the slow one.

    The fast encoder's blocks run in groups; after each group but the last an adapter mixes the slow map in. In the end
    ``out = W_f fast + b_f + W_s align(slow) + b_s``, as wide as the fast encoder. ``align`` averages whole factors and
    interpolates (bilinear, corners aligned) to a larger grid, which must be a whole multiple too.

    Source:
        LLaVA-HR, arXiv:2403.03003.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        grid: int,
        *,
        encoder_grids: Sequence[int] | None = None,
        options: MixtureOptions | None = None,
    ) -> None:
        options = options or MixtureOptions()
        fast, slow = encoder_channels[0], sum(encoder_channels[1:])
        super().__init__(channels=fast, num_tokens=grid * grid)
        self.encoder_channels = tuple(encoder_channels)
        self.grid = grid
        self.num_groups = options.num_groups
        if encoder_grids is not None:
            _check_grids(encoder_grids[0], encoder_grids[1], grid=grid)
        self.adapters = nn.ModuleList(
            ResolutionAdapter(fast, slow) for _ in range(options.num_groups - 1 if options.adapters else 0)
        )
        self.fast_projection = nn.Linear(fast, fast)
        self.slow_projection = nn.Linear(slow, fast)

    def encode(self, encoders: Sequence[nn.Module], pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the slow encoders, then the fast one with the adapters between its groups of blocks."""
        slow = [encoder(pixels) for encoder, pixels in zip(encoders[1:], pixel_values[1:], strict=True)]
        if len(self.adapters) == 0:
            return [encoders[0](pixel_values[0]), *slow]
        fast = encoders[0]
        if not isinstance(fast, BlockwiseEncoder) or fast.width != self.channels:
            raise ShapeError(
                f"the first encoder is a {type(fast).__name__}",
                "mixture-of-resolutions reaches between the blocks of a vision transformer of one width",
                "Put a vision transformer first, or set model.fusion.options.adapters to false.",
            )
        if fast.num_blocks % self.num_groups:
            raise ShapeError(
                f"the first encoder has {fast.num_blocks} blocks",
                f"they must make {self.num_groups} groups of one size",
                "Set model.fusion.options.num_groups.",
            )
        joined = join_maps(slow)
        size = fast.num_blocks // self.num_groups
        tokens = fast.forward_blocks(fast.embed(pixel_values[0]), start=0, stop=size)
        for place, adapter in enumerate(self.adapters):
            prefix, patches = tokens.tensor_split([fast.num_prefix_tokens], dim=1)
            fast_map = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            tokens = torch.cat([prefix, _tokens(adapter(fast_map, joined))], dim=1)
            tokens = fast.forward_blocks(tokens, start=size * (place + 1), stop=size * (place + 2))
        return [fast.finish(tokens), *slow]

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``[B, C_k, h_k, w_k]`` per encoder to ``[B, grid * grid, C_0]``."""
        check_features(features, self.encoder_channels)
        fast, slow = features[0], join_maps(features[1:])
        _check_grids(fast.shape[-1], slow.shape[-1], grid=self.grid)
        aligned = align_to_fast(slow, fast)
        mixed: Tensor = self.fast_projection(_tokens(fast)) + self.slow_projection(_tokens(aligned))
        return mixed


def align_to_fast(slow: Tensor, fast: Tensor) -> Tensor:
    """``[B, C, H, W]`` to the grid of ``fast``: averaged over whole factors, or interpolated with corners aligned."""
    grid, side = fast.shape[-1], slow.shape[-1]
    if side == grid:
        return slow
    if side > grid:
        return functional.avg_pool2d(slow, kernel_size=side // grid)
    resampled = functional.interpolate(slow.float(), size=(grid, grid), mode="bilinear", align_corners=True)
    return resampled.to(slow.dtype)


def _check_grids(fast: int, slow: int, *, grid: int) -> None:
    if fast != grid:
        raise ShapeError(
            f"model.fusion.grid is {grid} and the first encoder's grid is {fast}",
            "mixture-of-resolutions keeps the first encoder's grid",
            f"Set model.fusion.grid to {fast}.",
        )
    if slow % fast and fast % slow:
        raise ShapeError(
            f"the first encoder's grid is {fast} and the second's {slow}",
            "one must be a whole multiple of the other",
            "Change an image_size.",
        )


def _tokens(feature: Tensor) -> Tensor:
    return feature.flatten(2).transpose(1, 2)


ROW = FusionRow(
    build=MixtureOfResolutions,
    description="adapters mix the other encoders into the first between its blocks",
    source="LLaVA-HR, arXiv:2403.03003",
    options=MixtureOptions,
    min_encoders=2,
)
