"""The quarantine: rows that training leaves out, each with its reason. Every such file has this one writer and reader.

A row is known by its data set and its place in it, from 0 over all shards in order. Ids are for people: a row may have
none, share one, or be too broken to tell it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, ValidationError

from manyeyes.errors import DataError
from manyeyes.storage import new_file
from manyeyes.strict import StrictModel

QUARANTINE_FILE, CONTAMINATED_FILE = "quarantine.jsonl", "contaminated.jsonl"


class QuarantinedSample(StrictModel):
    """One line of ``quarantine.jsonl`` and of ``contaminated.jsonl``."""

    dataset: str = Field(description="Its data set.")
    row: int = Field(
        ge=0,
        description="Its place in the data set, from 0 over all shards: what training goes by. "
        "Of an import, its place in the source.",
    )
    id: str = Field(description="Of the record, for people; <data set>#<row> where it has none.")
    reason: str = Field(description="What was found, and what was needed.")


def row_name(dataset: str, row: int) -> str:
    """A row as a quarantine names it: ``<data set>#<row>``."""
    return f"{dataset}#{row}"


def rows_of(quarantine: Iterable[str], dataset: str) -> list[int]:
    """The rows of one data set in a quarantine."""
    split = (name.rpartition("#") for name in quarantine)
    return [int(row) for owner, _, row in split if owner == dataset]


def write_quarantine(path: Path, samples: Iterable[QuarantinedSample]) -> None:
    """Write the file, all or nothing.

    Raises:
        StorageError: No space or no permission.
    """
    with new_file(path) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(sample.model_dump_json() + "\n" for sample in samples)


def read_quarantine(folder: Path) -> frozenset[str]:
    """Rows that validation put aside, as ``row_name`` writes them: bad ones, and those that an evaluation set has too.

    Args:
        folder: Of ``validate_data``; may lack either file.

    Raises:
        DataError: A file is not of this format.
    """
    names = set()
    for path in (folder / QUARANTINE_FILE, folder / CONTAMINATED_FILE):
        # JSON leaves U+2028, U+0085 and their like as they are: only a newline ends a line.
        for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), start=1):
            if not line:
                continue
            try:
                sample = QuarantinedSample.model_validate_json(line)
            except ValidationError as error:
                raise DataError(
                    f"{path}, line {number}: {error.errors()[0]['msg']}",
                    "data set, row, id and reason of a sample",
                    "Validate the data again.",
                ) from error
            names.add(row_name(sample.dataset, sample.row))
    return frozenset(names)
