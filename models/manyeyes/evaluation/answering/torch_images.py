"""Visual tokens of a batch, taken apart into those of each image and put together again.

A cache keeps images one by one, whatever batch they came in. Shapes: I images, N visual tokens of the image that has
most, D width of the language model; an image has N_i tokens, M_i of which look back at it from inside the language
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyeyes.fusion.vision_sampler import VisualWindows
from manyeyes.model.connection import VisualTokens
from manyeyes.runtime.tiling import NEWLINE
from manyeyes.runtime.vision import WINDOWS, ImageTokens


@dataclass(frozen=True)
class ShownImage:
    """One image as the language model takes it.

    Attributes:
        tokens: ``[N_i, D]``.
        looks: ``[M_i]``, which of the tokens look back.
        windows: What those look at, M_i of them; ``None`` in a model that does not look back.
    """

    tokens: Tensor
    looks: Tensor
    windows: VisualWindows | None


def split_images(visual: Tensor | VisualTokens, lengths: Sequence[int]) -> list[ShownImage]:
    """Take a batch apart.

    Args:
        visual: ``[I, N, D]``.
        lengths: N_i of each image.
    """
    if not isinstance(visual, VisualTokens):
        nothing = torch.zeros(0, dtype=torch.long, device=visual.device)
        return [ShownImage(tokens[:length], nothing, None) for tokens, length in zip(visual, lengths, strict=True)]
    images = []
    for tokens, cells, length in zip(visual.tokens, visual.cells, lengths, strict=True):
        looks = (cells[:length] != NEWLINE).nonzero().squeeze(1)
        images.append(ShownImage(tokens[:length], looks, visual.windows.select(cells[looks])))
    return images


def join_images(images: Sequence[ShownImage]) -> Tensor | VisualTokens:
    """Put images together, ``[I, N, D]``; shorter ones end with zeros that stand nowhere.

    Args:
        images: At least one; all of one model.
    """
    tokens = torch.nn.utils.rnn.pad_sequence([image.tokens for image in images], batch_first=True)
    windows = [image.windows for image in images if image.windows is not None]
    if not windows:
        return tokens
    cells = torch.full(tokens.shape[:2], NEWLINE, dtype=torch.long, device=tokens.device)
    first = 0
    for row, image in zip(cells, images, strict=True):
        row[image.looks] = torch.arange(first, first + len(image.looks), device=tokens.device)
        first += len(image.looks)
    joined = VisualWindows(
        keys=torch.cat([own.keys for own in windows]),
        mask=torch.cat([own.mask for own in windows]),
        overall=torch.cat([own.overall for own in windows]),
    )
    return VisualTokens(tokens=tokens, windows=joined, cells=cells)


def to_arrays(image: ShownImage) -> ImageTokens:
    """In host memory, as a cache keeps it and as a bundle has it."""
    windows = {}
    if image.windows is not None:
        values = (image.windows.keys, image.windows.mask, image.windows.overall)
        windows = {name: value.cpu().numpy() for name, value in zip(WINDOWS, values, strict=True)}
    return ImageTokens(image.tokens.cpu().numpy(), image.looks.cpu().numpy(), windows)


def from_arrays(image: ImageTokens, device: torch.device) -> ShownImage:
    """Back on a device; bit for bit what ``to_arrays`` was given."""

    def load(array: np.ndarray) -> Tensor:
        # Copied: memory of a cache is not to be written, and torch warns of arrays that cannot be.
        return torch.tensor(array, device=device)

    windows = None
    if image.windows:
        windows = VisualWindows(*(load(np.asarray(image.windows[name])) for name in WINDOWS))
    return ShownImage(load(image.tokens), load(image.looks), windows)
