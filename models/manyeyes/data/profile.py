"""The profile: one row of facts for each sample of a snapshot, as ``profile.parquet``.

A shard's facts depend on the shard and on the code alone, so they are kept by both digests: a new snapshot is profiled
by reading the shards that changed, and a killed run goes on at the next shard. What depends on other shards (repeated
ids, images of an evaluation set, places in the data set) is put in while the facts of all shards are joined, a batch at
a time. Memory does not grow with the images or texts; 8 bytes a sample and 32 an evaluation image are held.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from manyeyes import drawing
from manyeyes.data import by_column, records, shards
from manyeyes.data.by_column import RowsByColumn, read_by_column
from manyeyes.data.fetching import in_turn
from manyeyes.data.quarantine import row_name
from manyeyes.data.records import (
    PLACEHOLDER,
    Measured,
    Record,
    SampleProblem,
    find_checksum_problem,
    find_drawing_problem,
    find_id_problem,
    find_placeholder_problem,
    find_role_problem,
    measure_image,
    measure_images,
)
from manyeyes.data.shards import RecordReader, as_record, read_id
from manyeyes.data.snapshot import ShardEntry, Snapshot
from manyeyes.errors import RecordError, SnapshotError
from manyeyes.runtime import preprocess
from manyeyes.storage import content_digest, hash_file, new_file

_ROWS = 4_000
"""Samples whose facts are in memory at a time."""
_AT_ONCE = 16  # images a task of a thread: handing over one costs as much as decoding a small one
_MEASURED = 1 << 16
"""Images whose size is remembered, about 300 bytes each: most data sets ask several questions of one image."""
Progress = Callable[[str, float], None]


class FitCheck(Protocol):
    """Says why a recipe cannot train on a record that is whole."""

    def __call__(
        self, record: Record, *, dataset: str, row: int, image_sizes: Sequence[tuple[int, int]]
    ) -> SampleProblem | None:
        """The first thing in the way.

        Args:
            record: The record.
            dataset: Its data set.
            row: Its place there.
            image_sizes: Width and height of each image as decoded, in pixels.
        """
        ...


@dataclass(frozen=True)
class SampleFacts:
    """One row of the profile; the fields are its columns.

    Attributes:
        id: Of the record; ``<data set>#<row>`` where it has none.
        dataset: Its data set in the snapshot.
        row: Its place in the data set, from 0 over all shards in order.
        source: As the record says.
        is_eval: The data set is one that models are judged on.
        n_images: Images of the sample.
        width: Of the first image, in pixels; 0 without images.
        height: Of the first image, in pixels; 0 without images.
        aspect: Longer by shorter side of the first image; 1 without images.
        decode_ok: Every image can be decoded whole, and has its recorded width and height.
        n_turns: Turns, answers included.
        roles_ok: Human speaks first, human and gpt take turns, every question has an answer, no turn is empty.
        n_placeholders: ``<image>`` in all turns.
        placeholders_ok: As many placeholders as images, none in an answer.
        text_chars: Characters of all turns.
        answer_chars: Characters of all answers.
        n_tokens: Tokens of all turns, without chat template; -1 when no tokenizer was given.
        sha256: Of the first image's bytes; empty without images.
        sha256_ok: Every image has its recorded sha256.
        n_eval_images: Images of this sample that an evaluation set has too (exact sha256 of the bytes); 0 in the
            evaluation sets themselves.
        in_eval_set: ``n_eval_images`` is above 0.
        problem: Why the sample cannot be used; empty when it can.
    """

    id: str
    dataset: str
    row: int
    source: str
    is_eval: bool
    n_images: int
    width: int
    height: int
    aspect: float
    decode_ok: bool
    n_turns: int
    roles_ok: bool
    n_placeholders: int
    placeholders_ok: bool
    text_chars: int
    answer_chars: int
    n_tokens: int
    sha256: str
    sha256_ok: bool
    n_eval_images: int
    in_eval_set: bool
    problem: str


PROFILE_COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(SampleFacts))
_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(SampleFacts)])
# What other shards have a say in.
_JOINED = ("dataset", "row", "is_eval", "n_eval_images", "in_eval_set")
_KEPT = pa.schema([*(field for field in SCHEMA if field.name not in _JOINED), ("images", pa.list_(pa.binary(32)))])


def build_profile(
    snapshot: Snapshot,
    datasets: Sequence[str],
    *,
    eval_datasets: Sequence[str],
    tokenizer_path: Path | None = None,
    find_misfit: FitCheck | None = None,
) -> pd.DataFrame:
    """The profile of some data sets as one table in memory; arguments and errors as for ``write_profile``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.parquet"
        write_profile(
            snapshot,
            datasets,
            eval_datasets=eval_datasets,
            out=path,
            tokenizer_path=tokenizer_path,
            find_misfit=find_misfit,
        )
        return pd.read_parquet(path)


def write_profile(
    snapshot: Snapshot,
    datasets: Sequence[str],
    *,
    eval_datasets: Sequence[str],
    out: Path,
    cache_dir: Path | None = None,
    tokenizer_path: Path | None = None,
    find_misfit: FitCheck | None = None,
    misfit_key: str = "",
    progress: Progress | None = None,
) -> None:
    """Look at every sample of some data sets, or take what is known of it.

    The same snapshot gives the same bytes, whatever of it was known.

    Args:
        snapshot: Where they are.
        datasets: Their names; an evaluation set may be among them.
        eval_datasets: Data sets whose images must not be in the others.
        out: The Parquet file to write, one row a sample, in order; the columns are the fields of ``SampleFacts``.
        cache_dir: Where the facts of shards are kept; nowhere when left out.
        tokenizer_path: Folder with a tokenizer, to count tokens.
        find_misfit: Asked of whole records what a recipe's training would refuse.
        misfit_key: All that its answers depend on, beside the record, its place and what the snapshot has of pretrained
            parts; without it, they are not kept.
        progress: Called with a sentence and the share that is done.

    Raises:
        SnapshotError: No such data set, or a shard that is not the manifest's or cannot be read.
        StorageError: No space or no permission.
    """
    names = list(dict.fromkeys([*datasets, *eval_datasets]))
    if cache_dir is None or (find_misfit is not None and not misfit_key):
        folder: Any = tempfile.TemporaryDirectory()
    else:
        folder = nullcontext(cache_dir)
    with folder as kept:
        profiler = _Profiler(
            snapshot,
            Path(kept),
            keep_digests=cache_dir is not None,
            tokenizer_path=tokenizer_path,
            find_misfit=find_misfit,
            misfit_key=misfit_key,
        )
        facts = profiler.read_facts(names, progress=progress or (lambda *_: None))
        known = _images_of(facts, eval_datasets)
        repeated = _repeated_ids(facts, datasets)
        with new_file(out) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for name in dict.fromkeys(datasets):
                is_eval = name in eval_datasets
                for first, batch in _batches(facts[name], _KEPT.names):
                    joined = _join(
                        batch, name, first, is_eval=is_eval, known=frozenset() if is_eval else known, repeated=repeated
                    )
                    writer.write_table(joined)


def profile_shards(
    snapshot: Snapshot,
    shards: Sequence[tuple[str, int]],
    *,
    cache_dir: Path,
    find_misfit: FitCheck | None = None,
    misfit_key: str = "",
    progress: Progress | None = None,
) -> list[Path]:
    """Find what ``write_profile`` asks of some shards, for another machine that is to join what several found.

    Args:
        snapshot: Where they are.
        shards: Data set and number of each.
        cache_dir: Where facts are kept; put into that of ``write_profile``, they are known there.
        find_misfit: As for ``write_profile``.
        misfit_key: As for ``write_profile``.
        progress: Called with a sentence and the share that is done.

    Returns:
        The files of facts.

    Raises:
        SnapshotError: No such data set, or a shard that is not the manifest's or cannot be read.
        StorageError: No space or no permission.
    """
    profiler = _Profiler(
        snapshot, cache_dir, keep_digests=True, tokenizer_path=None, find_misfit=find_misfit, misfit_key=misfit_key
    )
    entries = {name: list(_shards_of(snapshot, name)) for name in dict.fromkeys(name for name, _ in shards)}
    facts = profiler.find(
        [(name, *entries[name][number]) for name, number in shards], progress=progress or (lambda *_: None)
    )
    return [path for of_dataset in facts.values() for _, path in of_dataset]


_Facts = dict[str, list[tuple[int, Path]]]
"""Of each data set, the first row of each shard and the file of its facts."""


def _batches(facts: Sequence[tuple[int, Path]], columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The facts of a data set, some rows at a time, each with the number of its first row."""
    for first, path in facts:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(columns), use_threads=False):
                yield first, pa.Table.from_batches([batch])
                first += batch.num_rows


def _named(ids: pa.ChunkedArray, dataset: str, first: int) -> list[str]:
    return [name if name.strip() else row_name(dataset, row) for row, name in enumerate(ids.to_pylist(), start=first)]


def _images_of(facts: _Facts, datasets: Sequence[str]) -> frozenset[bytes]:
    return frozenset(
        digest
        for name in datasets
        for _, batch in _batches(facts[name], ["images"])
        for digest in pc.list_flatten(batch.column("images")).to_pylist()
    )


def _repeated_ids(facts: _Facts, datasets: Sequence[str]) -> Counter[str]:
    """How often ids occur that occur more than once; only these are held as text."""

    def all_ids() -> Iterator[list[str]]:
        for name in dict.fromkeys(datasets):
            for first, batch in _batches(facts[name], ["id"]):
                yield _named(batch.column("id"), name, first)

    hashes = np.concatenate([np.zeros(0, np.uint64), *map(hash_texts, all_ids())])
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del hashes
    counts: Counter[str] = Counter()
    for names in all_ids() if len(twice) else ():
        counts.update(names[place] for place in np.flatnonzero(np.isin(hash_texts(names), twice)).tolist())
    return Counter({name: count for name, count in counts.items() if count > 1})


def hash_texts(texts: Sequence[str]) -> NDArray[np.uint64]:
    """64 bits of each text; of a million different ones, two share theirs with a probability of 3 in 100 million."""
    hashes: NDArray[np.uint64] = pd.util.hash_array(np.array(texts, object), categorize=False)
    return hashes


def _join(
    batch: pa.Table,
    dataset: str,
    first: int,
    *,
    is_eval: bool,
    known: Collection[bytes],
    repeated: Counter[str],
) -> pa.Table:
    count = len(batch)
    names = _named(batch.column("id"), dataset, first)
    problems = batch.column("problem").to_pylist()
    if repeated:
        for place, name in enumerate(names):
            if not problems[place] and name in repeated:
                problems[place] = f"{repeated[name]} samples have this id"
    shared = np.zeros(count, np.int64)
    if known:
        images = batch.column("images").to_pylist()
        shared[:] = [sum(digest in known for digest in digests) for digests in images]
    columns = {
        "id": pa.array(names, pa.string()),
        "dataset": pa.array([dataset] * count, pa.string()),
        "row": pa.array(np.arange(first, first + count)),
        "is_eval": pa.array(np.full(count, is_eval)),
        "n_eval_images": pa.array(shared),
        "in_eval_set": pa.array(shared > 0),
        "problem": pa.array(problems, pa.string()),
    }
    return pa.table([columns[name] if name in columns else batch.column(name) for name in SCHEMA.names], schema=SCHEMA)


def read_columns(profile: Path, columns: Sequence[str], *, hashed: Collection[str] = ()) -> pd.DataFrame:
    """Columns of a profile in little memory: whole numbers in as few bytes as they need, texts as categories.

    Args:
        profile: As ``write_profile`` makes it.
        columns: Their names; those that it does not have are left out.
        hashed: Columns of text of which ``hash_texts`` is enough.
    """
    parts: dict[str, Any] = {}
    for name in (field.name for field in SCHEMA if field.name in columns):
        if name in hashed:
            with pq.ParquetFile(profile) as file:
                texts = (batch.column(0).to_pylist() for batch in file.iter_batches(_ROWS, columns=[name]))
                parts[name] = np.concatenate([np.zeros(0, np.uint64), *map(hash_texts, texts)])
            continue
        values = pq.read_table(profile, columns=[name], read_dictionary=[name]).column(0)
        if pa.types.is_integer(values.type):
            parts[name] = pd.to_numeric(values.to_numpy(), downcast="integer")
        else:
            parts[name] = values.to_pandas()
    return pd.DataFrame(parts)


def take_rows(profile: Path, rows: Sequence[int], columns: Sequence[str]) -> pd.DataFrame:
    """Some rows of a profile, in their order there.

    Args:
        profile: As ``write_profile`` makes it.
        rows: Their numbers in the profile, from 0.
        columns: Names of columns.
    """
    wanted, parts, first = np.unique(np.array(rows, np.int64)), [SCHEMA.empty_table().select(columns)], 0
    with pq.ParquetFile(profile) as file:
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            inside = wanted[(wanted >= first) & (wanted < end)] - first
            if len(inside):
                parts.append(file.read_row_group(group, columns=list(columns)).take(inside))
            first = end
    found: pd.DataFrame = pa.concat_tables(parts).to_pandas()
    return found


class _Profiler:
    """Makes the facts of shards that are not known."""

    def __init__(
        self,
        snapshot: Snapshot,
        cache_dir: Path,
        *,
        keep_digests: bool,
        tokenizer_path: Path | None,
        find_misfit: FitCheck | None,
        misfit_key: str,
    ) -> None:
        self._snapshot, self._cache_dir, self._find_misfit = snapshot, cache_dir, find_misfit
        self._digest = content_digest if keep_digests else hash_file
        self._count_tokens = None if tokenizer_path is None else partial(_count_tokens, _read_tokenizer(tokenizer_path))
        code = digest_of_code(sys.modules[__name__], by_column, records, shards, drawing, preprocess)
        self._made_with = [code, "" if tokenizer_path is None else content_digest(tokenizer_path)]
        if find_misfit is not None:
            parts = {name: part.files for name, part in snapshot.manifest.pretrained.items()}
            self._made_with.append(json.dumps([misfit_key, parts], sort_keys=True))
        self._measured: OrderedDict[bytes, Measured] = OrderedDict()

    def read_facts(self, datasets: Sequence[str], *, progress: Progress) -> _Facts:
        """The facts of all shards of some data sets."""
        wanted = [(name, first, entry) for name in datasets for first, entry in _shards_of(self._snapshot, name)]
        return {name: [] for name in datasets} | self.find(wanted, progress=progress)

    def find(self, wanted: Sequence[tuple[str, int, ShardEntry]], *, progress: Progress) -> _Facts:
        """The facts of shards; those that are on this disk are checked before any is profiled.

        Args:
            wanted: Of each its data set, its first row there, and its entry in the manifest.
            progress: Called with a sentence and the share that is done.
        """
        for _, _, entry in wanted:
            self._check(entry, required=self._snapshot.remote is None)
        kept = [self._kept(entry, name, first) for name, first, entry in wanted]
        whole = [_is_whole(file, rows=entry.rows) for file, (_, _, entry) in zip(kept, wanted, strict=True)]
        unknown = [
            self._snapshot.path / entry.path for (_, _, entry), done in zip(wanted, whole, strict=True) if not done
        ]
        facts: _Facts = {name: [] for name, _, _ in wanted}
        coming = in_turn(unknown, self._snapshot.on_demand(list(facts)))
        # Decoding lets go of the interpreter lock, so threads help.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for number, (name, first, entry) in enumerate(wanted):
                progress(f"looking at {name}, shard {number + 1} of {len(wanted)}", number / len(wanted))
                if not whole[number]:
                    next(coming)
                    if self._snapshot.remote is not None:
                        self._check(entry, required=True)
                    self._write(kept[number], entry, name, first, pool=pool)
                facts[name].append((first, kept[number]))
        return facts

    def _check(self, entry: ShardEntry, *, required: bool) -> None:
        path = self._snapshot.path / entry.path
        if not required and not path.is_file():
            return
        found = self._digest(path)
        if found != entry.sha256:
            raise SnapshotError(
                f"shard {path} has sha256 {found}",
                f"{entry.sha256}, as the manifest says",
                "Delete the snapshot's folder and run again to fetch it anew, or build it again.",
            )

    def _kept(self, entry: ShardEntry, dataset: str, first: int) -> Path:
        # What a recipe's training refuses depends on the sample's place.
        place = [] if self._find_misfit is None else [dataset, first]
        key = json.dumps([entry.sha256, *self._made_with, *place])
        return self._cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.parquet"

    def _write(self, kept: Path, entry: ShardEntry, dataset: str, first: int, *, pool: ThreadPoolExecutor) -> None:
        path = self._snapshot.path / entry.path
        parts: list[pa.Table] = []
        start = first
        with new_file(kept) as file, pq.ParquetWriter(file, _KEPT, compression="zstd") as writer:
            for group in _read_groups(path):
                parts.append(self._look_at(group, dataset, first, pool=pool))
                first += group.num_rows
                if sum(map(len, parts)) >= _ROWS:
                    writer.write_table(pa.concat_tables(parts).combine_chunks())
                    parts = []
            writer.write_table(pa.concat_tables([_KEPT.empty_table(), *parts]).combine_chunks())
            if first - start != entry.rows:
                raise SnapshotError(
                    f"shard {path} has {first - start:,} records",
                    f"{entry.rows:,}, as the manifest says",
                    "Build it again.",
                )

    def _look_at(self, group: pa.RecordBatch, dataset: str, first: int, *, pool: ThreadPoolExecutor) -> pa.Table:
        rows = read_by_column(group) if self._find_misfit is None else None
        is_sound = np.zeros(group.num_rows, bool) if rows is None else rows.sound.copy()
        records: dict[int, Record | _Unreadable] = {}
        digests: list[list[bytes]] = []
        new: dict[bytes, bytes | memoryview] = {}
        for row in range(group.num_rows):
            images: Sequence[bytes | memoryview]
            if rows is not None and is_sound[row]:
                images = rows.images_of(row)
            else:
                record = records[row] = _read_row(group, row)
                images = [image.data for image in record.images] if isinstance(record, Record) else []
            digests.append([hashlib.sha256(image).digest() for image in images])
            for digest, image in zip(digests[-1], images, strict=True):
                if digest in self._measured:
                    self._measured.move_to_end(digest)
                else:
                    new[digest] = image
        unseen = list(new.values())
        parts = [unseen[start : start + _AT_ONCE] for start in range(0, len(unseen), _AT_ONCE)]
        self._measured.update(zip(new, chain.from_iterable(pool.map(_measure_all, parts)), strict=True))
        for row in np.flatnonzero(is_sound).tolist():
            if rows is not None and not rows.are_as_recorded(
                row, digests[row], [self._measured[digest] for digest in digests[row]]
            ):
                is_sound[row], records[row] = False, _read_row(group, row)
        odd = [
            _without_facts(record)
            if isinstance(record, _Unreadable)
            else self._describe(record, digests[row], dataset=dataset, row=first + row)
            for row, record in sorted(records.items())
        ]
        while len(self._measured) > _MEASURED:
            self._measured.popitem(last=False)
        found = pa.Table.from_pylist(odd, schema=_KEPT)
        if rows is None:
            return found
        places = np.concatenate([np.flatnonzero(is_sound), np.sort(np.array(list(records), np.int64))])
        found = pa.concat_tables([self._describe_sound(group, rows, is_sound, digests), found])
        return found.take(np.argsort(places)) if odd else found

    def _describe_sound(
        self, group: pa.RecordBatch, rows: RowsByColumn, is_sound: NDArray[np.bool_], digests: Sequence[Sequence[bytes]]
    ) -> pa.Table:
        kept = np.flatnonzero(is_sound)
        n_images, width, height = (column[kept] for column in (rows.n_images, *rows.first_sizes()))
        longer, shorter = np.maximum(width, height), np.minimum(width, height)
        yes, count = np.ones(len(kept), bool), self._count_tokens
        columns = {
            "id": group.column("id").take(pa.array(kept)),
            "source": group.column("source").take(pa.array(kept)),
            "n_images": n_images,
            "width": width,
            "height": height,
            "aspect": np.divide(longer, shorter, out=np.ones(len(kept)), where=shorter > 0),
            "decode_ok": yes,
            "n_turns": rows.n_turns[kept],
            "roles_ok": yes,
            "n_placeholders": n_images,
            "placeholders_ok": yes,
            "text_chars": rows.text_chars[kept],
            "answer_chars": rows.answer_chars[kept],
            "n_tokens": [-1 if count is None else sum(map(count, rows.texts_of(row))) for row in kept.tolist()],
            "sha256": [digests[row][0].hex() if digests[row] else "" for row in kept.tolist()],
            "sha256_ok": yes,
            "problem": [""] * len(kept),
            "images": [digests[row] for row in kept.tolist()],
        }
        return pa.table({name: pa.array(columns[name], _KEPT.field(name).type) for name in _KEPT.names}, schema=_KEPT)

    def _describe(self, record: Record, digests: Sequence[bytes], *, dataset: str, row: int) -> dict[str, Any]:
        images, turns = record.images, record.turns
        role_problem = find_role_problem(turns)
        placeholder_problem = find_placeholder_problem(turns, num_images=len(images))
        checksum_problem = find_checksum_problem(images, found=[digest.hex() for digest in digests])
        measured = measure_images(images, found=[self._measured[digest] for digest in digests])
        decoding_problem = measured if isinstance(measured, SampleProblem) else None
        problem = (
            find_id_problem(record.id)
            or role_problem
            or placeholder_problem
            or find_drawing_problem(turns)
            or checksum_problem
            or decoding_problem
        )
        if problem is None and self._find_misfit is not None and not isinstance(measured, SampleProblem):
            problem = self._find_misfit(record, dataset=dataset, row=row, image_sizes=measured)
        width, height = (images[0].width, images[0].height) if images else (0, 0)
        count = self._count_tokens
        return {
            "id": record.id,
            "source": record.source,
            "n_images": len(images),
            "width": width,
            "height": height,
            "aspect": max(width, height) / min(width, height) if width and height else 1.0,
            "decode_ok": decoding_problem is None,
            "n_turns": len(turns),
            "roles_ok": role_problem is None,
            "n_placeholders": sum(turn.text.count(PLACEHOLDER) for turn in turns),
            "placeholders_ok": placeholder_problem is None,
            "text_chars": sum(len(turn.text) for turn in turns),
            "answer_chars": sum(len(turn.text) for turn in turns if turn.speaker == "gpt"),
            "n_tokens": -1 if count is None else sum(count(turn.text) for turn in turns),
            "sha256": digests[0].hex() if digests else "",
            "sha256_ok": checksum_problem is None,
            "problem": "" if problem is None else str(problem),
            "images": digests,
        }


def _shards_of(snapshot: Snapshot, dataset: str) -> Iterator[tuple[int, ShardEntry]]:
    first = 0
    for entry in snapshot.dataset(dataset).shards:
        yield first, entry
        first += entry.rows


def _is_whole(kept: Path, *, rows: int) -> bool:
    with suppress(OSError, pa.ArrowException):
        metadata = pq.read_metadata(kept)
        return bool(metadata.num_rows == rows and metadata.schema.to_arrow_schema().equals(_KEPT))
    return False


@cache
def digest_of_code(*modules: ModuleType) -> str:
    """Of the code that finds something of a shard, and of the library that decodes images.

    Args:
        modules: Where that code is.
    """
    total = hashlib.sha256(f"pillow {version('pillow')}".encode())
    for module in modules:
        total.update(Path(module.__file__ or "").read_bytes())
    return total.hexdigest()


def _read_tokenizer(folder: Path) -> Tokenizer:
    # Transformers takes seconds to import, and most profiles count no tokens.
    from manyeyes.tokenizer_files import load_tokenizer

    backend: Tokenizer = load_tokenizer(folder).backend_tokenizer
    return backend


def _count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class _Unreadable:
    id: str
    problem: str


def _read_groups(path: Path) -> Iterator[pa.RecordBatch]:
    return RecordReader([path]).groups()


def _read_row(group: pa.RecordBatch, row: int) -> Record | _Unreadable:
    try:
        return as_record(group, row)
    except RecordError as error:
        return _Unreadable(id=read_id(group, row), problem=f"{error.found}; needed: {error.needed}")


def _measure_all(images: Sequence[bytes | memoryview]) -> list[Measured]:
    return [measure_image(bytes(data)) for data in images]


def _without_facts(record: _Unreadable) -> dict[str, Any]:
    empty: dict[pa.DataType, object] = {pa.string(): "", pa.int64(): 0, pa.bool_(): False}
    facts = {field.name: empty.get(field.type, []) for field in _KEPT}
    return {**facts, "id": record.id, "aspect": 1.0, "n_tokens": -1, "problem": record.problem}
