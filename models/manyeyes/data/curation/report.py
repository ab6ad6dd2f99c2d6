"""What a curation drew and left out: as JSON, as a list of all samples, and what the page is made from.

The list is Parquet: data set, row, id, source, category, whether the sample was drawn, and why not. It is written and
read one shard at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from manyeyes.data.curation.draw import DRAWN, FATES, Draw
from manyeyes.data.curation.recipe import CurationRecipe
from manyeyes.data.snapshot import Snapshot
from manyeyes.pages import Table
from manyeyes.storage import new_file
from manyeyes.strict import StrictModel

# Upper ends of bins; what is beyond is in one of its own.
_CHARS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BINS: dict[str, tuple[str, tuple[int, ...]]] = {
    "question": ("question_chars", _CHARS),
    "answers": ("answer_chars", _CHARS),
    "pairs": ("pairs", (1, 2, 4, 8, 16, 32)),
    "longer side": ("longest", (0, 128, 224, 336, 448, 672, 1024, 2048, 4096)),
}
_EXAMPLES = 3  # of each fate
_DRAWN_EXAMPLES = 12

SAMPLES_SCHEMA = pa.schema(
    [
        ("dataset", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("id", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("category", pa.dictionary(pa.int32(), pa.string())),
        ("drawn", pa.bool_()),
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("detail", pa.string()),
    ]
)


class CuratedInput(StrictModel):
    """One input."""

    md5: str = Field(description="Of the snapshot, as DVC computes it, without .dir.")
    datasets: dict[str, int] = Field(description="Samples of each data set that was drawn from.")


class CuratedSource(StrictModel):
    """What came of the samples of one source."""

    name: str = Field(description="As the records say.")
    category: str = Field(description="As the recipe says.")
    prompt: str | None = Field(description="About the answer's format, put below questions without one.")
    samples: int = Field(ge=0, description="In the inputs.")
    fit: int = Field(ge=0, description="Of them, those that are left before cap, ratio and total.")
    drawn: int = Field(ge=0, description="Of them, those that are in the new data set.")
    left_out: dict[str, int] = Field(description="The others by reason.")


class AnswerMachine(StrictModel):
    """Answers of one word to questions without a word about the format: models learn from them to answer so always."""

    answers: int = Field(ge=0)
    one_word: int = Field(ge=0)

    @property
    def share(self) -> float:
        """In percent of all answers."""
        return 100 * self.one_word / max(self.answers, 1)


class Distribution(StrictModel):
    """How often a quantity is how large, before and after."""

    ends: tuple[int, ...] = Field(description="Upper ends of the bins; the last bin is beyond the last of them.")
    before: tuple[int, ...] = Field(description="Samples of the inputs in each bin.")
    after: tuple[int, ...] = Field(description="Samples drawn.")


class CuratedExample(StrictModel):
    """A sample to look at."""

    dataset: str
    row: int = Field(ge=0, description="Its place in the data set.")
    id: str
    source: str
    reason: str = Field(description="drawn, or why it was left out.")
    detail: str = Field(description="Words about that; empty without.")


class CurationReport(StrictModel):
    """``<name>-curation.json``: what was drawn from where, and what was left out why."""

    format_version: int = Field(default=1, description="Version of this file's format.")
    recipe: CurationRecipe = Field(description="Every default filled in.")
    recipe_digest: str = Field(description="sha256 of the recipe.")
    inputs: tuple[CuratedInput, ...] = Field(description="In the recipe's order.")
    samples: int = Field(ge=0, description="In the inputs.")
    drawn: int = Field(ge=0, description="In the new data set.")
    drawn_digest: str = Field(
        description="sha256 over what is drawn, by content and id, whatever the order of files and rows."
    )
    reasons: dict[str, int] = Field(description="Samples left out, by reason, in the order in which they are asked.")
    sources: tuple[CuratedSource, ...] = Field(description="Largest first.")
    answers_before: AnswerMachine = Field(description="In the inputs.")
    answers_after: AnswerMachine = Field(description="In the new data set, with the recipe's prompts.")
    noun_phrases: tuple[int, int] | None = Field(
        description="Noun phrases of the captions, and those that are frequent enough; null without that filter."
    )
    distributions: dict[str, Distribution] = Field(description="By quantity: characters, pairs, pixels.")
    examples: tuple[CuratedExample, ...] = Field(description="Some samples drawn, and some of each reason.")

    def headline(self) -> str:
        """One line."""
        sources = "one source" if len(self.sources) == 1 else f"{len(self.sources)} sources"
        return f"{self.drawn:,} of {self.samples:,} samples of {sources} drawn"

    def categories(self) -> list[tuple[str, int, int, float, float | None]]:
        """Each category: name, samples, drawn, its percent of what is drawn, and what the recipe wanted."""
        before, after = Counter[str](), Counter[str]()
        for row in self.sources:
            before[row.category] += row.samples
            after[row.category] += row.drawn
        parts = sum(self.recipe.ratio.values())
        return [
            (
                name,
                before[name],
                after[name],
                100 * after[name] / max(self.drawn, 1),
                100 * self.recipe.ratio[name] / parts if name in self.recipe.ratio else None,
            )
            for name in sorted(before, key=lambda name: (-after[name], name))
        ]

    def as_markdown(self) -> str:
        """A short account for a page that shows Markdown."""
        rows = [
            [name, f"{before:,}", f"{after:,}", f"{share:.2f}%", "-" if wanted is None else f"{wanted:.2f}%"]
            for name, before, after, share, wanted in self.categories()
        ]
        table = Table(("category", "samples", "drawn", "share", "wanted"), rows, numbers=(1, 2, 3, 4))
        reasons = Table(
            ("left out", "samples"), [[name, f"{count:,}"] for name, count in self.reasons.items()], numbers=(1,)
        )
        return f"{self.headline()}.\n\n{table.markdown()}\n\n{reasons.markdown()}\n"


@dataclass
class _Sums:
    """What is summed up over shards, by source."""

    fates: Counter[tuple[int, int]] = field(default_factory=Counter)
    answers: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    bins: dict[str, NDArray[np.int64]] = field(
        default_factory=lambda: {name: np.zeros((2, len(ends) + 1), np.int64) for name, (_, ends) in BINS.items()}
    )


def write_samples(drawn: Draw, recipe: CurationRecipe, snapshots: Sequence[Snapshot], *, out: Path) -> CurationReport:
    """Write the list of all samples, and sum up.

    Args:
        drawn: What became of each sample.
        recipe: By which.
        snapshots: One for each of its inputs.
        out: The Parquet file to write.

    Raises:
        StorageError: No space or no permission.
    """
    sums = _Sums()
    specs = [recipe.source(name) for name in drawn.sources]
    prompted = np.array([spec.prompt is not None for spec in specs], bool)
    chosen = _choose_examples(drawn)
    examples: dict[int, CuratedExample] = {}
    hashes: list[NDArray[np.uint64]] = []
    with new_file(out) as file, pq.ParquetWriter(file, SAMPLES_SCHEMA, compression="zstd") as writer:
        for number, path in enumerate(drawn.facts):
            start = int(drawn.first_samples[number])
            with pq.ParquetFile(path) as facts:
                for group in range(facts.num_row_groups):
                    table = facts.read_row_group(group, use_threads=False)
                    rows = np.arange(start, start + len(table))
                    start += len(table)
                    _sum_up(sums, table, drawn.fate[rows], drawn.source[rows], prompted)
                    hashes.append(_hash_pairs(table, drawn.fate[rows]))
                    listed = _list_rows(drawn, recipe, number, rows, table.column("id"))
                    writer.write_table(listed)
                    for sample in chosen & set(rows.tolist()):
                        row = listed.slice(sample - int(rows[0]), 1).to_pylist()[0]
                        del row["category"], row["drawn"]
                        examples[sample] = CuratedExample(**row)
    return CurationReport(
        recipe=recipe,
        recipe_digest=recipe.digest,
        inputs=tuple(
            CuratedInput(md5=snapshot.md5, datasets=_rows_of(drawn, number))
            for number, snapshot in enumerate(snapshots)
        ),
        samples=len(drawn.fate),
        drawn=int((drawn.fate == 0).sum()),
        drawn_digest=_digest(hashes),
        reasons={
            name: count for number, name in enumerate(FATES) if number and (count := int((drawn.fate == number).sum()))
        },
        sources=_describe_sources(drawn, recipe, sums.fates),
        answers_before=AnswerMachine(answers=int(sums.answers[0, 0]), one_word=int(sums.answers[0, 1])),
        answers_after=AnswerMachine(answers=int(sums.answers[1, 0]), one_word=int(sums.answers[1, 1])),
        noun_phrases=drawn.phrases,
        distributions={
            name: Distribution(ends=BINS[name][1], before=tuple(both[0].tolist()), after=tuple(both[1].tolist()))
            for name, both in sums.bins.items()
        },
        examples=tuple(examples[sample] for sample in sorted(chosen, key=lambda s: (drawn.fate[s], drawn.rank[s]))),
    )


def _rows_of(drawn: Draw, snapshot: int) -> dict[str, int]:
    rows: Counter[str] = Counter()
    for shard in drawn.shards:
        if shard.snapshot == snapshot:
            rows[shard.dataset] += shard.rows
    return dict(rows)


def _sum_up(
    sums: _Sums, table: pa.Table, fate: NDArray[np.uint8], source: NDArray[np.int32], prompted: NDArray[np.bool_]
) -> None:
    kinds, counts = np.unique(np.stack([source, fate.astype(np.int32)]), axis=1, return_counts=True)
    for (kind, what), count in zip(kinds.T.tolist(), counts.tolist(), strict=True):
        sums.fates[kind, what] += count
    values = {name: table.column(name).to_numpy() for name in ("pairs", "one_word", *(c for c, _ in BINS.values()))}
    inside = fate == 0
    sums.answers[0] += [int(values["pairs"].sum()), int(values["one_word"].sum())]
    sums.answers[1] += [int(values["pairs"][inside].sum()), int(values["one_word"][inside & ~prompted[source]].sum())]
    for name, (column, ends) in BINS.items():
        places = np.searchsorted(ends, values[column])
        for which, some in enumerate((places, places[inside])):
            sums.bins[name][which] += np.bincount(some, minlength=len(ends) + 1)


def _hash_pairs(table: pa.Table, fate: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.stack([table.column(name).to_numpy()[fate == 0] for name in ("content", "id_hash")], axis=1)


def _digest(parts: Sequence[NDArray[np.uint64]]) -> str:
    pairs = np.concatenate(parts)
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return hashlib.sha256(ordered.astype("<u8").tobytes()).hexdigest()


def _list_rows(
    drawn: Draw, recipe: CurationRecipe, number: int, rows: NDArray[np.int64], ids: pa.ChunkedArray
) -> pa.Table:
    shard = drawn.shards[number]
    source, fate, twins = drawn.source[rows], drawn.fate[rows], drawn.twin[rows]
    of_source = [recipe.category(name) for name in drawn.sources]
    # Each once: of a dictionary with repeated values Arrow 25 writes memory that it never filled into the file.
    categories = list(dict.fromkeys(of_source))
    category = np.array([categories.index(name) for name in of_source], np.int32)[source]
    details = [
        drawn.details.get(sample, f"the same as {drawn.name(twin)}" if twin >= 0 else "")
        for sample, twin in zip(rows.tolist(), twins.tolist(), strict=True)
    ]
    columns: list[Any] = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows), np.int32)), [shard.dataset]),
        pa.array(shard.first_row + rows - int(drawn.first_samples[number])),
        ids,
        pa.DictionaryArray.from_arrays(pa.array(source), pa.array(drawn.sources, pa.string())),
        pa.DictionaryArray.from_arrays(pa.array(category), pa.array(categories, pa.string())),
        pa.array(fate == 0),
        pa.DictionaryArray.from_arrays(pa.array(fate.astype(np.int32)), list(FATES)),
        pa.array(details, pa.string()),
    ]
    return pa.table(columns, schema=SAMPLES_SCHEMA)


def _describe_sources(
    drawn: Draw, recipe: CurationRecipe, fates: Counter[tuple[int, int]]
) -> tuple[CuratedSource, ...]:
    rows = []
    for number, name in enumerate(drawn.sources):
        spec = recipe.source(name)
        counts = {what: fates[number, place] for place, what in enumerate(FATES) if fates[number, place]}
        rows.append(
            CuratedSource(
                name=name,
                category=recipe.category(name),
                prompt=spec.prompt,
                samples=sum(counts.values()),
                fit=sum(counts.get(what, 0) for what in (DRAWN, "cap", "ratio", "total")),
                drawn=counts.pop(DRAWN, 0),
                left_out=counts,
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.samples, row.name)))


def _choose_examples(drawn: Draw) -> set[int]:
    """Of each fate the samples that come first in the draw's order."""
    chosen: set[int] = set()
    for number in range(len(FATES)):
        samples = np.flatnonzero(drawn.fate == number)
        count = min(len(samples), _EXAMPLES if number else _DRAWN_EXAMPLES)
        if count:
            first = np.argpartition(drawn.rank[samples], count - 1)[:count]
            chosen |= set(samples[first].tolist())
    return chosen
