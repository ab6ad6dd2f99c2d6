"""The cross-attention block of the spatial vision aggregator, and what it looks at.

Used twice: by the fusion of that name (``manyeyes.fusion.spatial_vision_aggregator``) and between the layers of the
language model (``manyeyes.model.reinjection``).

Source: Cambrian-1, arXiv:2406.16860, section 3, and its published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.fusion.cross_attention import attend_windows


@dataclass(frozen=True)
class VisualWindows:
    """What each of M queries may look at.

    Attributes:
        keys: ``[M, sum(m_k^2), C]``: encoder after encoder the cells of its window.
        mask: ``[M, sum(m_k^2)]``, True where a cell shows the image and not padding.
        overall: ``[M, C]``: the mean over the first encoder's whole map.
    """

    keys: Tensor
    mask: Tensor
    overall: Tensor

    def select(self, queries: Tensor) -> VisualWindows:
        """The windows of some queries, ``queries`` being their places ``[S]``."""
        return VisualWindows(keys=self.keys[queries], mask=self.mask[queries], overall=self.overall[queries])


class VisionSampler(nn.Module):
    """One block: a query looks at its windows in every encoder at once.

    With x the query, g the overall context and F_k the window of encoder k::

        h   = W_in [x ; W_ctx g]
        F_k = F_k + P_k                                (only where a window has more than one cell)
        q = W_q LN(h),  K_k = W_k LN_k(F_k),  V_k = W_v LN'_k(F_k)
        h   = LN(h + W_o attention(q, [K_1 ; ...], [V_1 ; ...]))      (one softmax over all encoders, padding masked)
        out = x + W_2 GELU(W_1 h)

    No linear layer has a bias; every projection has its own norm.

    Source:
        Cambrian-1, arXiv:2406.16860, section 3 (equations of the spatial vision aggregator) and its published weights.
    """

    def __init__(self, query_channels: int, *, channels: int, windows: Sequence[int], num_heads: int = 16) -> None:
        """Make a block.

        Args:
            query_channels: Width of a query.
            channels: Width of the context, and inside.
            windows: Per encoder, cells a side of a query's window.
            num_heads: Attention heads.
        """
        super().__init__()
        self.num_heads = num_heads
        self.cells = [side * side for side in windows]
        self.context_projection = nn.Linear(channels, channels, bias=False)
        self.input_projection = nn.Linear(query_channels + channels, channels, bias=False)
        self.query = _normed_linear(channels)
        self.keys = nn.ModuleList(_normed_linear(channels) for _ in windows)
        self.values = nn.ModuleList(_normed_linear(channels) for _ in windows)
        self.positions = nn.ParameterDict(
            {
                str(place): nn.Parameter(torch.randn(cells, channels))
                for place, cells in enumerate(self.cells)
                if cells > 1
            }
        )
        self.attention_output = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels, bias=False), nn.GELU(), nn.Linear(channels, query_channels, bias=False)
        )

    def forward(self, queries: Tensor, windows: VisualWindows) -> Tensor:
        """``[M, query_channels]`` to ``[M, query_channels]``."""
        context = self.context_projection(windows.overall)
        hidden = self.input_projection(torch.cat([queries, context], dim=-1))
        cells = list(windows.keys.split(self.cells, dim=-2))
        for place, table in self.positions.items():
            cells[int(place)] = cells[int(place)] + table
        attended = attend_windows(
            self.query(hidden),
            torch.cat([project(own) for project, own in zip(self.keys, cells, strict=True)], dim=-2),
            torch.cat([project(own) for project, own in zip(self.values, cells, strict=True)], dim=-2),
            num_heads=self.num_heads,
            mask=windows.mask,
        )
        hidden = self.norm(hidden + self.attention_output(attended))
        sampled: Tensor = queries + self.mlp(hidden)
        return sampled


def image_cells(image_sizes: Tensor, grid: int) -> Tensor:
    """Which cells of a square grid show the image, when it was padded to a square.

    As LLaVA-1.6 and Cambrian-1 count it: with the image wider than high, ``int(height * grid / width)`` rows stay, and
    ``(grid - rows) // 2`` are padding at either end; the same with columns otherwise.

    Args:
        image_sizes: ``[B, 2]``, width and height of each image before padding.
        grid: Side of the grid, in cells.

    Returns:
        ``[B, grid, grid]``, True where a cell shows the image.

    Source:
        Cambrian-1, github.com/cambrian-mllm/cambrian, ``unmask_attention_mask``; ``unpad_image``
        keeps the same cells.
    """
    width, height = image_sizes.to(torch.float64).unbind(1)
    # In double precision and in this order, so that the truncation falls as in the published Python code.
    rows = torch.where(width > height, (height * (grid / width)).long(), grid)
    columns = torch.where(width > height, grid, (width * (grid / height)).long())
    cells = torch.arange(grid, device=image_sizes.device)
    kept_rows, kept_columns = (
        (cells >= padding[:, None]) & (cells < grid - padding[:, None])
        for padding in ((grid - rows) // 2, (grid - columns) // 2)
    )
    return kept_rows[:, :, None] & kept_columns[:, None, :]


def resample_map(feature: Tensor, grid: int) -> Tensor:
    """``[B, C, h, w]`` to ``[B, C, grid, grid]``: bilinear, corners not aligned, computed in float32."""
    if feature.shape[-2:] == (grid, grid):
        return feature
    resampled = functional.interpolate(feature.float(), size=(grid, grid), mode="bilinear", align_corners=False)
    return resampled.to(feature.dtype)


def _normed_linear(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels, bias=False))
