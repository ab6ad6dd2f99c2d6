"""Tokens of a coarse encoder look up detail in a fine encoder, each in its own window.

Source: Mini-Gemini, arXiv:2403.18814, section 3.2, and its published weights (``vlm_uni_*_projector``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from manyeyes.errors import ShapeError
from manyeyes.fusion.cross_attention import attend_windows, resample_map, split_windows
from manyeyes.fusion.fusion import Fusion, FusionOptions, FusionRow, check_features, join_maps, resample_to_grid


class MiningOptions(FusionOptions):
    """Options of patch-info mining."""

    image_grid: int = Field(
        default=1,
        ge=1,
        description="2 and more: the first encoder sees the image as a whole, then as N times N tiles; the "
        "others see it once, at full size, and each tile mines its own part of their map (Mini-Gemini HD).",
    )


class PatchInfoMining(Fusion):
    """The first encoder asks, the others answer.

    With x a token of the first encoder and a_1..a_K the K cells of the others' map that lie on it::

        out = x + sum_k softmax_k(q . k_k / sqrt(C)) v_k
        q = W_q LN(x) + b_q,   k_k = W_k LN_k(a_k) + b_k,   v_k = W_v LN_v(a_k) + b_v

    One head of the full width, no output projection, no positions, padding not masked. The paper's projector is an mlp
    behind it. The others' map has their channels joined at the size of the second encoder's map; where that is no whole
    multiple of the token grid it is first resampled (bilinear) to the nearest one.

    Source:
        Mini-Gemini, arXiv:2403.18814.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        grid: int,
        *,
        encoder_grids: Sequence[int] | None = None,  # noqa: ARG002 - windows follow from the maps
        options: MiningOptions | None = None,
    ) -> None:
        width, detail = encoder_channels[0], sum(encoder_channels[1:])
        super().__init__(channels=width, num_tokens=grid * grid)
        self.encoder_channels = tuple(encoder_channels)
        self.grid = grid
        self.image_grid = (options or MiningOptions()).image_grid
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key = nn.Sequential(nn.LayerNorm(detail), nn.Linear(detail, width))
        self.value = nn.Sequential(nn.LayerNorm(detail), nn.Linear(detail, width))

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``[B, C_k, h_k, w_k]`` per encoder to ``[B, grid * grid, C_0]``."""
        check_features(features, self.encoder_channels)
        tokens = resample_to_grid(features[0], self.grid).flatten(2).transpose(1, 2)
        detail = join_maps(features[1:])
        if self.image_grid > 1:
            detail = split_whole_image(detail, self.image_grid, num_tiles=tokens.shape[0])
        windows = split_windows(align_to_grid(detail, self.grid), self.grid)
        return tokens + attend_windows(self.query(tokens), self.key(windows), self.value(windows))


def align_to_grid(feature: Tensor, grid: int) -> Tensor:
    """``[B, C, h, w]`` to a square map whose side is the whole multiple of ``grid`` nearest to h."""
    return resample_map(feature, max(1, round(feature.shape[-2] / grid)) * grid)


def split_whole_image(feature: Tensor, image_grid: int, *, num_tiles: int) -> Tensor:
    """One map of a whole image to one map for the image as a whole and one for each of its tiles.

    Args:
        feature: ``[I, C, h, w]``.
        image_grid: Tiles a side, G.
        num_tiles: I * (1 + G * G), what the tiled encoder gave.

    Returns:
        ``[I * (1 + G * G), C, h / G, w / G]``: of each image first the whole (bilinear, corners not aligned), then the
        tiles in rows from the top left.

    Raises:
        ShapeError: Another number of tiles, or a map that cannot be cut so.
    """
    images, _, height, width = feature.shape
    expected = images * (1 + image_grid * image_grid)
    if num_tiles != expected or height != width or height % image_grid:
        raise ShapeError(
            f"{num_tiles} tiles and {images} maps of {height} x {width} cells for whole images",
            f"{expected} tiles, and maps that cut into {image_grid} x {image_grid} parts, are needed",
            "Tile the first encoder's images only, with model.layout.tiling grid.",
        )
    side = height // image_grid
    whole = resample_map(feature, side)
    # [I, C, G, s, G, s] -> [I, G * G, C, s, s]
    tiles = feature.unflatten(3, (image_grid, side)).unflatten(2, (image_grid, side)).permute(0, 2, 4, 1, 3, 5)
    return torch.cat([whole[:, None], tiles.flatten(1, 2)], dim=1).flatten(0, 1)


ROW = FusionRow(
    build=PatchInfoMining,
    description="the first encoder's tokens take detail from the others, each in its own window",
    source="Mini-Gemini, arXiv:2403.18814",
    options=MiningOptions,
    min_encoders=2,
)
