"""All pairs of 64-bit hashes within a distance, by multi-index hashing.

A hash is cut into 4 bands of 16 bits. Two hashes that differ in at most 7 bits differ in at most 1 bit in one of the
bands, so each hash of the index is filed, in every band, under its 16 bits and under the 16 keys one bit away; a query
then looks at 4 buckets and at nothing else.

faiss has the same as ``IndexBinaryMultiHash``; these hundred lines save every step a wheel of 30 MB.

Source: Norouzi, Punjani, Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from manyeyes.errors import ShapeError

MAX_RADIUS = 7
_BANDS = 4
_KEYS = 1 << 16
_CANDIDATES = 1 << 18  # a chunk; its arrays stay in the processor's cache
_QUERIES = 1 << 15


class HashIndex:
    """Hashes to look others up in. Memory: 820 bytes a hash.

    Args:
        hashes: ``[N]``, uint64.
        radius: Largest distance of a pair, in bits, at most 7.

    Raises:
        ShapeError: ``radius`` is outside 0 to 7.
    """

    def __init__(self, hashes: NDArray[np.uint64], *, radius: int) -> None:
        if not 0 <= radius <= MAX_RADIUS:
            raise ShapeError(f"radius is {radius}", f"0 to {MAX_RADIUS} bits", "Choose a smaller one.")
        self._radius = radius
        masks = [0] if radius < _BANDS else [0, *(1 << bit for bit in range(16))]
        self._starts: list[NDArray[np.int64]] = []
        self._members: list[NDArray[np.int32]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        for band in range(_BANDS):
            keys = np.concatenate([_key(hashes, band) ^ mask for mask in masks])
            order = np.argsort(keys, kind="stable")
            members = (order % max(len(hashes), 1)).astype(np.int32)
            self._members.append(members)
            self._hashes.append(hashes[members])  # beside each other, so that a bucket is read in one go
            self._starts.append(np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=_KEYS))]))

    def search(self, queries: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """All pairs within the radius.

        Args:
            queries: ``[Q]``, uint64.

        Returns:
            Place of the query, place in the index, and distance of each pair, ordered by query and then by place.
        """
        pieces = [(start, queries[start : start + _QUERIES]) for start in range(0, len(queries), _QUERIES)]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            found = list(pool.map(lambda piece: self._search(*piece), pieces))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
        asked, members, distances = (np.concatenate(column) for column in zip(*found, strict=True))
        return asked, members, distances

    def _search(
        self, start: int, queries: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        parts = [part for band in range(_BANDS) for part in self._search_band(band, queries)]
        asked, members, distances = (np.concatenate(column) for column in zip(*parts, strict=True))
        # A pair that is near in several bands was found several times.
        _, first = np.unique(asked * (1 << 32) + members, return_index=True)
        return asked[first] + start, members[first], distances[first]

    def _search_band(
        self, band: int, queries: NDArray[np.uint64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]]:
        keys = _key(queries, band)
        starts = self._starts[band][keys]
        counts = self._starts[band][keys + 1] - starts
        ends = np.cumsum(counts)
        first = 0
        while first < len(queries):
            done = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, done + _CANDIDATES, side="right")), first + 1)
            asked = np.repeat(np.arange(first, last), counts[first:last])
            within = np.arange(len(asked)) - np.repeat(ends[first:last] - counts[first:last] - done, counts[first:last])
            places = np.repeat(starts[first:last], counts[first:last]) + within
            distances = np.bitwise_count(queries[asked] ^ self._hashes[band][places])
            near = np.flatnonzero(distances <= self._radius)
            yield asked[near], self._members[band][places[near]].astype(np.int64), distances[near]
            first = last


def _key(hashes: NDArray[np.uint64], band: int) -> NDArray[np.int64]:
    return ((hashes >> np.uint64(16 * band)) & np.uint64(_KEYS - 1)).astype(np.int64)
