"""Tokens of a coarse encoder look up detail in a fine encoder where they choose to look.

Source: the fifth fusion that Eagle (arXiv:2408.15998, section 2.3) compares: Mini-Gemini's mining with its windows
replaced by deformable attention (Deformable DETR, arXiv:2010.04159). Neither code nor sizes were published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.errors import ShapeError
from manyeyes.fusion.fusion import Fusion, FusionOptions, FusionRow, check_features, join_maps, resample_to_grid


class DeformableOptions(FusionOptions):
    """Options of deformable mining; the defaults are Deformable DETR's."""

    num_heads: int = Field(default=8, ge=1, description="Heads; each looks at its own points.")
    num_points: int = Field(default=4, ge=1, description="Points that a head looks at.")


class DeformableMining(Fusion):
    """The first encoder asks; it also says where to look in the others' map.

    With x a token of the first encoder, p the centre of its cell and A the others' joined map::

        out = x + [o_1 ; ... ; o_H],   o_h = sum_p a_hp V_h(p + d_hp)
        V = W_v LN_v(A) + b_v,   d = W_d LN(x) + b_d,   a_h = softmax_p(W_a LN(x) + b_a)

    ``V_h(.)`` is bilinear interpolation, zero outside the map. What the paper leaves open is chosen so: heads and
    points as in Deformable DETR (8 and 4); offsets d in cells of the token grid, so that they mean the same at any
    resolution of A; W_d, W_a and b_a start at zero and b_d on a ring around the cell, head h in direction 2 pi h / H at
    distances 1/P, 2/P, ..., 1; norms and the raw residual as in Mini-Gemini, and like there no output projection.

    Source:
        Eagle, arXiv:2408.15998; Deformable DETR, arXiv:2010.04159, equation 2.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        grid: int,
        *,
        encoder_grids: Sequence[int] | None = None,  # noqa: ARG002 - points lie on any map
        options: DeformableOptions | None = None,
    ) -> None:
        options = options or DeformableOptions()
        width, detail = encoder_channels[0], sum(encoder_channels[1:])
        if width % options.num_heads:
            raise ShapeError(
                f"{options.num_heads} heads over {width} channels",
                "a whole number of channels a head is needed",
                "Set model.fusion.options.num_heads.",
            )
        super().__init__(channels=width, num_tokens=grid * grid)
        self.encoder_channels = tuple(encoder_channels)
        self.grid = grid
        self.num_heads, self.num_points = options.num_heads, options.num_points
        self.query_norm = nn.LayerNorm(width)
        self.offsets = nn.Linear(width, self.num_heads * self.num_points * 2)
        self.weights = nn.Linear(width, self.num_heads * self.num_points)
        self.value = nn.Sequential(nn.LayerNorm(detail), nn.Linear(detail, width))
        if self.offsets.weight.device.type != "meta":
            self._start_on_a_ring()

    def _start_on_a_ring(self) -> None:
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        distances = torch.arange(1, self.num_points + 1) / self.num_points
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * distances[None, :, None]).flatten())
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``[B, C_k, h_k, w_k]`` per encoder to ``[B, grid * grid, C_0]``."""
        check_features(features, self.encoder_channels)
        tokens_BQC = resample_to_grid(features[0], self.grid).flatten(2).transpose(1, 2)
        detail = join_maps(features[1:])
        height, width = detail.shape[-2:]
        heads, points = self.num_heads, self.num_points
        values_BCS = self.value(detail.flatten(2).transpose(1, 2)).transpose(1, 2)
        maps = values_BCS.unflatten(1, (heads, -1)).flatten(0, 1).unflatten(-1, (height, width))
        query_BQC = self.query_norm(tokens_BQC)
        offsets_BQHP2 = self.offsets(query_BQC).unflatten(-1, (heads, points, 2))
        # grid_sample counts from -1 at the left edge to 1 at the right one; a cell of the token grid is 2 / grid wide.
        places = self._centres(tokens_BQC)[:, None, None] + offsets_BQHP2 * (2 / self.grid)
        places = places.permute(0, 2, 1, 3, 4).flatten(0, 1)
        sampled = functional.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights_BQHP = self.weights(query_BQC).unflatten(-1, (heads, points)).softmax(-1)
        weights = weights_BQHP.transpose(1, 2).flatten(0, 1)[:, None]
        mined_BCQ = (sampled * weights).sum(-1).unflatten(0, (-1, heads)).flatten(1, 2)
        mined: Tensor = tokens_BQC + mined_BCQ.transpose(1, 2)
        return mined

    def _centres(self, like: Tensor) -> Tensor:
        # [grid * grid, 2]: x and y of each cell's centre, from -1 to 1.
        axis = (torch.arange(self.grid, device=like.device, dtype=like.dtype) + 0.5) * (2 / self.grid) - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([x, y], dim=-1).flatten(0, 1)


ROW = FusionRow(
    build=DeformableMining,
    description="the first encoder's tokens take detail from the others at points that they choose",
    source="Eagle, arXiv:2408.15998; Deformable DETR, arXiv:2010.04159",
    options=DeformableOptions,
    min_encoders=2,
)
