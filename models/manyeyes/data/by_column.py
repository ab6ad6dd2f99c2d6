"""Facts of whole row groups, found by column: of rows in which nothing is odd, which are almost all.

Reading a record as Python objects costs more than all that is asked about it. Here a row is sound where what
``manyeyes.data.records`` looks for is surely not there; whoever finds one that is not reads its record and asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manyeyes.data.records import PLACEHOLDER, Measured, SampleProblem
from manyeyes.drawing import REQUEST

# A letter, number or sign that is surely no white space; a text without any is looked at by Python.
_SAYS_SOMETHING = r"[!-~\p{L}\p{N}]"


@dataclass(frozen=True)
class RowsByColumn:
    """The rows of a row group, by column.

    Attributes:
        sound: Of each row, whether its id, turns and placeholders are as they should be, and its images as many as
            the facts about them. Its images are not looked at.
        n_turns: Of each row.
        text_chars: Characters of all turns of each row.
        answer_chars: Characters of its answers.
        texts: Of all turns, row after row.
        first_turn: Of each row the place of its first turn in ``texts``, and the end of the last one's.
        first_image: Of each row the place of its first image in the columns below, and the end of the last one's.
        images: Bytes of all images, row after row.
        sha256: As recorded, of each.
        sizes: ``[images, 2]``, width and height as recorded.
    """

    sound: NDArray[np.bool_]
    n_turns: NDArray[np.int64]
    text_chars: NDArray[np.int64]
    answer_chars: NDArray[np.int64]
    texts: pa.StringArray
    first_turn: NDArray[np.int64]
    first_image: NDArray[np.int64]
    images: Sequence[memoryview]
    sha256: Sequence[str]
    sizes: NDArray[np.int64]

    @property
    def n_images(self) -> NDArray[np.int64]:
        """Of each row."""
        return np.diff(self.first_image)

    def images_of(self, row: int) -> Sequence[memoryview]:
        """Bytes of its images."""
        return self.images[self.first_image[row] : self.first_image[row + 1]]

    def texts_of(self, row: int) -> list[str]:
        """Of its turns."""
        found: list[str] = self.texts[self.first_turn[row] : self.first_turn[row + 1]].to_pylist()
        return found

    def first_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Width and height of each row's first image, as recorded; 0 without images."""
        sizes = np.zeros((len(self.sound), 2), np.int64)
        has_some = self.n_images > 0
        sizes[has_some] = self.sizes[self.first_image[:-1][has_some]]
        return sizes[:, 0], sizes[:, 1]

    def are_as_recorded(self, row: int, digests: Sequence[bytes], measured: Sequence[Measured]) -> bool:
        """Whether a row's images have the recorded sha256s and sizes.

        Args:
            row: The row.
            digests: The sha256 of each of its images.
            measured: What ``measure_image`` says of each.
        """
        return all(
            not isinstance(found, SampleProblem)
            and digest.hex() == self.sha256[place]
            and found[0] == tuple(self.sizes[place].tolist())
            for place, digest, found in zip(
                range(self.first_image[row], self.first_image[row + 1]), digests, measured, strict=True
            )
        )


def read_by_column(batch: pa.RecordBatch) -> RowsByColumn | None:
    """Look at a row group of a shard.

    Args:
        batch: As ``manyeyes.data.shards`` reads it.

    Returns:
        Its rows; None where something is missing in one or a text is not UTF-8, so that each is better read alone.
    """
    ids, images, turns = (batch.column(name) for name in ("id", "images", "conversations"))
    lists = [images, *(batch.column(name) for name in ("sha256", "width", "height"))]
    files, *facts = (pc.list_flatten(column) for column in lists)
    said = pc.list_flatten(turns)
    (data, names), (speakers, texts) = files.flatten(), said.flatten()
    if any(part.null_count for part in (*batch.columns, files, data, names, *facts, said, speakers, texts)):
        return None
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return None
    ends = [_ends(column) for column in lists]
    if any(not np.array_equal(ends[0], other) for other in ends[1:]):
        return None

    turn_ends = _ends(turns)
    n_turns = np.diff(turn_ends)
    asks = (np.arange(turn_ends[-1]) - np.repeat(turn_ends[:-1], n_turns)) % 2 == 0
    marks = _numpy(pc.count_substring(texts, PLACEHOLDER))
    chars = _numpy(pc.utf8_length(texts)).astype(np.int64)
    good = np.where(asks, _numpy(pc.equal(speakers, "human")), _numpy(pc.equal(speakers, "gpt")) & (marks == 0))
    good &= _numpy(pc.match_substring_regex(texts, _SAYS_SOMETHING))
    # Whether an answer can be drawn is asked only where a drawing is asked for.
    good &= ~_numpy(pc.match_substring(texts, REQUEST))
    sound = (n_turns > 0) & (n_turns % 2 == 0) & (_sums(~good, turn_ends) == 0)
    sound &= _sums(marks, turn_ends) == np.diff(ends[0])
    sound &= _numpy(pc.match_substring_regex(ids, _SAYS_SOMETHING))
    return RowsByColumn(
        sound=sound,
        n_turns=n_turns,
        text_chars=_sums(chars, turn_ends),
        answer_chars=_sums(np.where(asks, 0, chars), turn_ends),
        texts=texts,
        first_turn=turn_ends,
        first_image=ends[0],
        images=_views(data),
        sha256=facts[0].to_pylist(),
        sizes=np.stack([_numpy(facts[1]), _numpy(facts[2])], axis=1).astype(np.int64),
    )


def _ends(lists: pa.ListArray) -> NDArray[np.int64]:
    """Where the entries of each row end in the flattened column, with a leading 0."""
    return np.concatenate([[0], np.cumsum(_numpy(pc.list_value_length(lists)))]).astype(np.int64)


def _sums(values: NDArray[Any], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)]).astype(np.int64)
    return totals[ends[1:]] - totals[ends[:-1]]


def _numpy(array: pa.Array) -> NDArray[Any]:
    found: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return found


def _views(array: pa.BinaryArray) -> list[memoryview]:
    """The entries of a column of bytes, not copied."""
    _, places, data = array.buffers()
    if data is None or not len(array):
        return [memoryview(b"")] * len(array)
    ends = np.frombuffer(places, np.int32)[array.offset : array.offset + len(array) + 1].tolist()
    whole = memoryview(data)
    return [whole[start:end] for start, end in pairwise(ends)]
