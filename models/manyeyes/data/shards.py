"""Parquet shards: records on disk, written deterministically and read at random.

Columns follow the hub's image struct (``bytes``, ``path``), so ``datasets``, DuckDB and the hub's viewer open a shard
as it is. Row groups are small (100 rows at most), because training reads samples in a shuffled order and a row group
is the least that can be read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manyeyes.data.records import ImageFile, Record, Turn, as_speaker
from manyeyes.errors import RecordError, SnapshotError, StorageError

ROWS_PER_GROUP = 100
# Of what a reader keeps open; with images, a shard has about twenty row groups.
OPEN_SHARDS = 16
OPEN_GROUPS = 1000
ROWS_PER_SHARD = 100_000
BYTES_PER_SHARD = 256 * 1024**2

_FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "source": {"dtype": "string", "_type": "Value"},
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "sha256": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "width": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "height": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "conversations": {
        "feature": {
            "from": {"dtype": "string", "_type": "Value"},
            "value": {"dtype": "string", "_type": "Value"},
        },
        "_type": "List",
    },
}

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("sha256", pa.list_(pa.string())),
        ("width", pa.list_(pa.int32())),
        ("height", pa.list_(pa.int32())),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)

_PROVENANCE = "provenance"
_WITH_PROVENANCE = SCHEMA.append(pa.field(_PROVENANCE, pa.string())).with_metadata(
    {
        "huggingface": json.dumps(
            {"info": {"features": {**_FEATURES, _PROVENANCE: {"dtype": "string", "_type": "Value"}}}}
        )
    }
)
"""Of shards whose records say how they came about."""


class ShardWriter:
    """Writes records into ``<prefix>-00000.parquet``, ``<prefix>-00001.parquet``, ...

    The same records in the same order give the same bytes (with one version of pyarrow, which writes its version into
    each file). A shard appears under its name only when it is whole. Used as a context manager: an error inside leaves
    no half-written shard.

    Args:
        out_dir: Folder for the shards; made when missing.
        prefix: Start of their names; the split, for instance ``train``.
        rows_per_shard: A new shard starts after N records,
        bytes_per_shard: or after N bytes of images.
        provenance: Whether that of the records is kept, in a last column.
    """

    def __init__(
        self,
        out_dir: Path,
        prefix: str,
        *,
        rows_per_shard: int = ROWS_PER_SHARD,
        bytes_per_shard: int = BYTES_PER_SHARD,
        provenance: bool = False,
    ) -> None:
        self.paths: list[Path] = []
        self._schema = _WITH_PROVENANCE if provenance else SCHEMA
        self._out_dir = out_dir
        self._prefix = prefix
        self._rows_per_shard = rows_per_shard
        self._bytes_per_shard = bytes_per_shard
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._shard_rows = 0
        self._shard_bytes = 0
        out_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self._discard()

    def write(self, record: Record) -> None:
        """Add a record. It is not checked here: builders call ``check_record``, validation looks at every sample.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        self._rows.append(_as_row(record))
        self._shard_rows += 1
        self._shard_bytes += sum(len(image.data) for image in record.images)
        if len(self._rows) == ROWS_PER_GROUP:
            self._write_group()
        if self._shard_rows >= self._rows_per_shard or self._shard_bytes >= self._bytes_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        if self._shard_rows:
            self._finish_shard()

    def _partial_path(self) -> Path:
        return self._out_dir / f".{self._prefix}-{len(self.paths):05d}.partial"

    def _write_group(self) -> None:
        if not self._rows:
            return
        try:
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self._partial_path(),
                    self._schema,
                    # Image files are compressed already; zstd would only cost time on them.
                    compression={
                        column: "NONE" if column.startswith("images") else "ZSTD"
                        for column in _column_paths(self._schema)
                    },
                    use_dictionary=["source", "conversations.list.element.from"],
                    write_statistics=["id", "source"],
                    store_schema=True,
                )
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        except OSError as error:
            self._discard()
            raise storage_error(error, self._out_dir) from error
        self._rows = []

    def _finish_shard(self) -> None:
        self._write_group()
        assert self._writer is not None
        partial, path = self._partial_path(), self._out_dir / f"{self._prefix}-{len(self.paths):05d}.parquet"
        try:
            self._writer.close()
            self._writer = None
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            self._discard()
            raise storage_error(error, self._out_dir) from error
        self.paths.append(path)
        self._shard_rows = self._shard_bytes = 0

    def _discard(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            # A full disk refuses the footer too; the file goes away in any case.
            with contextlib.suppress(OSError):
                writer.close()
        self._partial_path().unlink(missing_ok=True)


def write_shards(
    records: Iterable[Record],
    out_dir: Path,
    prefix: str,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    bytes_per_shard: int = BYTES_PER_SHARD,
    provenance: bool = False,
) -> list[Path]:
    """Write records into shards.

    Args:
        records: In the order in which they are stored.
        out_dir: Folder for the shards; made when missing.
        prefix: Start of their names; the split.
        rows_per_shard: A new shard starts after N records,
        bytes_per_shard: or after N bytes of images.
        provenance: Whether that of the records is kept, in a last column.

    Returns:
        The shards, in order.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    with ShardWriter(
        out_dir, prefix, rows_per_shard=rows_per_shard, bytes_per_shard=bytes_per_shard, provenance=provenance
    ) as writer:
        for record in records:
            writer.write(record)
    return writer.paths


class ShardSource(Protocol):
    """Has shards on this disk when they are needed."""

    def ends(self) -> None:
        """Have the footers of all shards at hand."""

    def end(self, path: Path) -> Path | pa.Buffer:
        """A shard, or as much of it as holds its footer."""

    def fetch(self, path: Path) -> None:
        """Return when a shard is on this disk."""

    def fetch_ahead(self, paths: Sequence[Path]) -> None:
        """Fetch shards while this process does something else."""


GroupCache = OrderedDict[tuple[int, int], pa.RecordBatch]
"""Row groups in memory, by their reader and number; the one used last is at the end."""


class RecordReader:
    """Random access to the records of several shards, by row group, with a small cache.

    Args:
        shards: Parquet files, in order; their rows are numbered through.
        cached_groups: How many row groups stay in memory.
        cache: Where they stay, for readers that share the number.
        source: Has the shards where they are needed; None where they are on this disk.

    Raises:
        SnapshotError: A shard is missing, truncated, or has other columns.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        cached_groups: int = 4,
        cache: GroupCache | None = None,
        source: ShardSource | None = None,
    ) -> None:
        self.shards = list(shards)
        self._cached_groups = cached_groups
        self._cache: GroupCache = OrderedDict() if cache is None else cache
        self._source = source
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        # (shard, row group within it, rows) of each row group that has some
        ends = (path if source is None else source.end(path) for path in self.shards)
        lists = map(_list_groups, range(len(self.shards)), self.shards, ends)
        groups = np.concatenate([np.zeros((0, 3), np.int64), *lists])
        self._groups = groups[:, :2].astype(np.int32)
        self._starts = np.cumsum(groups[:, 2]) - groups[:, 2]
        self._rows = int(groups[:, 2].sum())

    def __len__(self) -> int:
        return self._rows

    @property
    def group_starts(self) -> NDArray[np.int64]:
        """First row of each row group; reading in row groups' order costs least."""
        starts: NDArray[np.int64] = self._starts
        return starts

    def read(self, index: int) -> Record:
        """Read one record.

        Args:
            index: From 0 to ``len(self) - 1``.

        Raises:
            IndexError: ``index`` is outside.
            SnapshotError: The shard cannot be read there.
            RecordError: The row's lists of images and their facts differ in length or hold nulls, or a text is not
                UTF-8.
        """
        batch, row = self._find(index)
        return as_record(batch, row)

    def _find(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < self._rows:
            raise IndexError(f"record {index} of {self._rows}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        key = id(self), group
        batch = self._cache.get(key)
        if batch is None:
            batch = self._read_group(group)
            self._cache[key] = batch
            while len(self._cache) > self._cached_groups:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
        return batch, index - int(self._starts[group])

    def __iter__(self) -> Iterator[Record]:
        """All records in order, one row group in memory at a time."""
        for batch in self.groups():
            for row in range(batch.num_rows):
                yield as_record(batch, row)

    def groups(self) -> Iterator[pa.RecordBatch]:
        """All row groups in order, for ``as_record``.

        Raises:
            SnapshotError: A shard cannot be read there.
        """
        return map(self._read_group, range(len(self._groups)))

    def _read_group(self, group: int) -> pa.RecordBatch:
        shard, row_group = self._groups[group].tolist()
        path = self.shards[shard]
        try:
            if shard not in self._open:
                self._make_room(shard)
                self._open[shard] = open_shard(path, self._source)
            file = self._open[shard]
            self._open.move_to_end(shard)
            table = file.read_row_group(row_group, columns=_WITH_PROVENANCE.names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
        return table.combine_chunks().to_batches()[0]

    def shard_of(self, index: int) -> Path:
        """The shard that a record is in.

        Args:
            index: As for ``read``.
        """
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[int(self._groups[group, 0])]

    def _make_room(self, shard: int) -> None:
        # A footer of 1,000 row groups takes 8 MB in memory, and 8 ms to read again.
        groups = np.bincount(self._groups[:, 0], minlength=len(self.shards))
        while self._open and (len(self._open) == OPEN_SHARDS or groups[[shard, *self._open]].sum() > OPEN_GROUPS):
            self._open.popitem(last=False)[1].close()


def open_shard(path: Path, source: ShardSource | None = None) -> pq.ParquetFile:
    """A shard to read; it stays readable when it is deleted meanwhile.

    Args:
        path: The shard.
        source: Has it where it is needed; None where it is on this disk.

    Raises:
        OSError: It cannot be read.
        pyarrow.ArrowException: It is no Parquet file.
        SnapshotError: It cannot be fetched.
    """
    if source is not None:
        source.fetch(path)
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        if source is None:
            raise
        source.fetch(path)  # another process made room meanwhile
        return pq.ParquetFile(path)


def _list_groups(shard: int, path: Path, end: Path | pa.Buffer) -> NDArray[np.int64]:
    metadata = read_shard_metadata(path, end=end)
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.array([(shard, group, count) for group, count in enumerate(rows) if count], np.int64).reshape(-1, 3)


def read_shard_metadata(path: Path, *, end: Path | pa.Buffer | None = None) -> pq.FileMetaData:
    """Footer of a shard, its columns checked.

    Args:
        path: The shard.
        end: As much of it as holds the footer, where it is not on this disk.

    Raises:
        SnapshotError: The shard is missing, truncated, or has other columns.
    """
    try:
        # A footer that was asked for its own ``schema`` stays until the garbage collector comes, 8 MB of it.
        with pq.ParquetFile(pa.BufferReader(end) if isinstance(end, pa.Buffer) else path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except FileNotFoundError as error:
        raise SnapshotError(
            f"shard {path} is missing", "every shard of the manifest", "Get the snapshot again."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if not any(schema.equals(known, check_metadata=False) for known in (SCHEMA, _WITH_PROVENANCE)):
        differing = [
            field.name for field in SCHEMA if field.name not in schema.names or schema.field(field.name) != field
        ]
        extra = [name for name in schema.names if name not in SCHEMA.names]
        raise SnapshotError(
            f"shard {path} has the columns {', '.join(schema.names)}",
            f"the columns of a record; missing or of another type: {', '.join(differing) or 'none'}; "
            f"too many: {', '.join(extra) or 'none'}",
            "Write shards with manyeyes.data.shards.write_shards.",
        )
    return metadata


def has_provenance(path: Path, *, source: ShardSource | None = None) -> bool:
    """Whether a shard keeps the provenance of its records.

    Args:
        path: The shard.
        source: Has it where it is not on this disk.

    Raises:
        SnapshotError: As ``read_shard_metadata``.
    """
    return _PROVENANCE in read_shard_metadata(path, end=None if source is None else source.end(path)).schema.names


def storage_error(error: OSError, where: Path) -> StorageError:
    """The error for a disk that is full or cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"no space left while writing to {where}", "free disk space", "Free some, then run it again."
        )
    return StorageError(f"cannot write to {where}: {error}", "a folder that can be written", "Check its permissions.")


def _unreadable(path: Path, error: Exception) -> SnapshotError:
    size = path.stat().st_size if path.is_file() else 0
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return SnapshotError(
        f"shard {path} ({size} bytes) cannot be read, it is truncated or damaged: {reason}",
        "a whole Parquet file",
        "Delete the materialised snapshot and run again to fetch it anew; if the remote's copy is damaged, push it.",
    )


def _column_paths(schema: pa.Schema) -> list[str]:
    return [
        "id",
        "source",
        "images.list.element.bytes",
        "images.list.element.path",
        "sha256.list.element",
        "width.list.element",
        "height.list.element",
        "conversations.list.element.from",
        "conversations.list.element.value",
        *schema.names[len(SCHEMA) :],
    ]


def _as_row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "source": record.source,
        "images": [{"bytes": image.data, "path": image.path} for image in record.images],
        "sha256": [image.sha256 for image in record.images],
        "width": [image.width for image in record.images],
        "height": [image.height for image in record.images],
        "conversations": [{"from": turn.speaker, "value": turn.text} for turn in record.turns],
        _PROVENANCE: record.provenance,
    }


def read_id(batch: pa.RecordBatch, row: int) -> str:
    """The id of a record that may be unreadable otherwise; empty where there is none.

    Args:
        batch: A row group.
        row: The record's place there.
    """
    try:
        return batch.column("id")[row].as_py() or ""
    except UnicodeDecodeError:
        return ""


def as_record(batch: pa.RecordBatch, row: int) -> Record:
    """One record of a row group.

    Args:
        batch: A row group.
        row: The record's place there.

    Raises:
        RecordError: The row's lists of images and their facts differ in length or hold nulls, or a text is not UTF-8.
    """
    try:
        values = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        raise RecordError("it has text that is not UTF-8", "UTF-8", "Write it anew.") from error
    for name in ("images", "sha256", "width", "height", "conversations"):
        if None in (values[name] or ()):
            raise RecordError(
                f'record "{values["id"] or ""}" has a null in {name}', "a value for each", "Fix it or leave it out."
            )
    facts = [values[name] or [] for name in ("images", "sha256", "width", "height")]
    if len({len(fact) for fact in facts}) != 1:
        counts = ", ".join(str(len(fact)) for fact in facts)
        raise RecordError(
            f'record "{values["id"]}" has {counts} entries in images, sha256, width and height',
            "one entry in each for every image",
            "Write shards with manyeyes.data.shards.write_shards.",
        )
    return Record(
        id=values["id"] or "",
        source=values["source"] or "",
        images=tuple(
            ImageFile(data=image["bytes"] or b"", path=image["path"] or "", sha256=sha256, width=width, height=height)
            for image, sha256, width, height in zip(*facts, strict=True)
        ),
        turns=tuple(
            Turn(speaker=as_speaker(turn["from"] or ""), text=turn["value"] or "")
            for turn in values["conversations"] or ()
        ),
        provenance=values.get(_PROVENANCE) or "",
    )
