"""Images as people have them, to the bytes of an image file, which is what the runtime keeps and compares."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from manyeyes.errors import RecordError

ImageLike = bytes | bytearray | memoryview | str | Path | Image.Image | NDArray[np.uint8]
"""The bytes of an image file, the path of one, an image of Pillow, or pixels: ``[H, W, 3]``, uint8, RGB."""

# Modes that PNG keeps as they are.
_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def read_images(images: ImageLike | Sequence[ImageLike]) -> tuple[bytes, ...]:
    """Bytes of image files, with the same pixels.

    Args:
        images: A list of images, or one image.

    Raises:
        RecordError: Something else is among them; says which.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if isinstance(images, bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray):
        images = [images]
    if not isinstance(images, list | tuple):
        raise RecordError(f"images is {_shown(images)}", "a list of images", "Write images=[...].")
    return tuple(read_image(image, name=f"images[{place}]") for place, image in enumerate(images))


def read_image(image: Any, *, name: str) -> bytes:
    """Bytes of one image file, with the same pixels; whether they can be decoded is seen when they are.

    Args:
        image: An ``ImageLike``.
        name: Of the image, for messages.

    Raises:
        RecordError: It is something else, no such file, or pixels of another shape or type.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise RecordError(
                f"{name} is {str(image)[:60]!r}, which cannot be read ({getattr(error, 'strerror', None) or error})",
                "the path of an image file, or its bytes",
                "Check the path.",
            ) from error
    if isinstance(image, Image.Image):
        return _from_pillow(image, name)
    if isinstance(image, np.ndarray):
        return _from_pixels(image, name)
    raise RecordError(
        f"{name} is {_shown(image)}",
        "bytes of an image file, the path of one, an image of Pillow, or an array [H, W, 3] of uint8",
        "Pass one of these.",
    )


def _from_pillow(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise RecordError(f"{name} has floating-point samples", "8 or 16 bits a sample", "Say what white is.")
        (image if image.mode in _KEPT_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    except RecordError:
        raise
    # Pillow reads a file when its pixels are asked for, and its plugins raise whatever their parsers do.
    except Exception as error:
        raise RecordError(f"{name} cannot be read ({error})", "a whole image", "Open it again.") from error
    return buffer.getvalue()


def _from_pixels(pixels: NDArray[Any], name: str) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        do = "Repeat a grey channel three times, and put channels last."
        if pixels.dtype != np.uint8:
            do = "Scale it to 0 to 255 and convert it: (255 * pixels).round().astype(numpy.uint8), if white is 1."
        raise RecordError(
            f"{name} is an array {list(pixels.shape)} of {pixels.dtype}", "[H, W, 3] of uint8, RGB, is needed", do
        )
    height, width = pixels.shape[:2]
    return f"P6 {width} {height} 255\n".encode() + np.ascontiguousarray(pixels).tobytes()


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"
