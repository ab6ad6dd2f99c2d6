"""A grid of queries gathers from all encoders, each query from its own window in every one.

Source: Cambrian-1, arXiv:2406.16860, section 3, and its published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion.cross_attention import VisionSampler, VisualWindows, image_cells, resample_map, split_windows
from manyeyes.fusion.fusion import Fusion, FusionOptions, FusionRow, check_features


class AggregatorOptions(FusionOptions):
    """Options of the spatial vision aggregator; the defaults are Cambrian-1's."""

    channels: int = Field(default=1024, ge=1, description="Width of every encoder's projected map, and of a query.")
    depth: int = Field(default=3, ge=1, description="Cross-attention blocks.")
    num_heads: int = Field(default=16, ge=1, description="Attention heads.")
    query_grids: tuple[int, ...] = Field(
        default=(), description="Side of the grid of each group of queries; one group of the token grid when empty."
    )
    windows: tuple[int, ...] = Field(
        default=(),
        description="Per encoder, cells a side of the window under one cell of the token grid; the nearest to the "
        "encoder's own grid when empty. Cambrian-1 has 1, 1, 1, 4.",
    )
    mask_padding: bool = Field(
        default=False, description="Queries do not see padding; needs image sizes, which the processor then gives."
    )


@dataclass(frozen=True)
class ProjectedMaps:
    """Every encoder's map at one width.

    Attributes:
        maps: Per encoder ``[B, C, grid * m_k, grid * m_k]``.
        image_sizes: ``[B, 2]``, width and height before padding to a square; None when all of it is image.
    """

    maps: tuple[Tensor, ...]
    image_sizes: Tensor | None


class SpatialVisionAggregator(Fusion):
    """A connector of D blocks and G groups of queries over windows of every encoder's map.

    Each encoder's map is resampled (bilinear, corners not aligned) to ``grid * m_k`` cells a side and projected cell by
    cell: ``LN(W_2 GELU(W_1 f + b_1) + b_2)``. The context g is the mean over the first encoder's projected map, padding
    included. A group starts from one learned vector, repeated at each of its L x L queries, which tell themselves apart
    by their windows alone. D blocks of ``VisionSampler`` follow. A query's keys are the cells of its window in each
    encoder's map; cells that show padding are masked, except where one encoder's window shows nothing else. The groups'
    results are resampled to the token grid and their channels joined.

    Source:
        Cambrian-1, arXiv:2406.16860, section 3.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        grid: int,
        *,
        encoder_grids: Sequence[int] | None = None,
        options: AggregatorOptions | None = None,
    ) -> None:
        options = options or AggregatorOptions()
        query_grids = options.query_grids or (grid,)
        super().__init__(channels=options.channels * len(query_grids), num_tokens=grid * grid)
        self.encoder_channels = tuple(encoder_channels)
        self.grid = grid
        self.uses_image_sizes = options.mask_padding
        self.query_grids = query_grids
        self.windows = _window_sides(encoder_channels, grid, encoder_grids=encoder_grids, options=options)
        self.num_heads = options.num_heads
        self.context_channels = width = options.channels
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
            for channels in encoder_channels
        )
        self.queries = nn.Parameter(torch.randn(len(query_grids), width) / width**0.5)
        self.samplers = nn.ModuleList(
            nn.ModuleList(
                VisionSampler(
                    width,
                    channels=width,
                    windows=[side * grid // query_grid for side in self.windows],
                    num_heads=options.num_heads,
                )
                for _ in range(options.depth)
            )
            for query_grid in query_grids
        )

    def project(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> ProjectedMaps:
        """Bring every encoder's map to its size and to one width.

        Args:
            features: One ``[B, C_k, h_k, w_k]`` map per encoder.
            image_sizes: ``[B, 2]``, width and height of each image before it was padded to a square.

        Raises:
            ShapeError: Another number of maps, or of channels in one, than the fusion was built for,
                or no image sizes where padding is masked.
        """
        check_features(features, self.encoder_channels)
        if self.uses_image_sizes and image_sizes is None:
            raise ShapeError(
                "no image_sizes", "model.fusion.options.mask_padding needs them", "Pass those that the processor gave."
            )
        maps = []
        for feature, side, projection in zip(features, self.windows, self.projections, strict=True):
            resampled = resample_map(feature, self.grid * side)
            maps.append(projection(resampled.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return ProjectedMaps(maps=tuple(maps), image_sizes=image_sizes if self.uses_image_sizes else None)

    def look(self, projected: ProjectedMaps, grid: int | None = None) -> VisualWindows:
        """The windows of a grid of queries.

        Args:
            projected: Every encoder's map.
            grid: Side of the grid of queries; the token grid when left out.

        Returns:
            Windows of ``B * grid * grid`` queries, image by image, in rows from the top left.
        """
        grid = grid or self.grid
        keys = [split_windows(projected_map, grid) for projected_map in projected.maps]
        masks = [self._seen(own, projected, grid=grid) for own in projected.maps]
        overall = projected.maps[0].mean(dim=(2, 3))
        return VisualWindows(
            keys=torch.cat(keys, dim=2).flatten(0, 1),
            mask=torch.cat(masks, dim=2).flatten(0, 1),
            overall=overall[:, None].expand(-1, grid * grid, -1).flatten(0, 1),
        )

    def aggregate(self, projected: ProjectedMaps) -> Tensor:
        """Run the connector: every encoder's map to ``[B, grid * grid, G * channels]``."""
        groups = []
        for query, query_grid, blocks in zip(self.queries, self.query_grids, self.samplers, strict=True):
            windows = self.look(projected, query_grid)
            hidden = query.expand(windows.overall.shape[0], -1)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, windows)
            group_map = hidden.unflatten(0, (-1, query_grid, query_grid)).permute(0, 3, 1, 2)
            groups.append(resample_map(group_map, self.grid))
        return torch.cat(groups, dim=1).flatten(2).transpose(1, 2)

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:
        """``[B, C_k, h_k, w_k]`` per encoder to ``[B, grid * grid, G * channels]``."""
        return self.aggregate(self.project(features, image_sizes))

    def _seen(self, own: Tensor, projected: ProjectedMaps, *, grid: int) -> Tensor:
        # [B, grid * grid, cells of a window]
        batch, side = own.shape[0], own.shape[-1]
        if projected.image_sizes is None:
            return own.new_ones(batch, grid * grid, (side // grid) ** 2, dtype=torch.bool)
        cells = image_cells(projected.image_sizes, side)[:, None]
        seen = split_windows(cells, grid)[..., 0]
        return seen | ~seen.any(dim=-1, keepdim=True)


def _window_sides(
    encoder_channels: Sequence[int],
    grid: int,
    *,
    encoder_grids: Sequence[int] | None,
    options: AggregatorOptions,
) -> list[int]:
    if options.channels % options.num_heads:
        raise RecipeError(
            f"model.fusion.options has {options.num_heads} heads over {options.channels} channels",
            "a whole number of channels a head is needed",
            "Change num_heads or channels.",
        )
    if options.windows and len(options.windows) != len(encoder_channels):
        raise RecipeError(
            f"model.fusion.options.windows has {len(options.windows)} entries for {len(encoder_channels)} encoders",
            "one per encoder is needed",
            "Add or drop entries.",
        )
    if not options.windows and encoder_grids is None:
        raise RecipeError(
            "model.fusion.options.windows is empty", "the encoders' grids are not known here", "Name the windows."
        )
    sides = list(options.windows) or [max(1, round(own / grid)) for own in encoder_grids or ()]
    for side in sides:
        for query_grid in options.query_grids:
            if side < 1 or query_grid < 1 or (side * grid) % query_grid:
                raise ShapeError(
                    f"a group of {query_grid} x {query_grid} queries over a map of {side * grid} cells a side",
                    "a whole number of cells for each query is needed",
                    "Change model.fusion.options.query_grids or windows.",
                )
    return sides


ROW = FusionRow(
    build=SpatialVisionAggregator,
    description="a grid of queries gathers from windows of every encoder; one softmax over all",
    source="Cambrian-1, arXiv:2406.16860",
    options=AggregatorOptions,
)
