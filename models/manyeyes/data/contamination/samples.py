"""Samples to compare: images and texts of Parquet rows, in the schema of records or in a benchmark's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.records import PLACEHOLDER
from manyeyes.errors import SnapshotError

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
    path: Path, *, rows: Collection[int] | None = None, images: bool = True, texts: bool = True
) -> Iterator[list[ComparedSample]]:
    """Read a Parquet file, one row group in memory at a time.

    Images are the columns that hold the hub's struct (``bytes``, ``path``), lists of it, or bytes. Texts are the pairs
    of ``conversations``, or ``question`` and ``answer`` under the names that hub data sets give them.

    Args:
        path: The file.
        rows: Only these, by number; row groups without one are not read.
        images: Whether to read them.
        texts: Whether to read them.

    Yields:
        The samples of each row group.

    Raises:
        SnapshotError: Missing, or not a Parquet file.
    """
    try:
        with pq.ParquetFile(path) as file:
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
                    picked = _plain_rows(table.take([row - start for row in wanted]))
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
        raise _unreadable(path, error) from error


def count_rows(path: Path) -> int:
    """Rows of a Parquet file.

    Raises:
        SnapshotError: Missing, or not a Parquet file.
    """
    try:
        rows: int = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    return rows


def _unreadable(path: Path, error: Exception) -> SnapshotError:
    return SnapshotError(
        f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}",
        "a whole Parquet file",
        "Get it again.",
    )


def _plain_rows(table: pa.Table) -> list[dict[str, Any]]:
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
