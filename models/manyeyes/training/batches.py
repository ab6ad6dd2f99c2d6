"""From samples of a mixture to batches: every image decoded once, every conversation tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyeyes.chat import IGNORE_INDEX, split_branches
from manyeyes.data.mixture import Mixture, Sample
from manyeyes.data.records import ImageFile
from manyeyes.processor import ManyEyesProcessor
from manyeyes.runtime.chat import Encoded
from manyeyes.runtime.preprocess import decode_image, normalize_pixels, resize_image

PIXELS_IN_MEMORY_BYTES = 2 * 1024**3
CONVERSATIONS_IN_MEMORY = 100_000
# Questions differ in length by a half: in one rectangle a quarter of the tokens of easy-VQA would be padding.
BUCKETS = 3
MIN_BUCKET = 32


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        pixel_values: ``[I, 3, size, size]`` by encoder name, float32; empty without images.
        prefixes: ``input_ids`` and ``attention_mask`` ``[R, P]`` and ``image_spans`` of the independent samples,
            padded on the left; None when there are none.
        branches: What follows the prefixes, in buckets of like length: ``rows`` ``[Q]``, ``input_ids``,
            ``attention_mask`` and ``labels`` ``[Q, L]``, padded on the right.
        chains: What ``ManyEyesProcessor.pad`` made of the chained samples; None when there are none. Their images
            follow those of the prefixes.
        num_supervised: Tokens that the loss counts.
        num_samples: Samples.
    """

    pixel_values: dict[str, Tensor]
    prefixes: dict[str, Tensor] | None
    branches: tuple[dict[str, Tensor], ...]
    chains: dict[str, Tensor] | None
    num_supervised: int
    num_samples: int


class BatchBuilder:
    """Makes batches from positions in the stream of samples; epochs follow each other in it without a gap.

    Args:
        mixture: Which sample comes when.
        processor: The model's.
    """

    def __init__(self, mixture: Mixture, processor: ManyEyesProcessor) -> None:
        self._mixture = mixture
        self._processor = processor
        self._pixels: dict[str, dict[str, NDArray[np.uint8]]] = {}
        self._pixels_bytes = 0
        self._encode = lru_cache(maxsize=CONVERSATIONS_IN_MEMORY)(self._encode_uncached)

    def build(self, positions: Sequence[int]) -> Batch:
        """The batch of these positions.

        Args:
            positions: From 0; position ``len(mixture)`` is the first sample of the second epoch.

        Raises:
            RecordError: A conversation or an image cannot be used.
            SnapshotError: A shard cannot be read.
        """
        samples = [self._mixture.sample(*divmod(position, len(self._mixture))) for position in positions]
        independent = [sample for sample in samples if sample.turns == "independent"]
        chained = [sample for sample in samples if sample.turns == "chained"]
        groups = [split_branches(self._conversations(sample)) for sample in independent]
        chains = [encoded for sample in chained for encoded in self._conversations(sample)]
        images = [image for sample in (*independent, *chained) for image in _shown_images(sample)]
        prefixes, branches = _bucket(self._processor.pad_groups(groups)) if groups else (None, ())
        padded_chains = self._processor.pad(chains, side="right", labels=True) if chains else None
        if padded_chains is not None:
            padded_chains["image_spans"][:, 3] += sum(len(group.image_spans) for group in groups)
        return Batch(
            pixel_values=self._pixel_values(images),
            prefixes=prefixes,
            branches=branches,
            chains=padded_chains,
            num_supervised=sum(
                int((padded["labels"] != IGNORE_INDEX).sum())
                for padded in (*branches, *([padded_chains] if padded_chains is not None else []))
            ),
            num_samples=len(samples),
        )

    def _conversations(self, sample: Sample) -> list[Encoded]:
        num_images = 0 if sample.image_dropped else len(sample.record.images)
        return [
            self._encode(tuple((turn.speaker, turn.text) for turn in turns), num_images)
            for turns in sample.conversations()
        ]

    def _encode_uncached(self, turns: tuple[tuple[str, str], ...], num_images: int) -> Encoded:
        return self._processor.encode(turns, num_images=num_images)

    def _pixel_values(self, images: Sequence[ImageFile]) -> dict[str, Tensor]:
        if not images:
            return {}
        resized = [self._resized(image) for image in images]
        return {
            name: torch.from_numpy(normalize_pixels(np.stack([pixels[name] for pixels in resized]), transform))
            for name, transform in self._processor.image_transforms.items()
        }

    def _resized(self, image: ImageFile) -> dict[str, NDArray[np.uint8]]:
        """Pixels for each encoder as ``uint8``, from memory while there is room."""
        known = self._pixels.get(image.sha256)
        if known is not None:
            return known
        decoded = decode_image(image.data)
        pixels = {
            name: resize_image(decoded, transform) for name, transform in self._processor.image_transforms.items()
        }
        size_bytes = sum(array.nbytes for array in pixels.values())
        if self._pixels_bytes + size_bytes <= PIXELS_IN_MEMORY_BYTES:
            self._pixels[image.sha256] = pixels
            self._pixels_bytes += size_bytes
        return pixels


def _bucket(padded: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
    """Sort branches by length into buckets, and cut each to its longest.

    Args:
        padded: From ``ManyEyesProcessor.pad_groups``.

    Returns:
        Prefixes and buckets, as in ``Batch``.
    """
    lengths = padded["attention_mask"].sum(1)
    order = torch.argsort(lengths, stable=True)
    buckets = []
    for chosen in order.chunk(max(1, min(BUCKETS, len(order) // MIN_BUCKET))):
        longest = int(lengths[chosen].max())
        buckets.append(
            {
                "rows": padded["rows"][chosen],
                **{name: padded[name][chosen, :longest] for name in ("input_ids", "attention_mask", "labels")},
            }
        )
    prefixes = {
        "input_ids": padded["prefix_ids"],
        "attention_mask": padded["prefix_mask"],
        "image_spans": padded["image_spans"],
    }
    return prefixes, tuple(buckets)


def _shown_images(sample: Sample) -> tuple[ImageFile, ...]:
    return () if sample.image_dropped else sample.record.images
