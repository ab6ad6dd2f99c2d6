"""Pixels as the encoders take them, from what a batch holds.

Sources: Eagle (arXiv:2408.15998) makes every encoder's input from one normalised tensor by bilinear interpolation with
aligned corners, in fp32, without antialiasing; Mini-Gemini (arXiv:2403.18814) makes the small image from the large one
so, corners not aligned, and cuts its tiles from the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manyeyes.processor import PIXELS


@dataclass(frozen=True)
class SharedPixels:
    """How every encoder's input is made from one normalised tensor.

    Attributes:
        image_size: Pixels a side of that tensor.
        align_corners: Corner pixels keep the place of their centres.
        antialias: Widen the filter when shrinking.
        image_grid: 2 and more: the tensor shows a whole image, and encoders but those of ``whole`` see it as a whole
            and as so many times so many tiles.
        whole: Encoders, by name, that see whole images.
    """

    image_size: int
    align_corners: bool
    antialias: bool
    image_grid: int = 1
    whole: tuple[str, ...] = ()

    def spread(self, pixels: Tensor, encoder_sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Make every encoder's input.

        Args:
            pixels: ``[I, 3, image_size, image_size]``, normalised.
            encoder_sizes: Pixels a side that each encoder takes, by its name.

        Returns:
            ``[I, 3, size, size]`` for each; with tiles ``[I * (1 + image_grid^2), 3, size, size]``, of each image first
            the whole (made from the canvas that tiles are cut from), then its tiles in rows from the top left.
        """
        return {
            name: self._resample(pixels, size)
            if self.image_grid == 1 or name in self.whole
            else self._tile(pixels, size)
            for name, size in encoder_sizes.items()
        }

    def _tile(self, pixels: Tensor, size: int) -> Tensor:
        grid = self.image_grid
        canvas = self._resample(pixels, size * grid)
        # [I, 3, G, s, G, s] -> [I, G * G, 3, s, s]
        cut = canvas.unflatten(3, (grid, size)).unflatten(2, (grid, size)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return torch.cat([self._resample(canvas, size)[:, None], cut], dim=1).flatten(0, 1)

    def _resample(self, pixels: Tensor, size: int) -> Tensor:
        if pixels.shape[-1] == size:
            return pixels
        resampled = functional.interpolate(
            pixels.float(),
            size=(size, size),
            mode="bilinear",
            align_corners=self.align_corners,
            antialias=self.antialias,
        )
        return resampled.to(pixels.dtype)


def gather_pixels(
    pixel_values: Mapping[str, Tensor] | None, kwargs: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """Take ``pixel_values.<name>`` keywords together, and give back the other keywords."""
    dotted = {key.removeprefix(PIXELS): value for key, value in kwargs.items() if key.startswith(PIXELS)}
    others = {key: value for key, value in kwargs.items() if not key.startswith(PIXELS)}
    return {**(pixel_values or {}), **dotted} or None, others
