"""Images to visual tokens: the vision graph, and what it must be told of each image.

Shapes: N visual tokens of one image, D width of the language model, M of the N that look back at the image from inside
the language model, K cells that each of those looks at, C width of a cell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from manyeyes.errors import BundleError
from manyeyes.runtime.preprocess import ImageTransform, decode_image, normalize_pixels
from manyeyes.runtime.sessions import Graph
from manyeyes.runtime.tiling import NEWLINE, TokenLayout, arrange_images, tile_image

LAYOUT, IMAGE_SIZES = "layout", "image_sizes"
"""Inputs of the vision graph beside pixels."""

TOKENS = "visual_tokens"
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
    """``vision.onnx`` and the way to it.

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
        made = graph.shape(TOKENS, rank=3)[1]
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
        tokens = outputs[TOKENS].numpy()
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
