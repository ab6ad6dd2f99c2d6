"""The profile: one row of facts per sample, made while streaming over the shards.

Great Expectations has no notion of images or conversations, and wants its whole table in memory. So every sample is
looked at here, one row group in memory at a time, and what the suite then checks are plain columns.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import pandas as pd
from tokenizers import Tokenizer

from manyeyes.data.quarantine import row_name
from manyeyes.data.records import (
    PLACEHOLDER,
    Record,
    SampleProblem,
    find_checksum_problem,
    find_drawing_problem,
    find_id_problem,
    find_placeholder_problem,
    find_role_problem,
    measure_images,
)
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import RecordError

_BATCH = 100


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


def build_profile(
    snapshot: Snapshot,
    datasets: Sequence[str],
    *,
    eval_datasets: Sequence[str],
    tokenizer_path: Path | None = None,
    find_misfit: FitCheck | None = None,
) -> pd.DataFrame:
    """Look at every sample of some data sets.

    Args:
        snapshot: Where they are.
        datasets: Their names; an evaluation set may be among them.
        eval_datasets: Data sets whose images must not be in the others.
        tokenizer_path: Folder with a tokenizer, to count tokens.
        find_misfit: Asked of whole records what a recipe's training would refuse.

    Returns:
        One row a sample, in order; the columns are the fields of ``SampleFacts``.

    Raises:
        SnapshotError: No such data set, or a shard that cannot be read.
    """
    eval_hashes = {
        digest for name in eval_datasets for record in _read_records(snapshot, name) for digest in _hash_images(record)
    }
    tokenizer = None if tokenizer_path is None else _read_tokenizer(tokenizer_path)
    rows: list[SampleFacts] = []
    # Decoding lets go of the interpreter lock, so threads help.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for name in dict.fromkeys(datasets):
            is_eval, first = name in eval_datasets, 0
            look = partial(
                _look_at,
                dataset=name,
                is_eval=is_eval,
                eval_hashes=frozenset() if is_eval else frozenset(eval_hashes),
                count_tokens=None if tokenizer is None else partial(_count_tokens, tokenizer),
                find_misfit=find_misfit,
            )
            for batch in _in_batches(_read_records(snapshot, name)):
                numbers = range(first, first + len(batch))
                rows += pool.map(look, batch, numbers)
                first += len(batch)
    return pd.DataFrame([vars(row) for row in _mark_repeated_ids(rows)], columns=list(PROFILE_COLUMNS))


def _read_tokenizer(folder: Path) -> Tokenizer:
    # Transformers takes seconds to import, and most profiles count no tokens.
    from manyeyes.tokenizer_files import load_tokenizer

    backend: Tokenizer = load_tokenizer(folder).backend_tokenizer
    return backend


def _mark_repeated_ids(rows: list[SampleFacts]) -> Iterator[SampleFacts]:
    counts = Counter(row.id for row in rows)
    for row in rows:
        if counts[row.id] == 1 or row.problem:
            yield row
        else:
            yield SampleFacts(**{**vars(row), "problem": f"{counts[row.id]} samples have this id"})


@dataclass(frozen=True)
class _Unreadable:
    id: str
    problem: str


def _read_records(snapshot: Snapshot, dataset: str) -> Iterator[Record | _Unreadable]:
    reader = RecordReader(snapshot.shards(dataset), cached_groups=1)
    for index in range(len(reader)):
        try:
            yield reader.read(index)
        except RecordError as error:
            yield _Unreadable(id=reader.read_id(index), problem=f"{error.found}; needed: {error.needed}")


def _hash_images(record: Record | _Unreadable) -> list[str]:
    return [] if isinstance(record, _Unreadable) else [sha256(image.data).hexdigest() for image in record.images]


def _in_batches(records: Iterator[Record | _Unreadable]) -> Iterator[list[Record | _Unreadable]]:
    batch: list[Record | _Unreadable] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _look_at(
    record: Record | _Unreadable,
    row: int,
    *,
    dataset: str,
    is_eval: bool,
    eval_hashes: frozenset[str],
    count_tokens: Callable[[str], int] | None,
    find_misfit: FitCheck | None,
) -> SampleFacts:
    name = record.id if record.id.strip() else row_name(dataset, row)
    if isinstance(record, _Unreadable):
        return _without_facts(name, record.problem, dataset=dataset, row=row, is_eval=is_eval)
    images, turns = record.images, record.turns
    hashes = _hash_images(record)
    role_problem = find_role_problem(turns)
    placeholder_problem = find_placeholder_problem(turns, num_images=len(images))
    checksum_problem = find_checksum_problem(images)
    measured = measure_images(images)
    decoding_problem = measured if isinstance(measured, SampleProblem) else None
    problem = (
        find_id_problem(record.id)
        or role_problem
        or placeholder_problem
        or find_drawing_problem(turns)
        or checksum_problem
        or decoding_problem
    )
    if problem is None and find_misfit is not None and not isinstance(measured, SampleProblem):
        problem = find_misfit(record, dataset=dataset, row=row, image_sizes=measured)
    num_contaminated = sum(digest in eval_hashes for digest in hashes)
    width, height = (images[0].width, images[0].height) if images else (0, 0)
    return SampleFacts(
        id=name,
        dataset=dataset,
        row=row,
        source=record.source,
        is_eval=is_eval,
        n_images=len(images),
        width=width,
        height=height,
        aspect=max(width, height) / min(width, height) if width and height else 1.0,
        decode_ok=decoding_problem is None,
        n_turns=len(turns),
        roles_ok=role_problem is None,
        n_placeholders=sum(turn.text.count(PLACEHOLDER) for turn in turns),
        placeholders_ok=placeholder_problem is None,
        text_chars=sum(len(turn.text) for turn in turns),
        answer_chars=sum(len(turn.text) for turn in turns if turn.speaker == "gpt"),
        n_tokens=-1 if count_tokens is None else sum(count_tokens(turn.text) for turn in turns),
        sha256=hashes[0] if hashes else "",
        sha256_ok=checksum_problem is None,
        n_eval_images=num_contaminated,
        in_eval_set=num_contaminated > 0,
        problem="" if problem is None else str(problem),
    )


def _without_facts(name: str, problem: str, *, dataset: str, row: int, is_eval: bool) -> SampleFacts:
    return SampleFacts(
        id=name,
        dataset=dataset,
        row=row,
        source="",
        is_eval=is_eval,
        n_images=0,
        width=0,
        height=0,
        aspect=1.0,
        decode_ok=False,
        n_turns=0,
        roles_ok=False,
        n_placeholders=0,
        placeholders_ok=False,
        text_chars=0,
        answer_chars=0,
        n_tokens=-1,
        sha256="",
        sha256_ok=False,
        n_eval_images=0,
        in_eval_set=False,
        problem=problem,
    )
