"""High resolution by tiling: which tiles an image is cut into, and where their visual tokens stand in the sequence.

Pure arithmetic on sizes, and cuts from ``uint8`` images; the same code trains, evaluates and runs a bundle.

Sources: LLaVA-1.6 ("anyres", github.com/haotian-liu/LLaVA, ``mm_utils``) and Mini-Gemini HD (arXiv:2403.18814).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manyeyes.errors import RecordError
from manyeyes.runtime.bundle_contents import ImageLayout, read_part
from manyeyes.runtime.preprocess import ImageTransform, resize_image

NEWLINE = -1
"""In a layout: the learned token that ends a row."""

# LLaVA-1.6's grids, in tiles: image_grid_pinpoints of 336-pixel tiles.
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class TokenLayout:
    """How an image becomes tiles, and its tokens a sequence.

    Attributes:
        tiling: ``none``: one tile. ``anyres``: the whole image, then the tiles of the grid among ``pinpoints`` that
            suits it best (LLaVA-1.6). ``grid``: the whole image, then ``image_grid`` x ``image_grid`` tiles of the same
            square (Mini-Gemini HD, with 2).
        pinpoints: For ``anyres``, columns and rows of each grid that may be chosen.
        image_grid: For ``grid``, tiles a side.
        newline: A learned token ends each row of the grid; with ``anyres`` each row of the joined tiles, and the whole
            image has none.
        newline_at: ``rows``, as above; ``end``: one newline after the last token of an image (LLaVA-1.6 does so to an
            image of a single tile).
        unpad: Rows or columns that show nothing but padding are left out.
        whole: Encoders, by name, that see the whole image once, at their own size, whatever the tiling.
        tile_size: Pixels a side of a tile of the first tiled encoder; ``anyres`` counts in these.
    """

    tiling: Literal["none", "anyres", "grid"] = "none"
    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
    image_grid: int = 2
    newline: bool = False
    newline_at: Literal["rows", "end"] = "rows"
    unpad: bool = False
    whole: tuple[str, ...] = ()
    tile_size: int = 336

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back."""
        return {**asdict(self), "pinpoints": [list(pair) for pair in self.pinpoints], "whole": list(self.whole)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenLayout:
        """Read what ``as_dict`` wrote.

        Raises:
            BundleError: A field is unknown, of another type or out of range.
        """
        layout = dict(read_part(ImageLayout, {**cls().as_dict(), **values}, what="token layout"))
        return cls(**{**layout, "pinpoints": tuple(layout["pinpoints"]), "whole": tuple(layout["whole"])})

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles that an image is cut into, beside the tile of the whole; 0 and 0 for none.

        Args:
            width: Of the image, in pixels.
            height: Of the image, in pixels.
        """
        if self.tiling == "none":
            return 0, 0
        if self.tiling == "grid":
            return self.image_grid, self.image_grid
        return choose_grid(width, height, pinpoints=self.pinpoints, tile_size=self.tile_size)

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles of an image, the whole one included."""
        columns, rows = self.tiles(width, height)
        return 1 + columns * rows


def choose_grid(width: int, height: int, *, pinpoints: Sequence[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """The grid that keeps most of an image's pixels; of several, the one that wastes fewest of its own.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        pinpoints: Columns and rows to choose from.
        tile_size: Pixels a side of a tile.

    Returns:
        Columns and rows.

    Source:
        LLaVA-1.6, ``select_best_resolution``.
    """
    best, best_kept, best_wasted = pinpoints[0], -1, 0
    for columns, rows in pinpoints:
        canvas_width, canvas_height = columns * tile_size, rows * tile_size
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_width * canvas_height - kept
        if kept > best_kept or (kept == best_kept and wasted < best_wasted):
            best, best_kept, best_wasted = (columns, rows), kept, wasted
    return best


def tile_image(
    image: NDArray[np.uint8], transform: ImageTransform, layout: TokenLayout, *, encoder: str
) -> NDArray[np.uint8]:
    """Cut an image for one encoder.

    Args:
        image: ``[H, W, 3]``, uint8, RGB.
        transform: The encoder's; ``size`` is the side of a tile. ``anyres`` squeezes the whole image into its tile,
            whatever ``fit`` says, and fits the tiles with the aspect ratio kept, on black; ``grid`` cuts what ``fit``
            makes of the image at ``image_grid`` times the size.
        layout: How to cut.
        encoder: The encoder's name; those of ``layout.whole`` get one tile.

    Returns:
        ``[tiles, size, size, 3]``, uint8: the whole image, then its tiles in rows from the top left.

    Raises:
        RecordError: ``image`` has another shape or dtype.
    """
    if encoder in layout.whole or layout.tiling == "none":
        return resize_image(image, transform)[None]
    size, (columns, rows) = transform.size, layout.tiles(image.shape[1], image.shape[0])
    if layout.tiling == "grid":
        whole = resize_image(image, transform)
        canvas = resize_image(image, replace(transform, size=size * layout.image_grid))
    else:
        whole = resize_image(image, replace(transform, fit="stretch"))
        canvas = _fit_on_black(image, transform, width=columns * size, height=rows * size)
    cut = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return np.concatenate([whole[None], cut])


def arrange_tokens(width: int, height: int, layout: TokenLayout, *, grid: int) -> NDArray[np.int64]:
    """Where the tokens of an image's tiles stand in the sequence.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        layout: How it was cut.
        grid: Side of the grid of tokens of one tile.

    Returns:
        ``[N]``: for each place the number of a token, counted over the image's tiles, ``grid * grid`` each, in rows
        from the top left; ``NEWLINE`` for the token that ends a row.

    Raises:
        RecordError: The image is so long and thin that unpadding leaves nothing of it.
    """
    per_tile = grid * grid
    columns, rows = layout.tiles(width, height)
    if layout.tiling == "grid":
        return np.arange(layout.num_tiles(width, height) * per_tile)
    if layout.tiling == "none":
        return _rows(np.arange(per_tile).reshape(grid, grid), width, height, layout)
    numbers = per_tile + np.arange(columns * rows * per_tile).reshape(rows, columns, grid, grid)
    joined = numbers.swapaxes(1, 2).reshape(rows * grid, columns * grid)
    return np.concatenate([np.arange(per_tile), _rows(joined, width, height, layout)])


def arrange_images(
    sizes: Sequence[tuple[int, int]], layout: TokenLayout, *, grid: int
) -> tuple[NDArray[np.int64], list[int]]:
    """Where the tokens of several images stand in their sequences, as the model takes it.

    Args:
        sizes: Width and height of each image, in pixels.
        layout: How they were cut.
        grid: Side of the grid of tokens of one tile.

    Returns:
        ``[I, M]``: as ``arrange_tokens``, with tokens counted over the tiles of all images, and 0 behind the end of a
        shorter sequence; and the length of each.

    Raises:
        RecordError: As ``arrange_tokens``.
    """
    rows, first = [], 0
    for width, height in sizes:
        places = arrange_tokens(width, height, layout, grid=grid)
        rows.append(np.where(places == NEWLINE, NEWLINE, places + first))
        first += layout.num_tiles(width, height) * grid * grid
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    padded = [np.pad(row, (0, longest - len(row))) for row in rows]
    return np.stack(padded) if padded else np.zeros((0, 0), np.int64), lengths


def _rows(numbers: NDArray[np.int64], width: int, height: int, layout: TokenLayout) -> NDArray[np.int64]:
    if layout.unpad:
        numbers = _unpad(numbers, width, height)
    if layout.newline and layout.newline_at == "end":
        return np.append(numbers.flatten(), NEWLINE)
    if layout.newline:
        ends = np.full((numbers.shape[0], 1), NEWLINE, np.int64)
        numbers = np.concatenate([numbers, ends], axis=1)
    return numbers.flatten()


def _unpad(numbers: NDArray[np.int64], width: int, height: int) -> NDArray[np.int64]:
    # The published formula, in its order, so that truncation falls alike (LLaVA-1.6 and Cambrian-1, unpad_image).
    rows, columns = numbers.shape
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        kept = numbers[padding : rows - padding]
    else:
        padding = (columns - int(width * (rows / height))) // 2
        kept = numbers[:, padding : columns - padding]
    if kept.size == 0:
        raise RecordError(
            f"image is {width} x {height} pixels",
            f"less than one of {rows} x {columns} visual tokens a side is left of it without padding",
            "Crop the image, or set model.layout.unpad to false.",
        )
    return kept


def _fit_on_black(image: NDArray[np.uint8], transform: ImageTransform, *, width: int, height: int) -> NDArray[np.uint8]:
    own_height, own_width = image.shape[:2]
    across, down = width / own_width, height / own_height
    if across < down:
        fitted = (width, min(math.ceil(own_height * across), height))
    else:
        fitted = (min(math.ceil(own_width * down), width), height)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    resized = Image.fromarray(image).resize(fitted, filters[transform.resample])
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return np.array(canvas)
