"""Parquet in the hub's image struct, and folders that ``datasets`` saved (Arrow).

Rows come a few at a time: a row may hold images of many megabytes.
"""

from __future__ import annotations

import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.importing.places import FolderPlace, Place
from manyeyes.data.importing.reading import DataFiles, IdIndex, ImportedItem, ImportUnit
from manyeyes.errors import DataError

_ROWS_AT_ONCE = 32


class _TableReader(ABC):
    def __init__(self, files: DataFiles) -> None:
        self._files = files

    def columns(self) -> list[str]:
        """The columns of the first file."""
        return list(self._schema(self._files.names[0]).names)

    def read(self, unit: ImportUnit) -> Iterator[ImportedItem]:
        """The rows of a unit."""
        for batch in self._batches(unit):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    yield ImportedItem(row.get("id"), row)

    @abstractmethod
    def _schema(self, name: str) -> pa.Schema:
        """The columns of a file."""

    @abstractmethod
    def _batches(self, unit: ImportUnit) -> Iterator[pa.RecordBatch]:
        """The rows of a unit, some at a time."""


class ParquetReader(_TableReader):
    """Parquet files; a unit is some row groups of one."""

    def plan(self, ids: IdIndex) -> Iterator[ImportUnit]:
        """Row groups together until they have as many rows as asked for."""
        for name in self._files.names:
            with self._open(name) as file:
                groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                has_ids = "id" in file.schema_arrow.names
                first, start = len(ids), 0
                for group, rows in enumerate(groups):
                    _add_ids(file.iter_batches(row_groups=[group], columns=["id"]) if has_ids else [], ids, rows)
                    if len(ids) - first >= self._files.items_per_unit or group == len(groups) - 1:
                        where = {"file": name, "groups": [start, group + 1]}
                        yield ImportUnit(first, len(ids) - first, where)
                        first, start = len(ids), group + 1

    def _schema(self, name: str) -> pa.Schema:
        with self._open(name) as file:
            return file.schema_arrow

    def _batches(self, unit: ImportUnit) -> Iterator[pa.RecordBatch]:
        with self._open(unit.where["file"]) as file:
            groups = range(*unit.where["groups"])
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=list(groups), use_threads=False)

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(_file_of(self._files.place, name), pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise _no_table(name, "Parquet", error) from error


class ArrowReader(_TableReader):
    """Arrow streams, as ``save_to_disk`` writes them; a unit is some batches of one."""

    def plan(self, ids: IdIndex) -> Iterator[ImportUnit]:
        """Batches together until they have as many rows as asked for."""
        for name in self._files.names:
            first, start, number = len(ids), 0, -1
            for number, batch in enumerate(self._stream(name)):
                _add_ids([batch] if "id" in batch.schema.names else [], ids, batch.num_rows)
                if len(ids) - first >= self._files.items_per_unit:
                    yield ImportUnit(first, len(ids) - first, {"file": name, "batches": [start, number + 1]})
                    first, start = len(ids), number + 1
            if len(ids) > first:
                yield ImportUnit(first, len(ids) - first, {"file": name, "batches": [start, number + 1]})

    def _schema(self, name: str) -> pa.Schema:
        return self._stream(name).schema

    def _batches(self, unit: ImportUnit) -> Iterator[pa.RecordBatch]:
        start, end = unit.where["batches"]
        for number, batch in enumerate(self._stream(unit.where["file"])):
            if number >= end:
                return
            if number >= start:
                yield batch

    def _stream(self, name: str) -> pa.ipc.RecordBatchStreamReader:
        try:
            source = _file_of(self._files.place, name)
            # Mapped, so batches that are passed over are not read.
            return pa.ipc.open_stream(pa.memory_map(source) if isinstance(source, str) else source)
        except (pa.ArrowException, OSError) as error:
            raise _no_table(name, "an Arrow stream", error) from error


def list_saved_files(place: Place, *, split: str) -> tuple[str, ...]:
    """The Arrow files of a folder that ``datasets`` saved, in order.

    Args:
        place: The folder.
        split: Which one is read, where the folder has several.

    Raises:
        DataError: No such split, or a description that names no files.
    """
    below = ""
    splits = place.find("dataset_dict.json")
    if splits is not None:
        names = json.loads(splits)["splits"]
        if split not in names:
            raise DataError(
                f'{place.url} has no split "{split}"', f"one of {', '.join(names)}", f"Name one: --split {names[0]}"
            )
        below = f"{split}/"
    state = place.find(f"{below}state.json")
    try:
        named = [entry["filename"] for entry in json.loads(state or b"")["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place.url}/{below}state.json names no files", "a folder of save_to_disk", "Save it again with datasets."
        ) from error
    return tuple(f"{below}{name}" for name in named)


def _file_of(place: Place, name: str) -> Any:
    return posixpath.join(place.url, name) if isinstance(place, FolderPlace) else place.open(name)


def _add_ids(batches: Any, ids: IdIndex, rows: int) -> None:
    before = len(ids)
    for batch in batches:
        for value in batch.column("id").to_pylist():
            ids.add(value)
    while len(ids) < before + rows:
        ids.add(None)


def _no_table(name: str, what: str, error: Exception) -> DataError:
    return DataError(
        f"{name} cannot be read: {str(error).splitlines()[0]}", what, "Fetch it again, or name its --kind."
    )
