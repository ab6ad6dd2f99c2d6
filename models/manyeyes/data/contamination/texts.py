"""Texts that training and a benchmark share: n-grams of words, of each question with its answer.

A benchmark text overlaps a training text that holds at least so large a share of its n-grams. N-grams that many texts
of the benchmark have ("answer with the option's letter ...") say nothing and are left out; a text that has none left
is too short to tell.

Source: n = 13 as in Brown et al., arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

COMMON = 10  # an n-gram of more benchmark texts than these is a phrase of the benchmark
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def hash_ngrams(texts: Sequence[str], *, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all n-grams of words, lower case, without punctuation.

    Args:
        texts: Any number.
        n: Words of an n-gram.

    Returns:
        Hash of each n-gram, and the number of the text that it is in.
    """
    words = [[_hash_word(word) for word in _WORD.findall(text.lower())] for text in texts]
    lengths = np.array([len(line) for line in words], np.int64)
    flat = np.fromiter((word for line in words for word in line), np.uint64, count=int(lengths.sum()))
    owners = np.repeat(np.arange(len(texts)), lengths)
    count = len(flat) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes = hashes * _FACTOR + flat[place : place + count]
    whole = owners[:count] == owners[n - 1 :]
    return hashes[whole], owners[:count][whole]


@lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class TextIndex:
    """A benchmark's texts to look others up in. Memory: about 40 bytes an n-gram.

    Args:
        texts: Each question with its answer.
        n: Words of an n-gram.
        share: Least share of a text's n-grams that one training text must hold.
    """

    def __init__(self, texts: Sequence[str], *, n: int, share: float) -> None:
        self._n = n
        self._share = share
        hashes, owners = hash_ngrams(texts, n=n)
        pairs = np.unique(np.stack([hashes, owners.astype(np.uint64)]), axis=1) if len(hashes) else np.zeros((2, 0))
        grams, first, counts = np.unique(pairs[0], return_index=True, return_counts=True)
        telling = counts <= COMMON
        self._grams = grams[telling].astype(np.uint64)
        self._first = first[telling]
        self._counts = counts[telling]
        self._owners = pairs[1].astype(np.int64)
        of_text = np.repeat(np.arange(len(self._grams)), self._counts)
        members = self._owners[self._first[of_text] + _within(self._counts)]
        self._sizes = np.bincount(members, minlength=len(texts))

    @property
    def too_short(self) -> NDArray[np.bool_]:
        """For each text, whether it has no n-gram that tells anything."""
        short: NDArray[np.bool_] = self._sizes == 0
        return short

    def search(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The pairs that overlap.

        Args:
            texts: Of training.

        Returns:
            Number of the training text, number of the benchmark's text, and the share of its n-grams.
        """
        hashes, owners = hash_ngrams(texts, n=self._n)
        places = np.searchsorted(self._grams, hashes)
        known = places < len(self._grams)
        known[known] = self._grams[places[known]] == hashes[known]
        seen = np.unique(np.stack([owners[known], places[known]]), axis=1)
        counts = self._counts[seen[1]]
        members = self._owners[np.repeat(self._first[seen[1]], counts) + _within(counts)]
        pairs, hits = np.unique(np.stack([np.repeat(seen[0], counts), members]), axis=1, return_counts=True)
        shares = hits / self._sizes[pairs[1]]
        enough = shares >= self._share
        return pairs[0][enough], pairs[1][enough], shares[enough]


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... up to each count, one after another."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
