"""Position embeddings for another image size than they were learned at.

Done once, when weights are loaded: what is saved afterwards has the new size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from manyeyes.errors import SourceError

Method = Literal["antialias", "plain", "offset"]


def resample_positions(positions: Tensor, *, grid: int, num_prefix_tokens: int, method: Method) -> Tensor:
    """Bicubic resampling of a square grid of position embeddings, in fp32.

    Args:
        positions: ``[1, P + n * n, C]``; P prefix tokens come first and stay as they are.
        grid: Side wanted.
        num_prefix_tokens: P.
        method: ``antialias`` as Eagle and timm do, ``plain`` without antialiasing as EVA-02's detector does, ``offset``
            as DINOv2's own code does: the scale is (grid + 0.1) / n, which moves every sample a little.

    Returns:
        ``[1, P + grid * grid, C]``; the input itself when it fits.

    Raises:
        SourceError: The patches do not form a square.
    """
    prefix, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise SourceError(
            f"{patches.shape[1]} position embeddings", "they must form a square", "Use weights of this very network."
        )
    if side == grid:
        return positions
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if method == "offset":
        scale = (grid + 0.1) / side
        square = functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    else:
        square = functional.interpolate(
            square, size=(grid, grid), mode="bicubic", align_corners=False, antialias=method == "antialias"
        )
    resampled = square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(positions.dtype)
    return torch.cat([prefix, resampled], dim=1)
