"""What a reader of one kind promises: units of work that do not depend on who does them.

``plan`` looks at the source once and cuts it into units; ``read`` gives the items of one unit, in any process, as often
as it is asked. So an import is the same on any number of processes, and goes on at the unit where it was stopped.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.importing.places import Place
from manyeyes.data.source_items import ItemRefused, Row
from manyeyes.errors import DataError, did_you_mean


@dataclass(frozen=True)
class ImportUnit:
    """A run of items.

    Attributes:
        first: Place of its first item in the source, from 0.
        items: How many.
        where: What its reader finds it by; plain JSON values.
    """

    first: int
    items: int
    where: dict[str, Any]


@dataclass(frozen=True)
class ImportedItem:
    """One item as the source has it.

    Attributes:
        id: Of the source; None where it gives none.
        row: Its columns; None where it cannot be read.
        refused: Why it cannot be read.
    """

    id: Any
    row: Row | None = None
    refused: ItemRefused | None = None


@dataclass(frozen=True)
class DataFiles:
    """What a reader reads.

    Attributes:
        place: Where its files are.
        names: Of the data files, in order.
        work: A folder of its own for an index.
        items_per_unit: About how many items a unit has.
        split: Which one is read where a source has several.
    """

    place: Place
    names: tuple[str, ...]
    work: Path
    items_per_unit: int
    split: str


class ItemReader(Protocol):
    """Reads one kind."""

    def plan(self, ids: IdIndex) -> Iterator[ImportUnit]:
        """Cut the source into units, in order, and say every item's id.

        Raises:
            DataError: The source is not of this kind, or broken where its items cannot be told apart.
        """

    def read(self, unit: ImportUnit) -> Iterator[ImportedItem]:
        """The items of a unit, in order."""

    def columns(self) -> list[str]:
        """The columns of the first item."""


@dataclass
class IdIndex:
    """Which items bear an id that came before: 8 bytes an item."""

    _hashes: array = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, item_id: Any) -> None:
        """Take the next item's id; None is no id, which nothing repeats."""
        text = text_of_id(item_id)
        name = f"\0{len(self._hashes)}" if text is None else text
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest))

    def repeated(self) -> NDArray[np.int64]:
        """Items whose id an earlier item has, ascending."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        return np.sort(order[1:][same])


def text_of_id(item_id: Any) -> str | None:
    """An id as a text; None for none. Published files have numbers there too."""
    if isinstance(item_id, bool) or not isinstance(item_id, str | int | float) or item_id != item_id:
        return None
    return str(item_id).strip() or None


def require_columns(found: Sequence[str], needed: Sequence[str], *, source: str) -> None:
    """Check that a source has what its row in ``SOURCES`` says.

    Raises:
        DataError: A column is missing; the message names it and what is there.
    """
    for name in needed:
        if name not in found:
            raise DataError(
                f'"{source}" has no column "{name}"; it has {", ".join(found) or "none"}',
                f"the columns {', '.join(needed)}",
                f"{did_you_mean(name, found)}Name the right --source, or leave it out for data in LLaVA's format.",
            )


MakeReader = Callable[[DataFiles], ItemReader]
