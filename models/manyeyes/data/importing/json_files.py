"""JSON lists and JSON Lines, however large: one item in memory at a time, each found by its byte offset.

The parser is the standard library's. It reads a window of the file as Latin-1, in which a character is a byte and the
structure is what it is in UTF-8; so it tells where each item ends in bytes, which parsers that stream events (ijson) do
not. With offsets, units are read in parallel and again.
"""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, BinaryIO

from manyeyes.data.importing.reading import DataFiles, IdIndex, ImportedItem, ImportUnit
from manyeyes.data.source_items import ItemRefused
from manyeyes.errors import DataError

MOST_ITEM_BYTES = 64 * 1024**2
_WINDOW_BYTES = 4 * 1024**2
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
# Files in which somebody's tool wrote line ends inside texts are read too.
_DECODER = json.JSONDecoder(strict=False)


class JsonWindow:
    """A window that moves over a JSON file.

    Args:
        stream: At the first byte to read.
        name: For messages.
        start: Offset of that byte.

    Raises:
        DataError: It is UTF-16.
    """

    def __init__(self, stream: BinaryIO, *, name: str, start: int = 0) -> None:
        self._stream = stream
        self._name = name
        self._text = ""
        self._place = 0
        self._offset = start  # of the window's first byte
        self._ended = False
        self._fill()
        if start == 0:
            head = self._text[:4].encode("latin-1")
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{name} is UTF-16", "JSON in UTF-8", f"Convert it: iconv -f UTF-16 -t UTF-8 {name}")
            self._place = len(_BOM) if head.startswith(_BOM) else 0

    @property
    def offset(self) -> int:
        """Of the next byte."""
        return self._offset + self._place

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None
            self._place = match.end()
            if self._place < len(self._text) or not self._fill():
                return self._text[self._place : self._place + 1]

    def expect(self, character: str, what: str) -> None:
        """Take one character.

        Raises:
            DataError: Another one is there.
        """
        if self.peek() != character:
            raise self.broken(f'needed "{character}" {what}, found "{self.peek() or "the end"}"')
        self._place += 1

    def value(self) -> tuple[str, int]:
        """Take one value.

        Returns:
            Its text, byte for character, and the offset behind it.

        Raises:
            DataError: No JSON value, or one of more than ``MOST_ITEM_BYTES``.
        """
        self.peek()
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                # A value that goes on behind the window looks the same as a broken one.
                if len(self._text) - self._place > MOST_ITEM_BYTES or not self._fill():
                    raise self.broken(str(error).partition(": line")[0]) from error
                continue
            if end < len(self._text) or not self._fill():
                text = self._text[self._place : end]
                self._place = end
                return text, self.offset

    def items(self) -> Iterator[tuple[int, str]]:
        """The items of a list of which ``[`` was taken: offset and text of each.

        Raises:
            DataError: The list is broken.
        """
        if self.peek() == "]":
            self._place += 1
            return
        while True:
            self.peek()
            start = self.offset
            text, _ = self.value()
            yield start, text
            if self.peek() == "]":
                self._place += 1
                return
            self.expect(",", "between items")

    def broken(self, why: str) -> DataError:
        """What to raise where the file is no JSON."""
        return DataError(
            f"{self._name} is broken at byte {self.offset:,}: {why}",
            "whole JSON",
            "Fetch it again, or cut it there; JSON Lines lose one item where a list loses all.",
        )

    def _fill(self) -> bool:
        # As much again as is there: a value of many windows is parsed a few times, not once a window.
        data = self._stream.read(max(_WINDOW_BYTES, len(self._text) - self._place)) if not self._ended else b""
        self._ended = not data
        if data:
            self._text = self._text[self._place :] + data.decode("latin-1")
            self._offset += self._place
            self._place = 0
        return bool(data)


def parse_item(raw: bytes) -> ImportedItem:
    """One item from its bytes. What is no UTF-8 becomes half of a surrogate pair, which no record may hold."""
    try:
        row = json.loads(raw.decode(errors="surrogateescape"), strict=False)
    except (ValueError, RecursionError) as error:
        return ImportedItem(None, refused=ItemRefused("not JSON", f"{error}; needed: a JSON object"))
    if not isinstance(row, dict):
        return ImportedItem(None, refused=ItemRefused("not JSON", "it is no JSON object; needed: { ... }"))
    return ImportedItem(row.get("id"), row)


def _id_of(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(text, strict=False)
        return row.get("id") if isinstance(row, dict) else None
    return None


class _JsonReader(ABC):
    def __init__(self, files: DataFiles) -> None:
        self._files = files

    def columns(self) -> list[str]:
        """The keys of the first item."""
        for name in self._files.names:
            with self._files.place.open(name) as stream:
                for _, raw in self._items(stream, name, 0):
                    return list(parse_item(raw).row or {})
        return []

    def plan(self, ids: IdIndex) -> Iterator[ImportUnit]:
        """Units of as many items as asked for, none over two files."""
        for name in self._files.names:
            first, start = len(ids), -1
            with self._files.place.open(name) as stream:
                for offset, raw in self._items(stream, name, 0):
                    if start < 0:
                        start = offset
                    elif len(ids) - first == self._files.items_per_unit:
                        yield ImportUnit(first, len(ids) - first, {"file": name, "offset": start})
                        first, start = len(ids), offset
                    ids.add(_id_of(raw.decode("latin-1")))
            if len(ids) > first:
                yield ImportUnit(first, len(ids) - first, {"file": name, "offset": start})

    def read(self, unit: ImportUnit) -> Iterator[ImportedItem]:
        """The items of a unit."""
        name, offset = unit.where["file"], unit.where["offset"]
        with self._files.place.open(name) as stream:
            for _, (_, raw) in zip(range(unit.items), self._items(stream, name, offset), strict=False):
                yield parse_item(raw)

    @abstractmethod
    def _items(self, stream: BinaryIO, name: str, offset: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each item from an offset on."""


class JsonListReader(_JsonReader):
    """A list of objects: LLaVA, Mini-Gemini, ShareGPT4V, Eagle."""

    def _items(self, stream: BinaryIO, name: str, offset: int) -> Iterator[tuple[int, bytes]]:
        stream.seek(offset)
        window = JsonWindow(stream, name=name, start=offset)
        if offset == 0:
            window.expect("[", "at the start of a list of samples")
        for start, text in window.items():
            yield start, text.encode("latin-1")
        if window.peek():
            raise window.broken("something follows the list")


class JsonLinesReader(_JsonReader):
    """An object a line: Cambrian."""

    def _items(self, stream: BinaryIO, name: str, offset: int) -> Iterator[tuple[int, bytes]]:
        stream.seek(offset)
        return find_json_lines(stream, name=name, offset=offset)


def find_json_lines(stream: BinaryIO, *, name: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that is not empty; a line of more than ``MOST_ITEM_BYTES`` is cut to no JSON.

    Raises:
        DataError: It is UTF-16.
    """
    while line := stream.readline(MOST_ITEM_BYTES + 1):
        start, offset = offset, offset + len(line)
        if start == 0 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{name} is UTF-16", "JSON in UTF-8", f"Convert it: iconv -f UTF-16 -t UTF-8 {name}")
        if len(line) > MOST_ITEM_BYTES:  # it is refused by its start, which is no JSON
            tail, line = line, line[:80]
            while not tail.endswith(b"\n") and (tail := stream.readline(MOST_ITEM_BYTES)):
                offset += len(tail)
        raw = line.removeprefix(_BOM).strip()
        if raw:
            yield start, raw
