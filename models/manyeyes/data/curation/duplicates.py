"""Samples that are there twice: the same bytes and words, or images that look the same.

Near duplicates are found as contamination finds them: dHashes within a radius, then the pixels at 64x64. Samples are
looked at in the order in which they are drawn; one is left out where it looks like one that stays. Only those that stay
are compared with, so many that are all alike cost no more than others do. Of many that stay and have the very same hash
(pictures with one layout, all different), the first 256 are compared with.

Thumbnails of samples that have a neighbour lie on the disk. In memory are 8 bytes a sample, and 56 for each that stays
among its neighbours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.contamination.fingerprints import (
    THUMBNAIL,
    HashIndex,
    Wanted,
    make_thumbnail,
    read_samples,
    within,
)
from manyeyes.data.curation.recipe import NearSpec
from manyeyes.data.shards import ShardSource

ONE_HASH = 256
"""Samples that stay and have one hash, with which others are compared."""
_TOGETHER = 4_096
"""Samples that are looked at together; up to so many are compared without an index."""
_FEW = 64  # of a bucket, enough to see that a hash has a neighbour where there are many
_PAIRS = 1 << 20  # of hashes
_COMPARED = 256  # pairs of thumbnails at a time, 24 KiB each
_BLOCKS = 4  # a side: of a thumbnail, the mean colours of 4x4 blocks are compared first


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
        The samples to leave out, and of each the one that stays: the first that it looks like.
    """
    if keys is None:
        keys = np.broadcast_to(np.uint64(0), len(rank))
    order = samples[np.lexsort((rank[samples], keys[samples]))]
    # Only those that share their key with another one, and have a near hash, need be looked at.
    close = np.zeros(len(order), bool)
    for run in _runs(keys[order]):
        close[run] = _have_neighbours(hashes[order[run]], spec.radius)
    order = order[close]
    twins = np.full(len(order), -1, np.int64)
    with images.thumbnails(order, max_difference=spec.max_difference) as looks:
        for run in _runs(keys[order]):
            places = looks.find(order[run])
            found = _find_twins(places, hashes[order[run]], radius=spec.radius, looks=looks)
            twins[run] = np.where(found < 0, -1, found + run.start)
    left_out = np.flatnonzero(twins >= 0)
    return order[left_out], order[twins[left_out]]


def _runs(keys: NDArray[np.uint64]) -> Iterator[slice]:
    """Where the same key stands several times."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True])
    for number in np.flatnonzero(np.diff(starts) > 1).tolist():
        yield slice(int(starts[number]), int(starts[number + 1]))


def _distances(queries: NDArray[np.uint64], members: NDArray[np.uint64]) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = np.bitwise_count(queries[:, None] ^ members)
    return found


def _have_neighbours(hashes: NDArray[np.uint64], radius: int) -> NDArray[np.bool_]:
    """Whether each hash has another one within the radius."""
    different, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    found = counts > 1
    if len(different) <= _TOGETHER:
        for start in range(0, len(different), _PAIRS // _TOGETHER):
            rows = slice(start, start + _PAIRS // _TOGETHER)
            found[rows] |= (_distances(different[rows], different) <= radius).sum(axis=1) > 1
        return found[which]
    index = HashIndex(different, radius=radius, compact=True)
    for most in (_FEW, None):
        asking = np.flatnonzero(~found)

        def see(
            asked: NDArray[np.int64], members: NDArray[np.int64], asking: NDArray[np.int64] = asking
        ) -> NDArray[np.bool_]:
            found[asking[asked[asking[asked] != members]]] = True
            return np.zeros(len(asked), bool)

        index.search(different[asking], wanted=see, most=most)
    return found[which]


def _find_twins(
    members: NDArray[np.int64], hashes: NDArray[np.uint64], *, radius: int, looks: Looks
) -> NDArray[np.int64]:
    """Of each member the place of the first one that stays and that it looks like; -1 where it stays itself.

    Args:
        members: Places of samples in ``looks``, in the order in which they are drawn.
        hashes: Of each.
        radius: Most bits in which hashes differ.
        looks: Compares them.
    """
    twins = np.full(len(members), -1, np.int64)
    _, which = np.unique(hashes, return_inverse=True)
    staying = np.zeros(len(members), np.int64)  # by number of the hash
    stayed = _Stayed(radius)
    for start in range(0, len(members), _TOGETHER):
        batch = np.arange(start, min(start + _TOGETHER, len(members)))

        def may_be(
            asked: NDArray[np.int64], places: NDArray[np.int64], batch: NDArray[np.int64] = batch
        ) -> NDArray[np.bool_]:
            return looks.may_be_alike(members[batch[asked]], members[places])

        asked, places = stayed.search(hashes[batch], may_be)
        alike = looks.are_alike(members[batch[asked]], members[places])
        # The first one wins, so it is written last.
        order = np.argsort(-places[alike], kind="stable")
        twins[batch[asked[alike][order]]] = places[alike][order]
        left = batch[twins[batch] < 0]
        added = []
        while len(left):
            first, left = int(left[0]), left[1:]
            if staying[which[first]] == ONE_HASH:
                continue
            staying[which[first]] += 1
            added.append(first)
            near = np.flatnonzero(np.bitwise_count(hashes[left] ^ hashes[first]) <= radius)
            if len(near):
                one = np.full(len(near), members[first])
                near = near[looks.may_be_alike(one, members[left[near]])]
                near = near[looks.are_alike(one[: len(near)], members[left[near]])]
                twins[left[near]] = first
                left = np.delete(left, near)
        stayed.add(hashes[added], np.array(added, np.int64))
    return twins


class _Stayed:
    """Hashes to look others up in, to which more are added: in parts, of which the last are joined when they are small.

    Args:
        radius: Most bits in which hashes differ.
    """

    def __init__(self, radius: int) -> None:
        self._radius = radius
        self._parts: list[tuple[NDArray[np.uint64], NDArray[np.int64], HashIndex | None]] = []

    def add(self, hashes: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
        """Add hashes, each with its place."""
        while self._parts and len(self._parts[-1][0]) <= 2 * len(hashes):
            others, before, _ = self._parts.pop()
            hashes, places = np.concatenate([others, hashes]), np.concatenate([before, places])
        index = HashIndex(hashes, radius=self._radius, compact=True) if len(hashes) > _TOGETHER else None
        self._parts.append((hashes, places, index))

    def search(self, queries: NDArray[np.uint64], wanted: Wanted) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of queries, and the added ones' own places, of the pairs within the radius that are wanted."""
        asked, found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for hashes, places, index in self._parts:
            if index is not None:
                near, members, _ = index.search(queries, wanted=_at(places, wanted))
                asked.append(near)
                found.append(places[members])
                continue
            step = max(_PAIRS // max(len(hashes), 1), 1)
            for start in range(0, len(queries), step):
                rows, members = np.nonzero(_distances(queries[start : start + step], hashes) <= self._radius)
                kept = wanted(rows + start, places[members])
                asked.append(rows[kept] + start)
                found.append(places[members[kept]])
        return np.concatenate(asked), np.concatenate(found)


def _at(places: NDArray[np.int64], wanted: Wanted) -> Wanted:
    return lambda asked, members: wanted(asked, places[members])


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

    @contextmanager
    def thumbnails(self, samples: NDArray[np.int64], *, max_difference: float) -> Iterator[Looks]:
        """What samples look like, on the disk: 12 KiB an image.

        Args:
            samples: Each once.
            max_difference: Largest mean absolute difference at 64x64, in levels of 255.
        """
        samples = np.sort(samples)
        shard_of = np.searchsorted(self._first_samples, samples, side="right") - 1
        starts, end = np.zeros(len(samples) + 1, np.int64), 0
        with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as means:
            for shard in np.unique(shard_of).tolist():
                places, where = np.flatnonzero(shard_of == shard), self._shards[shard]
                rows = dict(zip((samples[places] - self._first_samples[shard]).tolist(), places.tolist(), strict=True))
                for group in read_samples(where.path, rows=rows.keys(), texts=False, source=where.source):
                    for sample in group:
                        for data in sample.images:
                            thumbnail = make_thumbnail(data)
                            file.write(thumbnail.tobytes())
                            means.write(_mean_colours(thumbnail).tobytes())
                        end += len(sample.images)
                        starts[rows[sample.row] + 1] = end
            file.flush()
            means.flush()
            if not end:
                yield Looks(samples, starts, np.zeros((0, 1), np.uint8), np.zeros((0, 1), np.int16), max_difference)
                return
            yield Looks(
                samples,
                starts,
                np.asarray(np.memmap(file, np.uint8, "r", shape=(end, THUMBNAIL * THUMBNAIL * 3))),
                np.asarray(np.memmap(means, np.int16, "r", shape=(end, _BLOCKS * _BLOCKS * 3))),
                max_difference,
            )


def _mean_colours(thumbnail: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Of each block, rounded down."""
    side = THUMBNAIL // _BLOCKS
    means: NDArray[np.float64] = thumbnail.reshape(_BLOCKS, side, _BLOCKS, side, 3).mean(axis=(1, 3))
    return means.astype(np.int16)


class Looks:
    """What samples look like.

    Args:
        samples: Ascending.
        starts: Number of each one's first image, and of all images at the end.
        thumbnails: ``[images, 12288]``.
        means: Mean colours of blocks, ``[images, 48]``.
        max_difference: Largest mean absolute difference at 64x64, in levels of 255.
    """

    def __init__(
        self,
        samples: NDArray[np.int64],
        starts: NDArray[np.int64],
        thumbnails: NDArray[np.uint8],
        means: NDArray[np.int16],
        max_difference: float,
    ) -> None:
        self._samples, self._starts, self._counts = samples, starts, np.diff(starts)
        self._thumbnails, self._means, self._max_difference = thumbnails, means, max_difference

    def find(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of samples, by which they are compared."""
        return np.searchsorted(self._samples, samples)

    def may_be_alike(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
        """False where two samples cannot be alike: another number of images, or other colours of the first one.

        The mean of differences is never less than the difference of means; two that are rounded down may be one off.

        Args:
            one: Places of samples.
            other: As many.
        """
        maybe: NDArray[np.bool_] = self._counts[one] == self._counts[other]
        here = np.flatnonzero(maybe)
        differences = np.abs(self._means[self._starts[one[here]]] - self._means[self._starts[other[here]]])
        maybe[here] = differences.mean(axis=1) <= self._max_difference + 1
        return maybe

    def are_alike(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each image of a sample looks like the other's.

        Args:
            one: Places of samples.
            other: As many, each with the same number of images.
        """
        counts = self._counts[one]
        firsts, seconds = (np.repeat(self._starts[which], counts) + within(counts) for which in (one, other))
        differs = np.zeros(len(firsts), bool)
        for start in range(0, len(firsts), _COMPARED):
            part = slice(start, start + _COMPARED)
            a, b = self._thumbnails[firsts[part]], self._thumbnails[seconds[part]]
            differences = (np.maximum(a, b) - np.minimum(a, b)).sum(axis=1, dtype=np.uint32)
            differs[part] = differences / a.shape[1] > self._max_difference
        alike: NDArray[np.bool_] = (
            np.bincount(np.repeat(np.arange(len(one)), counts), weights=differs, minlength=len(one)) == 0
        )
        return alike
