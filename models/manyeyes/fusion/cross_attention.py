"""Cross-attention over windows: every query has its own small set of keys.

The one primitive behind patch-info mining (one encoder, one head, all keys seen), the spatial vision aggregator
(several encoders' windows side by side, many heads, padded keys masked) and its re-injection inside the language model.

Shapes: ``...`` any leading dimensions, for instance images and queries; K keys of one query; C width; H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
