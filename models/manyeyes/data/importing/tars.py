"""WebDataset: tar files in which the files of one sample follow each other and share their name up to its first dot."""

from __future__ import annotations

import itertools
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from manyeyes.data.importing.places import IMAGE_SUFFIXES
from manyeyes.data.importing.reading import DataFiles, IdIndex, ImportedItem, ImportUnit
from manyeyes.data.source_items import ItemRefused
from manyeyes.errors import DataError

_CAPTIONS = ("txt", "caption", "cap", "text")
# Of one file: more is refused before it is read.
_MOST_BYTES = 256 * 1024**2


class TarReader:
    """Tar files; a unit is a run of samples of one, a compressed one is a unit as a whole.

    Args:
        files: What to read.
    """

    def __init__(self, files: DataFiles) -> None:
        self._files = files

    def columns(self) -> list[str]:
        """What the first sample has."""
        for name in self._files.names:
            for item in self.read(ImportUnit(0, 1, {"file": name, "offset": 0})):
                return list(item.row or {})
        return []

    def plan(self, ids: IdIndex) -> Iterator[ImportUnit]:
        """Runs of samples; headers alone are read, contents are passed over."""
        for name in self._files.names:
            cut = not name.lower().endswith(("gz", "bz2", "xz", "zst"))
            first, start = len(ids), 0
            with self._open(name, 0) as tar:
                for key, members in _samples(tar):
                    offset = next(members).offset
                    if cut and len(ids) - first == self._files.items_per_unit:
                        yield ImportUnit(first, len(ids) - first, {"file": name, "offset": start})
                        first, start = len(ids), offset
                    ids.add(self._item_id(name, key))
            if len(ids) > first:
                yield ImportUnit(first, len(ids) - first, {"file": name, "offset": start})

    def read(self, unit: ImportUnit) -> Iterator[ImportedItem]:
        """The samples of a unit."""
        name = unit.where["file"]
        with self._open(name, unit.where["offset"]) as tar:
            for key, members in itertools.islice(_samples(tar), unit.items):
                item_id = self._item_id(name, key)
                try:
                    yield ImportedItem(item_id, _read_sample(tar, members))
                except ItemRefused as refused:
                    yield ImportedItem(item_id, refused=refused)

    def _item_id(self, name: str, key: str) -> str:
        return f"{name.partition('.tar')[0]}/{key}" if len(self._files.names) > 1 else key

    @contextmanager
    def _open(self, name: str, offset: int) -> Iterator[tarfile.TarFile]:
        # From any header on a tar file is a tar file.
        mode: Literal["r:*", "r:"] = "r:*" if offset == 0 else "r:"
        with self._files.place.open(name) as stream:
            stream.seek(offset)
            try:
                with tarfile.open(fileobj=stream, mode=mode, errors="surrogateescape") as tar:
                    yield tar
            except (tarfile.TarError, EOFError, zlib.error) as error:
                raise DataError(f"{name} is broken: {error}", "a whole tar file", "Fetch it again.") from error


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, Iterator[tarfile.TarInfo]]]:
    def files() -> Iterator[tarfile.TarInfo]:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # it would keep them all
            if member.isfile() and not posixpath.basename(member.name).startswith("."):
                yield member

    return itertools.groupby(files(), key=lambda member: _split_name(member.name)[0])


def _split_name(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _read_sample(tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    images = []
    for member in members:
        suffix = _split_name(member.name)[1]
        if member.size > _MOST_BYTES:
            raise ItemRefused("too large", f"{member.name} has {member.size:,} bytes; needed: {_MOST_BYTES:,} at most")
        if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            images.append({"bytes": _content(tar, member), "path": member.name})
        elif suffix in _CAPTIONS:
            row["caption"] = _content(tar, member).decode(errors="surrogateescape")
        elif suffix == "json":
            try:
                found = json.loads(_content(tar, member).decode(errors="surrogateescape"), strict=False)
            except (ValueError, RecursionError) as error:
                raise ItemRefused("not JSON", f"{member.name}: {error}; needed: a JSON object") from error
            row = {**(found if isinstance(found, dict) else {}), **row}
    return {**row, "image": images}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    with file:
        data = file.read()
    if len(data) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data
