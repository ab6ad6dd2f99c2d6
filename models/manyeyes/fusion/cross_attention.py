"""Cross-attention over windows: every query has its own small set of keys.

The one primitive behind patch-info mining (one encoder, one head, all keys seen), the spatial vision aggregator
(several encoders' windows side by side, many heads, padded keys masked) and its re-injection inside the language model.

Shapes: ``...`` any leading dimensions, for instance images and queries; K keys of one query; C width; H heads.

The block of the spatial vision aggregator is used twice: by the fusion of that name
(``manyeyes.fusion.spatial_vision_aggregator``) and between the layers of the language model
(``manyeyes.model.reinjection``).

Source: Cambrian-1, arXiv:2406.16860, section 3, and its published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.errors import ShapeError


def window_weights(query: Tensor, keys: Tensor, *, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """How much each query takes from each key of its window.

    ``softmax_k(q_h . k_h / sqrt(C / H))`` for each head h.

    Args:
        query: ``[..., C]``.
        keys: ``[..., K, C]``, each query's own.
        num_heads: Heads, each ``C / num_heads`` wide.
        mask: ``[..., K]``, True where a key may be seen. A query that may see none takes from all alike, as a softmax
            over equal scores does; let every query see one at least.

    Returns:
        ``[..., H, K]``; sums to one over K.

    Raises:
        ShapeError: C is no multiple of ``num_heads``.
    """
    query_HE, keys_HKE = _split_heads(query, num_heads), _split_heads(keys, num_heads).transpose(-3, -2)
    # A product of matrices and no einsum: ONNX Runtime 1.31 dies of a division by zero in an Einsum over no queries at
    # all, which is what a decoder sees at each step after the first.
    scores = (keys_HKE @ query_HE.unsqueeze(-1)).squeeze(-1) / math.sqrt(query_HE.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-2), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def attend_windows(
    query: Tensor, keys: Tensor, values: Tensor, *, num_heads: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Attention of each query to the keys of its own window.

    ``o_h = sum_k softmax_k(q_h . k_h / sqrt(C / H)) v_kh``, heads side by side. Keys of several encoders stand one
    after the other along K, so that one softmax chooses among all of them.

    Args:
        query: ``[..., C]``.
        keys: ``[..., K, C]``, each query's own.
        values: ``[..., K, C]``.
        num_heads: Heads, each ``C / num_heads`` wide.
        mask: ``[..., K]``, True where a key may be seen.

    Returns:
        ``[..., C]``.

    Raises:
        ShapeError: C is no multiple of ``num_heads``.

    Source:
        Mini-Gemini, arXiv:2403.18814 (one head, one encoder); Cambrian-1, arXiv:2406.16860 (heads, encoders, mask).
    """
    weights_HK = window_weights(query, keys, num_heads=num_heads, mask=mask)
    values_HKE = _split_heads(values, num_heads).transpose(-3, -2)
    return (weights_HK.unsqueeze(-2) @ values_HKE).squeeze(-2).flatten(-2)


def split_windows(feature: Tensor, grid: int) -> Tensor:
    """Cut a map into the windows of a coarser square grid.

    Args:
        feature: ``[B, C, grid * m, grid * m]``.
        grid: Side of the grid of queries.

    Returns:
        ``[B, grid * grid, m * m, C]``; queries and the cells of a window in rows from the top left.

    Raises:
        ShapeError: The map's sides are no multiple of ``grid``, or differ.
    """
    height, width = feature.shape[-2:]
    if height != width or height % grid:
        raise ShapeError(
            f"a feature map of {height} x {width} cells",
            f"a square with a whole number of cells for each of the {grid} x {grid} queries is needed",
            "Choose another grid, or another image size of the encoder.",
        )
    side = height // grid
    # [B, C, L, m, L, m] -> [B, L, L, m, m, C]
    windows: Tensor = feature.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 3, 5, 1)
    return windows.flatten(3, 4).flatten(1, 2)


def _split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    width = tensor.shape[-1]
    if width % num_heads:
        raise ShapeError(
            f"{num_heads} heads over {width} channels", "a whole number of channels a head is needed", "Change one."
        )
    heads: Tensor = tensor.unflatten(-1, (num_heads, width // num_heads))
    return heads


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
