"""Mixtures: which sample comes when, as a pure function of seed, epoch and position.

Nothing is drawn from a running random generator: every decision is a hash of what it is about. So a run that was
killed needs only its position to go on with the very samples that it would have seen, on any number of processes, and
the order does not depend on the version of numpy.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.quarantine import rows_of
from manyeyes.data.records import PLACEHOLDER, Record, Turn
from manyeyes.data.shards import GroupCache, RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import DataError, RecordError
from manyeyes.recipe import MixturePart

# LLaVA, arXiv:2304.08485, the instructions for brief image description: one was drawn for each caption of the first
# stage. (Later versions train that stage with template `plain`, which drops the question.)
BRIEF_DESCRIPTION = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)


def ask_briefly(record: Record, *, draw: int) -> Record:
    """The record with a question for a brief description in place of its own, its images in front.

    Args:
        record: One question and its answer, the caption.
        draw: Any number; chooses the question.

    Raises:
        RecordError: More than one question.
    """
    if len(record.turns) != 2:
        raise RecordError(
            f'record "{record.id}" has {len(record.turns)} turns',
            "one question and one answer are needed where a mixture says questions: brief",
            "Say questions: record for its data set.",
        )
    question = BRIEF_DESCRIPTION[draw % len(BRIEF_DESCRIPTION)]
    text = f"{PLACEHOLDER}\n" * len(record.images) + question
    return replace(record, turns=(Turn("human", text), record.turns[1]))


# Samples are shuffled within windows of this many row groups, and the row groups among themselves: reading stays local
# however large a data set is. 64 groups of 100 rows are more than all of easy-VQA, whose shuffle is therefore complete.
WINDOW_GROUPS = 64
_ALGORITHM = "splitmix64-windows-1"
_LEADING = re.compile(rf"^(?:\s*{re.escape(PLACEHOLDER)}\s*)+")


@dataclass(frozen=True)
class Sample:
    """One record as it is shown in one epoch.

    Attributes:
        dataset: Its data set.
        record: The record, as stored; with another question where the mixture draws questions.
        turns: ``independent``: each pair sees the images and itself alone; ``chained``: pairs follow each other.
        image_dropped: Shown without its images and their placeholders.
        order: Order of the question-answer pairs; shuffled for ``chained`` samples whose images all stand in front.
    """

    dataset: str
    record: Record
    turns: Literal["independent", "chained"]
    image_dropped: bool
    order: tuple[int, ...]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Whatever is wrong with this sample inside the block is said of it by data set and id."""
        with _naming(f'record "{self.record.id}"', self.dataset):
            yield

    def conversations(self) -> list[tuple[Turn, ...]]:
        """The conversations to train on, placeholders in their places.

        Returns:
            ``independent``: one conversation a pair, each with all of the record's placeholders in front.
            ``chained``: one conversation with all pairs in ``order``, the placeholders in front of its first question.
            A dropped image leaves no placeholder.

        Raises:
            RecordError: ``independent``, and a placeholder stands elsewhere than in front of the first question.
        """
        turns = self.record.turns
        if self.image_dropped:
            turns = tuple(Turn(turn.speaker, turn.text.replace(PLACEHOLDER, "").strip()) for turn in turns)
        pairs = [(turns[2 * index], turns[2 * index + 1]) for index in self.order]
        if len(pairs) == 1:
            return [pairs[0]]
        prefix = _leading_placeholders(turns)
        if prefix is None:
            if self.turns == "independent":
                raise RecordError(
                    f'record "{self.record.id}" has {PLACEHOLDER} elsewhere than in front of its first question',
                    "images in front, so that each question can be asked alone",
                    "Use turns: chained for its data set.",
                )
            return [tuple(turn for pair in pairs for turn in pair)]
        bare = [(Turn("human", question.text.removeprefix(prefix)), answer) for question, answer in pairs]
        if self.turns == "independent":
            return [(Turn("human", prefix + question.text), answer) for question, answer in bare]
        (first, answer), *rest = bare
        return [(Turn("human", prefix + first.text), answer, *(turn for pair in rest for turn in pair))]


class Mixture:
    """The samples of a stage.

    What is kept is a few numbers a row group (100 records) and one window of positions; of a part with ``max_samples``,
    8 bytes for each sample that was drawn.

    Args:
        parts: Data sets, and how each is shown.
        snapshot: Where they are.
        seed: Another seed gives another order, other dropped images and other draws.
        quarantine: Rows to leave out, as ``row_name`` writes them.
        drawn: By data set the rows to take, ascending, where a stage draws from it; all otherwise.

    Raises:
        SnapshotError: The snapshot lacks a data set, or a shard cannot be read.
        DataError: Nothing is left to train on.
    """

    def __init__(
        self,
        parts: Sequence[MixturePart],
        snapshot: Snapshot,
        *,
        seed: int,
        quarantine: frozenset[str] = frozenset(),
        drawn: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        self._drawn = drawn
        self._parts = tuple(parts)
        self._snapshot = snapshot
        self._seed = seed
        self._quarantine = quarantine
        cache: GroupCache = OrderedDict()  # a window's groups come from all parts
        self._source = snapshot.on_demand([part.dataset for part in self._parts])
        if self._source is not None:
            self._source.warn_of_shuffling()
            self._source.ends()
        self._readers = [
            RecordReader(
                snapshot.shard_paths(part.dataset), cached_groups=WINDOW_GROUPS, cache=cache, source=self._source
            )
            for part in self._parts
        ]
        self._rows = [
            _choose_rows(
                part,
                len(reader),
                number=number,
                seed=seed,
                quarantine=quarantine,
                drawn=None if drawn is None else drawn[part.dataset],
            )
            for number, (part, reader) in enumerate(zip(self._parts, self._readers, strict=True))
        ]
        self._starts = list(itertools.accumulate((len(rows) for rows in self._rows), initial=0))
        self._groups = self._find_groups()
        self._order: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._window: tuple[int, int, NDArray[np.int64]] | None = None
        if not len(self):
            raise DataError(
                f"the mixture of {', '.join(part.dataset for part in self._parts)} has no samples"
                + (f" ({len(quarantine)} are in quarantine)" if quarantine else ""),
                "at least one sample",
                "Look at validation.html for the reasons of the quarantine.",
            )
        self.digest = self._compute_digest(snapshot, quarantine)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the shards itself."""
        again = partial(Mixture, seed=self._seed, quarantine=self._quarantine, drawn=self._drawn)
        return again, (self._parts, self._snapshot)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self._starts[-1]

    def sample(self, epoch: int, index: int) -> Sample:
        """The sample at a position.

        Args:
            epoch: From 0.
            index: Position in the epoch, from 0 to ``len(self) - 1``.

        Raises:
            IndexError: ``index`` is outside.
            RecordError: The row is no record, or the mixture draws questions and the record is no caption.
            SnapshotError: The shard cannot be read there.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, row = self._locate(epoch, index)
        part = self._parts[number]
        with _naming(f"row {row:,}", part.dataset):
            record = self._readers[number].read(row)
        return draw_sample(record, part, number=number, row=row, seed=self._seed, epoch=epoch)

    def _locate(self, epoch: int, index: int) -> tuple[int, int]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, *self._shuffle_groups(epoch))
        _, groups, starts = self._order
        number = int(np.searchsorted(starts, index, side="right")) - 1
        if self._window is None or self._window[:2] != (epoch, number):
            first = number * WINDOW_GROUPS
            self._window = (epoch, number, self._shuffle_samples(epoch, groups[first : first + WINDOW_GROUPS]))
            self._fetch_ahead(groups[first : first + 2 * WINDOW_GROUPS])
        return self._place(int(self._window[2][index - starts[number]]))

    def _place(self, position: int) -> tuple[int, int]:
        """Part and row of a position."""
        part = bisect.bisect_right(self._starts, position) - 1
        return part, self._rows[part][position - self._starts[part]]

    def _fetch_ahead(self, groups: NDArray[np.int64]) -> None:
        if self._source is None:
            return
        firsts = [self._place(int(position)) for position in self._groups[groups, 0]]
        shards = [self._readers[part].shard_of(row) for part, row in firsts]
        self._source.fetch_ahead(list(dict.fromkeys(shards)))

    def _find_groups(self) -> NDArray[np.int64]:
        """First position and length of what is used of each row group, ``[G, 2]``; empty ones left out."""
        found = []
        for rows, reader, start in zip(self._rows, self._readers, self._starts, strict=False):
            bounds = np.append(rows.count_below(reader.group_starts), len(rows))
            lengths = np.diff(bounds)
            found.append(np.stack([start + bounds[:-1], lengths], axis=1)[lengths > 0])
        return np.concatenate(found)

    def _shuffle_groups(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row groups in the order of an epoch, and the first index of each window of them."""
        order = np.argsort(_keys(np.arange(len(self._groups)), self._seed, epoch, "groups"), kind="stable")
        lengths = np.add.reduceat(self._groups[order, 1], np.arange(0, len(order), WINDOW_GROUPS))
        return order, np.cumsum(lengths) - lengths

    def _shuffle_samples(self, epoch: int, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of one window in the order of an epoch."""
        window = np.concatenate([np.arange(first, first + length) for first, length in self._groups[groups]])
        return window[np.argsort(_keys(window, self._seed, epoch, "samples"), kind="stable")]

    def _compute_digest(self, snapshot: Snapshot, quarantine: frozenset[str]) -> str:
        facts = {
            "algorithm": _ALGORITHM,
            "window_groups": WINDOW_GROUPS,
            "seed": self._seed,
            "parts": [part.model_dump(mode="json") for part in self._parts],
            "shards": [[shard.sha256 for shard in snapshot.dataset(part.dataset).shards] for part in self._parts],
            "quarantine": sorted(quarantine),
        }
        if self._drawn is not None:
            rows = {name: hashlib.sha256(rows.tobytes()).hexdigest() for name, rows in self._drawn.items()}
            facts["drawn"] = rows
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def draw_sample(record: Record, part: MixturePart, *, number: int, row: int, seed: int, epoch: int) -> Sample:
    """A record as a mixture shows it in an epoch.

    Args:
        record: The record.
        part: What the mixture says of its data set.
        number: The part's place in the mixture.
        row: The record's place in the data set.
        seed: Of the mixture.
        epoch: From 0.

    Raises:
        RecordError: The mixture draws questions and the record is no caption.
    """
    if part.questions == "brief":
        key = int(_keys(np.asarray([row]), seed, number, epoch, "question")[0])
        with _naming(f'record "{record.id}"', part.dataset):
            record = ask_briefly(record, draw=key)
    pairs = tuple(range(len(record.turns) // 2))
    shuffled = part.turns == "chained" and part.order == "shuffled"
    if shuffled and len(pairs) > 1 and _leading_placeholders(record.turns) is not None:
        keys = _keys(np.arange(len(pairs)), seed, number, epoch, row, "pairs")
        pairs = tuple(int(pair) for pair in np.argsort(keys, kind="stable"))
    dropped = False
    if part.image_dropout > 0 and record.images:
        key = int(_keys(np.asarray([row]), seed, number, epoch, "dropout")[0])
        dropped = key / 2**64 < part.image_dropout
    return Sample(part.dataset, record, part.turns, image_dropped=dropped, order=pairs)


@contextmanager
def _naming(record: str, dataset: str) -> Iterator[None]:
    try:
        yield
    except RecordError as error:
        # Some messages begin with the record's id, and none with its data set.
        said = error.found.removeprefix(record) if error.found.startswith(f"{record} ") else f": {error.found}"
        raise RecordError(f"{record} of {dataset}{said}", error.needed, error.do, retry=error.retry) from error


def _leading_placeholders(turns: Sequence[Turn]) -> str | None:
    """The placeholders in front of the first question, with their white space.

    Returns:
        An empty string when there are no placeholders at all; ``None`` when one stands elsewhere.
    """
    total = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if total == 0:
        return ""
    match = _LEADING.match(turns[0].text)
    if match is None or match.group().count(PLACEHOLDER) != total:
        return None
    return match.group()


class _Rows(Protocol):
    """Rows of a part that are used, ascending."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> int: ...

    def count_below(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many are used that come before each of some rows."""
        ...


class _AllBut:
    """All rows but a few: what is kept are those."""

    def __init__(self, count: int, excluded: NDArray[np.int64]) -> None:
        self._count = count
        self._excluded = excluded
        self._before = excluded - np.arange(len(excluded))  # rows in use before each

    def __len__(self) -> int:
        return self._count - len(self._excluded)

    def __getitem__(self, index: int) -> int:
        return index + int(np.searchsorted(self._before, index, side="right"))

    def count_below(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = rows - np.searchsorted(self._excluded, rows)
        return counts


class _Chosen:
    """Some rows, 8 bytes each."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> int:
        return int(self._rows[index])

    def count_below(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._rows, rows)


def _choose_rows(
    part: MixturePart,
    count: int,
    *,
    number: int,
    seed: int,
    quarantine: frozenset[str],
    drawn: NDArray[np.int64] | None,
) -> _Rows:
    """Rows of a part that are used: without the quarantine, those that are drawn, and at most ``max_samples``."""
    excluded = np.unique(np.array(rows_of(quarantine, part.dataset), np.int64))
    excluded = excluded[(excluded >= 0) & (excluded < count)]
    if drawn is None and (part.max_samples is None or part.max_samples >= count - len(excluded)):
        return _AllBut(count, excluded)
    rows = np.setdiff1d(np.arange(count, dtype=np.int64) if drawn is None else drawn, excluded, assume_unique=True)
    if part.max_samples is None or part.max_samples >= len(rows):
        return _Chosen(rows)
    keys = _keys(rows, seed, number, "choice")
    return _Chosen(np.sort(rows[np.argsort(keys, kind="stable")[: part.max_samples]]))


def _keys(values: NDArray[np.int64], *context: int | str) -> NDArray[np.uint64]:
    """A 64-bit hash of each value in a context (splitmix64's finaliser over a sha256 of the context)."""
    digest = hashlib.sha256(json.dumps(context).encode()).digest()
    offset, salt = np.frombuffer(digest[:16], dtype="<u8")
    with np.errstate(over="ignore"):
        mixed = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + offset
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        keys: NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(31))) ^ salt
    return keys
