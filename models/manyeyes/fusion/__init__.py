"""The fusions: one row each, one file a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.fusion import (
    concatenation,
    deformable_mining,
    mixture_of_resolutions,
    patch_info_mining,
    spatial_vision_aggregator,
)
from manyeyes.fusion.fusion import BlockwiseEncoder, Fusion, FusionRow, InjectingFusion
from manyeyes.fusion.spatial_vision_aggregator import SpatialVisionAggregator

__all__ = [
    "FUSIONS",
    "BlockwiseEncoder",
    "Fusion",
    "FusionRow",
    "InjectingFusion",
    "SpatialVisionAggregator",
    "build_fusion",
    "fusion_row",
    "run_encoders",
]

FUSIONS: dict[str, FusionRow] = {
    "channel-concat": concatenation.CONCAT,
    "sequence-append": concatenation.APPEND,
    "mixture-of-resolutions": mixture_of_resolutions.ROW,
    "patch-info-mining": patch_info_mining.ROW,
    "deformable-mining": deformable_mining.ROW,
    "spatial-vision-aggregator": spatial_vision_aggregator.ROW,
}


def fusion_row(strategy: str) -> FusionRow:
    """A row of FUSIONS.

    Raises:
        RecipeError: No such fusion; names the nearest.
    """
    if strategy not in FUSIONS:
        raise RecipeError(
            f'model.fusion.strategy is "{strategy}"',
            "no such fusion",
            f"{did_you_mean(strategy, FUSIONS)}List them with: manyeyes fusions",
        )
    return FUSIONS[strategy]


def build_fusion(
    strategy: str,
    *,
    encoder_channels: Sequence[int],
    grid: int,
    encoder_grids: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Fusion:
    """Make a fusion.

    Args:
        strategy: Row of FUSIONS.
        encoder_channels: Channels of each encoder, in recipe order.
        grid: Side of the visual token grid.
        encoder_grids: Sides of the encoders' maps, in cells; refuses grids that the fusion cannot align.
        options: The strategy's own, as a recipe has them.

    Raises:
        RecipeError: No such fusion or option (names the nearest), or too few encoders.
        ShapeError: The fusion cannot align these grids.
    """
    row = fusion_row(strategy)
    checked = row.check_options(dict(options or {}))
    if len(encoder_channels) < row.min_encoders:
        raise RecipeError(
            f'model.fusion.strategy is "{strategy}" with {len(encoder_channels)} encoder(s)',
            f"at least {row.min_encoders} are needed",
            "Add an encoder, or use channel-concat.",
        )
    return row.build(encoder_channels, grid, encoder_grids=encoder_grids, options=checked)


def run_encoders(fusion: Fusion, encoders: Sequence[nn.Module], pixel_values: Sequence[Tensor]) -> list[Tensor]:
    """Every encoder's feature map, as this fusion wants it.

    Args:
        fusion: What the maps are for; some reach into an encoder while it runs.
        encoders: In recipe order.
        pixel_values: ``[B, 3, H_k, W_k]`` for each.

    Returns:
        ``[B, C_k, h_k, w_k]`` for each.
    """
    if isinstance(fusion, InjectingFusion):
        return fusion.encode(encoders, pixel_values)
    return [encoder(pixels) for encoder, pixels in zip(encoders, pixel_values, strict=True)]
