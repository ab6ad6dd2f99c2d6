"""Samples that are there twice: the same bytes and words, or images that look the same.

Near duplicates are found as contamination finds them: dHashes within a radius, then the pixels at 64x64. The index
holds a part of the hashes at a time, and thumbnails of candidates lie on the disk, so memory does not grow with the
data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.contamination.fingerprints import THUMBNAIL, HashIndex, make_thumbnail, read_samples
from manyeyes.data.curation.recipe import NearSpec
from manyeyes.data.shards import ShardSource

_INDEXED = 100_000
"""Hashes in an index at a time, 820 bytes each."""


def find_exact(
    samples: NDArray[np.int64], keys: NDArray[np.uint64], *, rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples of which another one of the same key is drawn first.

    Args:
        samples: Those that are compared.
        keys: Of every sample.
        rank: Of every sample, its place in the order in which samples are drawn.

    Returns:
        The samples to leave out, and of each the one that stays.
    """
    order = samples[np.lexsort((rank[samples], keys[samples]))]
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]]) if len(order) else np.zeros(0, np.int64)
    firsts = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    repeated = order != firsts
    return order[repeated], firsts[repeated]


def find_near(
    samples: NDArray[np.int64],
    *,
    hashes: NDArray[np.uint64],
    keys: NDArray[np.uint64] | None,
    rank: NDArray[np.int64],
    spec: NearSpec,
    images: Images,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples that look like one that is drawn before them and stays.

    Args:
        samples: Those that are compared; each has an image that shows enough.
        hashes: Of every sample, the dHash of its first image.
        keys: Of every sample, what two of them must have in common; None for nothing.
        rank: Of every sample, its place in the order in which samples are drawn.
        spec: From where on two samples are the same.
        images: Where the pixels are.

    Returns:
        The samples to leave out, and of each the one that stays.
    """
    if keys is not None:
        # Only those that share their key with another one need be looked up.
        _, inverse, counts = np.unique(keys[samples], return_inverse=True, return_counts=True)
        samples = samples[counts[inverse] > 1]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *_candidates(samples, hashes, keys, rank, spec.radius)])
    pairs = pairs[np.lexsort((rank[pairs[:, 0]], rank[pairs[:, 1]]))]
    alike = images.compare(pairs, max_difference=spec.max_difference)
    gone: dict[int, int] = {}
    for first, later in pairs[alike].tolist():
        if first not in gone:
            gone.setdefault(later, first)
    return np.array(list(gone), np.int64), np.array(list(gone.values()), np.int64)


def _candidates(
    samples: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    keys: NDArray[np.uint64] | None,
    rank: NDArray[np.int64],
    radius: int,
) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(samples), _INDEXED):
        members = samples[start : start + _INDEXED]
        index = HashIndex(hashes[members], radius=radius)
        for asked_from in range(0, len(samples), _INDEXED):
            asking = samples[asked_from : asked_from + _INDEXED]
            asked, places, _ = index.search(hashes[asking])
            first, later = members[places], asking[asked]
            wanted = rank[first] < rank[later]
            if keys is not None:
                wanted &= keys[first] == keys[later]
            yield np.stack([first[wanted], later[wanted]], axis=1)


class ImageShard(Protocol):
    """A shard as a draw knows it."""

    @property
    def path(self) -> Path:
        """Where it is or will be."""

    @property
    def source(self) -> ShardSource | None:
        """Has it where it is not on this disk."""


class Images:
    """The images of samples that are known by their number over all shards.

    Args:
        shards: In order.
        first_samples: Number of each shard's first sample.
    """

    def __init__(self, shards: Sequence[ImageShard], first_samples: NDArray[np.int64]) -> None:
        self._shards = shards
        self._first_samples = first_samples

    def compare(self, pairs: NDArray[np.int64], *, max_difference: float) -> NDArray[np.bool_]:
        """Whether the two samples of each pair have as many images, and each pair of images looks the same.

        Args:
            pairs: ``[P, 2]``, samples.
            max_difference: Largest mean absolute difference at 64x64, in levels of 255.
        """
        samples = np.unique(pairs)
        alike = np.zeros(len(pairs), bool)
        if not len(samples):
            return alike
        # 12 KiB an image: on the disk, and of one shard at a time.
        with tempfile.TemporaryFile() as file:
            starts, end = np.zeros(len(samples) + 1, np.int64), 0
            shard_of = np.searchsorted(self._first_samples, samples, side="right") - 1
            for shard in np.unique(shard_of).tolist():
                places, where = np.flatnonzero(shard_of == shard), self._shards[shard]
                rows = dict(zip((samples[places] - self._first_samples[shard]).tolist(), places.tolist(), strict=True))
                for group in read_samples(where.path, rows=rows.keys(), texts=False, source=where.source):
                    for sample in group:
                        for data in sample.images:
                            file.write(make_thumbnail(data).tobytes())
                        end += len(sample.images)
                        starts[rows[sample.row] + 1] = end
            file.flush()
            shape = (end, THUMBNAIL, THUMBNAIL, 3)
            thumbnails = np.memmap(file, np.uint8, "r", shape=shape)
            for number, (first, later) in enumerate(np.searchsorted(samples, pairs).tolist()):
                one, other = (thumbnails[starts[place] : starts[place + 1]] for place in (first, later))
                if len(one) == len(other):
                    differences = np.abs(one.astype(np.int16) - other).mean(axis=(1, 2, 3))
                    alike[number] = bool((differences <= max_difference).all())
        return alike
