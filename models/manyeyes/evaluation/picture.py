"""Images inside a page: small enough to travel with it."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from manyeyes.runtime.preprocess import decode_image

_THUMBNAIL_PIXELS = 256
_SMALL_PIXELS = 96
_JPEG_QUALITY = 85


def image_tag(data: bytes, *, alt: str) -> str:
    """An ``<img>`` with the picture in it: PNG where it is tiny, JPEG of at most 256 pixels a side otherwise.

    Args:
        data: An image file.
        alt: Plain text.

    Raises:
        RecordError: ``data`` is no image.
    """
    picture = Image.fromarray(decode_image(data))
    small = max(picture.size) <= _SMALL_PIXELS
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    kind, shown = ("png", "small") if small else ("jpeg", "large")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{shown}" alt="{escape(alt)}" src="data:image/{kind};base64,{encoded}">'
