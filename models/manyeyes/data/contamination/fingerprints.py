"""Samples to compare, and what is compared before anybody looks at pixels: fingerprints of images, n-grams of texts.

Samples are images and texts of Parquet rows, in the schema of records or in a benchmark's own. A fingerprint is the
sha256 of the file, a difference hash (dHash, 64 bits) of the picture and of its mirror image, and how much there is to
see. They are kept by the sha256 of the shard, so that a killed run goes on at the next shard and another run starts
with what is known.

Of texts, n-grams of words are compared, of each question with its answer. A benchmark text overlaps a training text
that holds at least so large a share of its n-grams. N-grams that many texts of the benchmark have ("answer with the
option's letter ...") say nothing and are left out; a text that has none left is too short to tell.

Source: n = 13 as in Brown et al., arXiv:2005.14165, appendix C.

``HashIndex`` finds all pairs of 64-bit hashes within a distance, by multi-index hashing. A hash is cut into 4 bands of
16 bits. Two hashes that differ in at most 7 bits differ in at most 1 bit in one of the bands, so each hash of the index
is filed, in every band, under its 16 bits and under the 16 keys one bit away; a query then looks at 4 buckets and at
nothing else. Or a hash is filed once in every band, and a query looks at 68 buckets: slower, in a 17th of the memory.

faiss has the same as ``IndexBinaryMultiHash``; these hundred lines save every step a wheel of 30 MB.

Source: Norouzi, Punjani, Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from manyeyes.data.records import PLACEHOLDER
from manyeyes.data.shards import ShardSource, open_shard
from manyeyes.errors import RecordError, ShapeError, SnapshotError
from manyeyes.runtime.preprocess import decode_image
from manyeyes.storage import new_file

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
        members = self._owners[self._first[of_text] + within(self._counts)]
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
        members = self._owners[np.repeat(self._first[seen[1]], counts) + within(counts)]
        pairs, hits = np.unique(np.stack([np.repeat(seen[0], counts), members]), axis=1, return_counts=True)
        shares = hits / self._sizes[pairs[1]]
        enough = shares >= self._share
        return pairs[0][enough], pairs[1][enough], shares[enough]


def within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... up to each count, one after another."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


_IDS = ("id", "question_id", "idx", "index")
_QUESTIONS = ("question", "query", "prompt")
_ANSWERS = ("answer", "answers", "label", "caption")


@dataclass(frozen=True)
class ComparedSample:
    """What is compared of one row.

    Attributes:
        row: Its number in the file.
        id: Its own, or the file's name and ``row`` where it has none; for people.
        images: Image files, in order.
        texts: Each question with its answer.
    """

    row: int
    id: str
    images: tuple[bytes, ...]
    texts: tuple[str, ...]


def read_samples(
    path: Path,
    *,
    rows: Collection[int] | None = None,
    images: bool = True,
    texts: bool = True,
    source: ShardSource | None = None,
) -> Iterator[list[ComparedSample]]:
    """Read a Parquet file, one row group in memory at a time.

    Images are the columns that hold the hub's struct (``bytes``, ``path``), lists of it, or bytes. Texts are the pairs
    of ``conversations``, or ``question`` and ``answer`` under the names that hub data sets give them.

    Args:
        path: The file.
        rows: Only these, by number; row groups without one are not read.
        images: Whether to read them.
        texts: Whether to read them.
        source: Has the file where it is not on this disk.

    Yields:
        The samples of each row group.

    Raises:
        SnapshotError: Missing, or not a Parquet file.
    """
    try:
        with open_shard(path, source) as file:
            schema = file.schema_arrow
            image_columns = [field.name for field in schema if images and _is_image(field.type)]
            text_columns = [
                name for name in ("conversations", *_QUESTIONS, *_ANSWERS) if texts and name in schema.names
            ]
            id_column = next((name for name in _IDS if name in schema.names), None)
            columns = list(dict.fromkeys([*image_columns, *text_columns, *([id_column] if id_column else [])]))
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                wanted = range(start, end) if rows is None else sorted(row for row in rows if start <= row < end)
                if wanted:
                    table = file.read_row_group(group, columns=columns, use_threads=False)
                    picked = plain_rows(table.take([row - start for row in wanted]))
                    yield [
                        ComparedSample(
                            row=row,
                            id=_name(values.get(id_column or ""), default=f"{path.stem}#{row}"),
                            images=tuple(data for name in image_columns for data in _image_files(values[name])),
                            texts=tuple(_pairs(values)),
                        )
                        for row, values in zip(wanted, picked, strict=True)
                    ]
                start = end
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def count_rows(path: Path) -> int:
    """Rows of a Parquet file.

    Raises:
        SnapshotError: Missing, or not a Parquet file.
    """
    try:
        rows: int = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    return rows


def unreadable(path: Path, error: Exception) -> SnapshotError:
    """The error for a file that is no Parquet file."""
    return SnapshotError(
        f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}",
        "a whole Parquet file",
        "Get it again.",
    )


def plain_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as Python values; None for a value with text that is not UTF-8."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except UnicodeDecodeError:
        columns = {name: [_plain(value) for value in table.column(name)] for name in table.column_names}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows


def _plain(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _name(value: Any, *, default: str) -> str:
    name = "" if value is None else str(value)
    return name if name.strip() else default


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_image(kind.value_type)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_files(value: Any) -> Iterator[bytes]:
    for entry in value if isinstance(value, list) else [value]:
        data = entry.get("bytes") if isinstance(entry, Mapping) else entry
        if data:
            yield data


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    conversation = values.get("conversations")
    turns = [_said(turn).replace(PLACEHOLDER, " ") for turn in (conversation if isinstance(conversation, list) else ())]
    yield from (" ".join(turns[place : place + 2]) for place in range(0, len(turns), 2))
    asked = next((values[name] for name in _QUESTIONS if isinstance(values.get(name), str)), None)
    if asked is not None:
        answer = next((values[name] for name in _ANSWERS if values.get(name)), "")
        first = answer[0] if isinstance(answer, list) else answer
        yield f"{asked} {first}" if isinstance(first, str) else asked


def _said(turn: Any) -> str:
    # A benchmark may have a column of this name that holds something else.
    return str(turn.get("value") or "") if isinstance(turn, Mapping) else ""


VERSION = 1
THUMBNAIL = 64

DTYPE = np.dtype(
    [
        ("row", "<u4"),  # in its file
        ("image", "<u2"),  # in its row
        ("sha256", "<u8", (4,)),
        ("hash", "<u8"),
        ("mirrored", "<u8"),
        ("entropy", "<f4"),  # bits; -1 for a file that cannot be decoded
    ]
)


def make_thumbnail(data: bytes) -> NDArray[np.uint8]:
    """The picture at 64x64, each pixel the mean of its part, whatever the aspect ratio.

    Returns:
        ``[64, 64, 3]``, RGB.

    Raises:
        RecordError: It cannot be decoded.
    """
    image = Image.fromarray(decode_image(data))
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def hash_differences(grey: NDArray[np.uint8]) -> tuple[int, int]:
    """The dHash of a picture and of its mirror image.

    Args:
        grey: ``[8, 9]``.

    Returns:
        Two times 64 bits: whether a cell is brighter than the one on its left, row by row.
    """

    def bits(cells: NDArray[np.uint8]) -> int:
        return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")

    return bits(grey), bits(grey[:, ::-1])


def measure_entropy(thumbnail: NDArray[np.uint8]) -> float:
    """Bits a pixel that the grey levels of a thumbnail hold: 0 for one colour, 8 for every level equally often."""
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"))
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def fingerprints_path(cache_dir: Path, *, sha256: str) -> Path:
    """Where the fingerprints of a file are kept; arguments as for ``fingerprint_shard``."""
    return cache_dir / f"{sha256}-v{VERSION}.npy"


def fingerprint_shard(
    path: Path, *, sha256: str, cache_dir: Path, source: ShardSource | None = None
) -> NDArray[np.void]:
    """Fingerprints of all images of a Parquet file, from the cache where they are known.

    An image that several samples have is decoded once. Memory: one row group of images, 62 bytes an image, and about
    300 a different one.

    Args:
        path: The file.
        sha256: Of the file; the cache's key.
        cache_dir: Folder of the cache; made when missing.
        source: Has the file where it is not on this disk.

    Returns:
        One ``DTYPE`` row an image, in the file's order.

    Raises:
        SnapshotError: Not a Parquet file.
        StorageError: No space or no permission for the cache.
    """
    kept = fingerprints_path(cache_dir, sha256=sha256)
    if kept.is_file():
        known: NDArray[np.void] = np.load(kept)
        return known
    parts: list[NDArray[np.void]] = []
    seen: dict[bytes, tuple[int, int, float]] = {}
    # Decoding lets go of the interpreter lock, so threads help.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for group in read_samples(path, texts=False, source=source):
            places = [(sample.row, number) for sample in group for number in range(len(sample.images))]
            files = [data for sample in group for data in sample.images]
            rows = np.zeros(len(files), DTYPE)
            rows["row"], rows["image"] = [row for row, _ in places], [number for _, number in places]
            digests = [hashlib.sha256(data).digest() for data in files]
            new = {digest: data for digest, data in zip(digests, files, strict=True) if digest not in seen}
            seen.update(zip(new, pool.map(_look_at, new.values()), strict=True))
            for place, digest in enumerate(digests):
                rows["sha256"][place] = np.frombuffer(digest, "<u8")
                rows["hash"][place], rows["mirrored"][place], rows["entropy"][place] = seen[digest]
            parts.append(rows)
    found = np.concatenate(parts) if parts else np.zeros(0, DTYPE)
    with new_file(kept) as file, file.open("wb") as stream:
        np.save(stream, found)
    return found


def _look_at(data: bytes) -> tuple[int, int, float]:
    try:
        image = Image.fromarray(decode_image(data))
    except RecordError:
        return 0, 0, -1.0
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return *hash_differences(grey), measure_entropy(thumbnail)


MAX_RADIUS = 7
_BANDS = 4
_KEYS = 1 << 16
_CANDIDATES = 1 << 18  # a chunk; its arrays stay in the processor's cache
_QUERIES = 1 << 15
_EVERY = 1 << 62
Wanted = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]


class HashIndex:
    """Hashes to look others up in. Memory: 820 bytes a hash; 56 where it is compact.

    Args:
        hashes: ``[N]``, uint64.
        radius: Largest distance of a pair, in bits, at most 7.
        compact: Whether queries look in more places, instead of hashes being filed in more.

    Raises:
        ShapeError: ``radius`` is outside 0 to 7.
    """

    def __init__(self, hashes: NDArray[np.uint64], *, radius: int, compact: bool = False) -> None:
        if not 0 <= radius <= MAX_RADIUS:
            raise ShapeError(f"radius is {radius}", f"0 to {MAX_RADIUS} bits", "Choose a smaller one.")
        self._radius = radius
        every = [0] if radius < _BANDS else [0, *(1 << bit for bit in range(16))]
        masks, asked = ([0], every) if compact else (every, [0])
        self._asked_masks = np.array(asked, np.int64)
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

    def search(
        self, queries: NDArray[np.uint64], *, wanted: Wanted | None = None, most: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """All pairs within the radius.

        Args:
            queries: ``[Q]``, uint64.
            wanted: Says of places of queries and places in the index which pairs are; some thousand at a time, those
                within the radius, a pair several times. All when left out.
            most: Hashes of a bucket that are looked at; all when left out.

        Returns:
            Place of the query, place in the index, and distance of each pair, ordered by query and then by place.
        """
        pieces = [(start, queries[start : start + _QUERIES]) for start in range(0, len(queries), _QUERIES)]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            found = list(pool.map(lambda piece: self._search(*piece, wanted=wanted, most=most), pieces))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
        asked, members, distances = (np.concatenate(column) for column in zip(*found, strict=True))
        return asked, members, distances

    def _search(
        self, start: int, queries: NDArray[np.uint64], *, wanted: Wanted | None, most: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        parts = []
        for band in range(_BANDS):
            for asked, members, distances in self._search_band(band, queries, most):
                kept = slice(None) if wanted is None else wanted(asked + start, members)
                parts.append((asked[kept], members[kept], distances[kept]))
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
        asked, members, distances = (np.concatenate(column) for column in zip(*parts, strict=True))
        # A pair that is near in several bands was found several times.
        _, first = np.unique(asked * (1 << 32) + members, return_index=True)
        return asked[first] + start, members[first], distances[first]

    def _search_band(
        self, band: int, queries: NDArray[np.uint64], most: int | None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]]:
        keys = (_key(queries, band)[:, None] ^ self._asked_masks).ravel()
        starts = self._starts[band][keys]
        counts = np.minimum(self._starts[band][keys + 1] - starts, _EVERY if most is None else most)
        looked_up = np.flatnonzero(counts)
        starts, counts = starts[looked_up], counts[looked_up]
        which = looked_up // len(self._asked_masks)
        ends = np.cumsum(counts)
        first = 0
        while first < len(which):
            done = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, done + _CANDIDATES, side="right")), first + 1)
            asked = np.repeat(which[first:last], counts[first:last])
            places = np.repeat(starts[first:last], counts[first:last]) + within(counts[first:last])
            distances = np.bitwise_count(queries[asked] ^ self._hashes[band][places])
            near = np.flatnonzero(distances <= self._radius)
            yield asked[near], self._members[band][places[near]].astype(np.int64), distances[near]
            first = last


def _key(hashes: NDArray[np.uint64], band: int) -> NDArray[np.int64]:
    return ((hashes >> np.uint64(16 * band)) & np.uint64(_KEYS - 1)).astype(np.int64)
