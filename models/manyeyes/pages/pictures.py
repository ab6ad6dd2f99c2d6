"""Images inside a page: small enough to travel with it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_THUMBNAIL_PIXELS = 256
_SMALL_PIXELS = 96
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """An image as a page holds it.

    Attributes:
        source: A ``data:`` address.
        small: Whether its pixels are to be seen as squares.
    """

    source: str
    small: bool


def make_picture(pixels: np.ndarray) -> Picture:
    """PNG where the image is tiny, JPEG of at most 256 pixels a side otherwise.

    Args:
        pixels: ``[H, W, 3]``, uint8.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    small = max(image.size) <= _SMALL_PIXELS
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    kind = "png" if small else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small)
