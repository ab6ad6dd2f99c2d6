"""Images to visual tokens: the vision graph, and what it must be told of each image.

Shapes: N visual tokens of one image, D width of the language model, M of the N that look back at the image from inside
the language model, K cells that each of those looks at, C width of a cell.

Images as people have them become the bytes of an image file first, which is what the runtime keeps and compares.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from manyeyes.errors import BundleError, RecordError
from manyeyes.runtime.preprocess import ImageTransform, decode_image, normalize_pixels
from manyeyes.runtime.sessions import Graph
from manyeyes.runtime.tiling import NEWLINE, TokenLayout, arrange_images, tile_image

LAYOUT, IMAGE_SIZES = "layout", "image_sizes"
"""Inputs of the vision graph beside pixels."""

TOKENS, _OLD_TOKENS = "image_features", "visual_tokens"
"""The output that holds visual tokens; the second in older bundles."""

PIXELS = "pixel_values"
"""The one input of a vision graph that other runtimes know."""

WINDOWS = ("window_keys", "window_mask", "window_overall")
"""What visual tokens look at: outputs of the vision graph and inputs of the decoder, ``[., K, C]``, ``[., K]`` (bool)
and ``[., C]``; only where the language model looks back."""

PLACES = "window_places"
"""Input of the decoder: where the tokens that look stand, ``row * T + position``."""


@dataclass(frozen=True)
class ImageTokens:
    """One image as the language model sees it.

    Attributes:
        tokens: ``[N, D]``, float32.
        looks: ``[M]``, which of the tokens look back; empty where none does.
        windows: What those look at: the arrays of ``WINDOWS``, M rows each; empty where none looks.
    """

    tokens: NDArray[np.float32]
    looks: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    windows: Mapping[str, NDArray[np.float32] | NDArray[np.bool_]] = field(default_factory=dict)


class ImageCache(Protocol):
    """Keeps what the vision graph made of an image."""

    def find(self, image: bytes) -> ImageTokens | None:
        """The tokens of an image file, or ``None`` where they must be made."""

    def keep(self, image: bytes, tokens: ImageTokens, *, seconds: float) -> None:
        """Keep the tokens of an image file; ``seconds`` is what making them took."""


class Vision:
    """The vision graph and the way to it.

    Args:
        graph: Pixels to visual tokens.
        transforms: How each encoder wants its pixels, by the name of the graph's input.
        layout: How an image becomes tiles and its tokens a sequence; None for one tile, its tokens as they are.
        tile_tokens: Visual tokens a tile.
        cache: Is asked for an image before the graph is; None without.

    Raises:
        BundleError: The graph takes other inputs, or makes another number of tokens.
    """

    def __init__(
        self,
        graph: Graph,
        transforms: Mapping[str, ImageTransform],
        *,
        layout: TokenLayout | None,
        tile_tokens: int,
        cache: ImageCache | None = None,
    ) -> None:
        described = {*transforms, *([] if layout is None else [LAYOUT])}
        if set(graph.input_names) - {IMAGE_SIZES} != described:
            raise BundleError(
                f"preprocess.json describes {sorted(described)}",
                f"{graph.name} takes {sorted(graph.input_names)}",
                "Export the bundle again.",
            )
        for name, transform in transforms.items():
            sides = graph.sizes(name, rank=4, fixed=(2, 3))
            if sides != [transform.size] * 2:
                raise BundleError(
                    f"preprocess.json gives {name} {transform.size} pixels a side",
                    f"{graph.name} takes {sides[0]} x {sides[1]}",
                    "Export the bundle again.",
                )
        self._tokens = _OLD_TOKENS if _OLD_TOKENS in graph.output_names else TOKENS
        made = graph.shape(self._tokens, rank=3)[1]
        grid = math.isqrt(tile_tokens)
        if layout is None and isinstance(made, int) and made != tile_tokens:
            raise BundleError(
                f"chat.json has image_tokens {tile_tokens}", f"{graph.name} makes {made}", "Export the bundle again."
            )
        if layout is not None and grid * grid != tile_tokens:
            raise BundleError(
                f"chat.json has image_tokens {tile_tokens}", "a square number goes with a layout", "Export it again."
            )
        self._graph = graph
        self._transforms = dict(transforms)
        self._layout = layout
        self._tile_tokens = tile_tokens
        self._cache = cache
        self.providers = graph.providers

    def encode(self, images: Sequence[bytes]) -> list[ImageTokens]:
        """Run images through encoders, fusion and projector, all at once; those that the cache has stay out.

        Args:
            images: Image files.

        Raises:
            RecordError: An image cannot be decoded, or unpadding leaves nothing of it.
            BundleError: The graph does not run.
        """
        if self._cache is None:
            return self._run(images)
        found = {image: self._cache.find(image) for image in images}
        missing = [image for image, tokens in found.items() if tokens is None]
        if missing:
            started = time.perf_counter()
            made = self._run(missing)
            seconds = (time.perf_counter() - started) / len(missing)
            for image, tokens in zip(missing, made, strict=True):
                self._cache.keep(image, tokens, seconds=seconds)
                found[image] = tokens
        return [tokens for tokens in (found[image] for image in images) if tokens is not None]

    def _run(self, images: Sequence[bytes]) -> list[ImageTokens]:
        decoded = [decode_image(data) for data in images]
        sizes = [(image.shape[1], image.shape[0]) for image in decoded]
        tiling = self._layout or TokenLayout()
        inputs: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
            name: np.concatenate(
                [normalize_pixels(tile_image(image, transform, tiling, encoder=name), transform) for image in decoded]
            )
            for name, transform in self._transforms.items()
        }
        places = np.arange(len(images) * self._tile_tokens).reshape(len(images), -1)
        lengths = [self._tile_tokens] * len(images)
        if self._layout is not None:
            places, lengths = arrange_images(sizes, self._layout, grid=math.isqrt(self._tile_tokens))
            inputs[LAYOUT] = places
        if IMAGE_SIZES in self._graph.input_names:
            inputs[IMAGE_SIZES] = np.array(sizes, np.int64)
        outputs = self._graph.run(inputs, on_host=self._graph.output_names)
        tokens = outputs[self._tokens].numpy()
        windows = {name: outputs[name].numpy() for name in WINDOWS if name in outputs}
        return [
            _of_one_image(rows[:length], own[:length], windows)
            for rows, own, length in zip(tokens, places, lengths, strict=True)
        ]


def _of_one_image(
    tokens: NDArray[np.float32], places: NDArray[np.int64], windows: Mapping[str, NDArray[np.float32]]
) -> ImageTokens:
    if not windows:
        return ImageTokens(tokens)
    # A newline shows no part of the image, and does not look.
    looks = np.flatnonzero(places != NEWLINE)
    return ImageTokens(tokens, looks, {name: values[places[looks]] for name, values in windows.items()})


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
