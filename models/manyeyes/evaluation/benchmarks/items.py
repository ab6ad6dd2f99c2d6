"""A benchmark's items on one snapshot: read from Parquet in the hub's schema, images left on disk until asked for."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError, did_you_mean
from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    IMAGES,
    ROW_NUMBER,
    BenchmarkRow,
    CheckedRow,
    Row,
    itself,
    refuse_hidden,
)

MultipleChoice = Literal["generate", "prefill"]
"""Whether an answer is written, or chosen from options after one prefill (``runtime.choosing``)."""

_GROUPS_IN_MEMORY = 4


@dataclass(frozen=True)
class Item:
    """One question that a model answers.

    Attributes:
        id: Stable, unique in the benchmark, for instance ``easy-vqa/test/3#0``.
        record: Number of the Parquet row that it comes from.
        cluster: Image or document; what the item is not independent of.
        image_sha256s: Of the row's images, in order.
        question: As a report shows it.
        prompt: What the model reads.
        reference: What counts as right, as a report shows it.
        answer_type: Part of the benchmark in a report.
        chance: What guessing blindly gets, in [0, 1].
        row: The benchmark's columns without images, for scoring.
        options: What the answer is chosen from after one prefill; empty where it is written.
    """

    id: str
    record: int
    cluster: str
    image_sha256s: tuple[str, ...]
    question: str
    prompt: str
    reference: str
    answer_type: str
    chance: float
    row: Row = field(repr=False)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's items on one snapshot.

    Attributes:
        row: What is asked and how it is scored.
        variant: Whose scoring.
        style: Whose prompt.
        items: The questions that are asked, ordered by record.
        n_total: How many questions there are when ``max_items`` does not cut.
        read_images: The image files of a record, by its number.
        judge: The language model that judges and what it is asked; empty without one.
    """

    row: BenchmarkRow
    variant: str
    style: str
    items: tuple[Item, ...]
    n_total: int
    read_images: Callable[[int], tuple[bytes, ...]] = field(repr=False)
    judge: str = ""

    @property
    def digest(self) -> str:
        """sha256 over scorer, variant, judge and every item's id, images, prompt and columns; equal: same questions.

        Covers the options that answers are chosen from: a choice and a written answer are two questions.
        """
        lines = sorted(
            json.dumps(
                [item.id, item.image_sha256s, item.prompt, item.reference, _digest(item.row)]
                + ([item.options] if item.options else [])
            )
            for item in self.items
        )
        judge = [self.judge] if self.judge else []
        return hashlib.sha256("\n".join([self.row.scorer, self.variant, *judge, *lines]).encode()).hexdigest()

    @property
    def multiple_choice(self) -> MultipleChoice:
        """``prefill`` where answers are chosen, of the items at least that have options; else ``generate``."""
        return "prefill" if any(item.options for item in self.items) else "generate"

    @property
    def question_only_ceiling(self) -> float | None:
        """Percent that the best guess per question text gets on these very items; more, image off, means a leak.

        ``None`` where an item has several right answers or shades of right.
        """
        if not self.row.single_answer:
            return None
        counts: dict[str, dict[str, int]] = {}
        for item in self.items:
            answers = counts.setdefault(item.prompt, {})
            answers[item.reference] = answers.get(item.reference, 0) + 1
        return 100 * sum(max(answers.values()) for answers in counts.values()) / len(self.items)


def load_benchmark(
    row: BenchmarkRow,
    *,
    snapshot: Snapshot,
    max_items: int | None = None,
    variant: str | None = None,
    style: str = "default",
    multiple_choice: MultipleChoice = "generate",
) -> Benchmark:
    """Read a benchmark's questions.

    Args:
        row: The benchmark.
        snapshot: Has the data set.
        max_items: First N questions only; ``None`` for all.
        variant: Whose scoring; the row's default for ``None``.
        style: Whose prompt.
        multiple_choice: ``prefill`` to have answers chosen where the row has options.

    Raises:
        EvaluationError: The data set has no questions, lacks a column, hides an answer, or has two items of one id.
        SnapshotError: The snapshot lacks the data set.
    """
    chosen = row.check_variant(variant)
    reader = RowReader(snapshot.shards(row.dataset), columns=row.columns, name=row.name)
    items: dict[str, Item] = {}
    total = 0
    for number, parquet_row in enumerate(reader):
        if max_items is not None and len(items) >= max_items and row.unfold is itself:
            # No need to read the images of rows that are only counted.
            total = len(reader)
            break
        sha256s: tuple[str, ...] | None = None
        for asked in row.unfold(parquet_row):
            total += 1
            if max_items is not None and len(items) >= max_items:
                continue
            checked = CheckedRow(asked, row.columns, f"{row.name} row {number}")
            refuse_hidden(row, asked, f"{row.name} row {number}")
            if sha256s is None:
                sha256s = tuple(hashlib.sha256(data).hexdigest() for data in row.images(checked))
            chosen_from = row.options if multiple_choice == "prefill" else None
            options = () if chosen_from is None else tuple(chosen_from(checked))
            try:
                item = _item(row, checked, number=number, sha256s=sha256s, style=style, options=options)
            except EvaluationError as error:
                raise checked.placed(error) from error
            if item.id in items:
                raise EvaluationError(
                    f'{row.name} has two items "{item.id}" (rows {items[item.id].record} and {number})',
                    "ids that are unique",
                    "Build the snapshot again.",
                )
            items[item.id] = item
    if not items:
        raise EvaluationError(
            f'data set "{row.dataset}" has no questions', f"{row.name} needs at least one", "Build the snapshot again."
        )

    def read_images(record: int) -> tuple[bytes, ...]:
        return tuple(row.images(row.unfold(reader.read(record))[0]))

    return Benchmark(
        row=row, variant=chosen, style=style, items=tuple(items.values()), n_total=total, read_images=read_images
    )


class RowReader:
    """Reads the rows of Parquet shards as the hub has them, in order or one by number.

    Args:
        shards: In order.
        columns: Columns that must be there.
        name: Of the benchmark, for errors.

    Raises:
        EvaluationError: A column is missing, or a shard is not Parquet.
    """

    def __init__(self, shards: Sequence[Path], *, columns: Mapping[str, str], name: str) -> None:
        self._groups: list[tuple[Path, int, int]] = []
        self._cache: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._columns = [column for column in columns if column != ROW_NUMBER]
        start = 0
        for shard in shards:
            try:
                metadata = pq.read_metadata(shard)
            except (pa.ArrowInvalid, OSError) as error:
                raise EvaluationError(
                    f"{shard} cannot be read as Parquet ({error})", "a whole shard", "Get the snapshot again."
                ) from error
            check_columns(metadata.schema.to_arrow_schema().names, columns, name=name, where=shard.name)
            for group in range(metadata.num_row_groups):
                self._groups.append((shard, group, start))
                start += metadata.row_group(group).num_rows
        self._rows = start

    def __len__(self) -> int:
        """How many rows there are."""
        return self._rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every row in order, with ``row_number``."""
        for index in range(len(self._groups)):
            yield from self._read_group(index)

    def read(self, number: int) -> dict[str, Any]:
        """The row of a number."""
        index = bisect.bisect_right(self._groups, number, key=lambda group: group[2]) - 1
        return self._read_group(index)[number - self._groups[index][2]]

    def _read_group(self, index: int) -> list[dict[str, Any]]:
        if index not in self._cache:
            shard, group, start = self._groups[index]
            with pq.ParquetFile(shard) as file:
                rows = file.read_row_group(group, columns=self._columns, use_threads=False).to_pylist()
            self._cache[index] = [{ROW_NUMBER: start + place, **row} for place, row in enumerate(rows)]
            if len(self._cache) > _GROUPS_IN_MEMORY:
                self._cache.popitem(last=False)
        return self._cache[index]


def check_columns(found: Sequence[str], columns: Mapping[str, str], *, name: str, where: str) -> None:
    """Check that a table has a benchmark's columns.

    Raises:
        EvaluationError: The first column that is missing, with the nearest spelling.
    """
    for column, kind in columns.items():
        if column != ROW_NUMBER and column not in found:
            raise EvaluationError(
                f'{where} has no column "{column}" (it has {", ".join(found)})',
                f'{name} needs "{column}": {kind}',
                f"{did_you_mean(column, found)}Build it again: manyeyes data build {name} OUT",
            )


def without_images(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row's columns but those that hold images; one that holds none says so with ``None`` and stays."""
    return {column: row[column] for column in row if columns.get(column) not in (IMAGE, IMAGES) or row[column] is None}


def _item(
    row: BenchmarkRow, checked: Row, *, number: int, sha256s: tuple[str, ...], style: str, options: tuple[str, ...]
) -> Item:
    values = without_images(checked, row.columns)
    values["id"] = item_id = str(row.item_id(checked))
    return Item(
        id=item_id,
        record=number,
        cluster=row.cluster(values),
        image_sha256s=sha256s,
        question=row.question(checked),
        prompt=row.prompt(checked, style),
        reference=row.reference(checked),
        answer_type=row.group(checked),
        chance=row.chance(checked),
        row=values,
        options=options,
    )


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps(dict(row), sort_keys=True, default=str).encode()).hexdigest()
