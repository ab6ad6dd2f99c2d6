"""``curate``: from a recipe and snapshots to a new data set, with reasons and a page.

Three passes: facts of each shard (kept by the shard's sha256), the draw in memory, and the copy of what is drawn. Each
goes on where it was when it was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.curation.draw import Draw, Progress, draw_mixture
from manyeyes.data.curation.facts import has_format_prompt
from manyeyes.data.curation.gathering import shards_in_turn
from manyeyes.data.curation.page import render_curation
from manyeyes.data.curation.recipe import CurationRecipe
from manyeyes.data.curation.report import CurationReport, write_samples
from manyeyes.data.diff import open_version
from manyeyes.data.records import Record
from manyeyes.data.shards import (
    BYTES_PER_SHARD,
    ROWS_PER_SHARD,
    RecordReader,
    ShardWriter,
    has_provenance,
    read_shard_metadata,
)
from manyeyes.data.snapshot import Snapshot
from manyeyes.data.sources_table import add_answer_format, choose_sentence
from manyeyes.errors import DataError, RecipeError, StorageError
from manyeyes.storage import file_lock, replaceable, storage_errors, write_file

SPLIT = "train"


def open_inputs(recipe: CurationRecipe, *, snapshot: str = "", remote: str = "") -> list[Snapshot]:
    """The snapshots of a recipe's inputs, each opened once.

    Args:
        recipe: Names them as ``open_version`` takes them.
        snapshot: That of inputs which name none.
        remote: Where those are that are no folders, as ``open_version`` takes it.

    Raises:
        RecipeError: An input names none, and none is given.
        SnapshotError: No such snapshot, or its remote does not answer (``retry``).
    """
    opened: dict[str, Snapshot] = {}
    for number, spec in enumerate(recipe.inputs):
        if not (name := spec.snapshot or snapshot):
            raise RecipeError(
                f"inputs.{number}.snapshot is missing",
                "a snapshot's folder, .dvc file or md5",
                "Add it, or give --snapshot.",
            )
        if name not in opened:
            opened[name] = open_version(name, remote=remote, hashed=True)
    return [opened[spec.snapshot or snapshot] for spec in recipe.inputs]


def curate(
    recipe: CurationRecipe,
    snapshots: Sequence[Snapshot],
    out: Path,
    *,
    cache_dir: Path,
    progress: Progress | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    bytes_per_shard: int = BYTES_PER_SHARD,
) -> CurationReport:
    """Write the data set ``<name>-train`` into a snapshot folder.

    Beside it, ``<name>-curation.json``, ``<name>-curation.html`` and ``<name>-samples.parquet``, the list of all
    samples with what became of them. The same samples in the same shards give the same bytes.

    Args:
        recipe: What is drawn.
        snapshots: One for each of its inputs, as ``open_inputs`` gives them.
        out: The snapshot's folder; made when missing. ``out/<name>`` is replaced, the rest stays.
        cache_dir: Where what is known of shards is kept.
        progress: Called with a sentence and the share that is done.
        rows_per_shard: A new shard starts after N samples,
        bytes_per_shard: or after N bytes of images.

    Raises:
        SnapshotError: A data set or a shard is missing or damaged.
        DataError: There is nothing to draw from, or nothing is left.
        StorageError: No space or no permission; or ``out`` is an input.
    """
    out = replaceable(out)
    for snapshot in snapshots:
        if snapshot.path.resolve() == out:
            raise StorageError(f"{out} is an input", "another folder to write to", "Name a new one.")
    report_progress = progress or (lambda *_: None)
    drawn = draw_mixture(recipe, snapshots, cache_dir=cache_dir, progress=report_progress)
    if not (drawn.fate == 0).any():
        raise DataError(
            f"none of {len(drawn.fate):,} samples is left",
            "a recipe that some of them fit",
            "Widen its filters; --dry-run shows what leaves out how many.",
        )
    key = _key(recipe, drawn, rows_per_shard, bytes_per_shard)
    work = out.parent / f".{out.name}-{recipe.name}-{key}"
    with storage_errors(out), file_lock(out.parent / f".{out.name}-{recipe.name}.lock"):
        work.mkdir(parents=True, exist_ok=True)
        _copy(
            drawn,
            recipe,
            work,
            progress=report_progress,
            rows_per_shard=rows_per_shard,
            bytes_per_shard=bytes_per_shard,
        )
        out.mkdir(parents=True, exist_ok=True)
        report = write_curation_report(drawn, recipe, snapshots, out=out)
        _replace(work, out / recipe.name)
        write_snapshot_manifest(
            out, provenance={f"{recipe.name}-{SPLIT}": _provenance(drawn, recipe, snapshots, report)}
        )
    return report


def write_curation_report(
    drawn: Draw, recipe: CurationRecipe, snapshots: Sequence[Snapshot], *, out: Path
) -> CurationReport:
    """Write ``<name>-samples.parquet``, ``<name>-curation.json`` and the page.

    Args:
        drawn: What became of each sample.
        recipe: By which.
        snapshots: One for each of its inputs.
        out: Folder for the three files; made when missing.

    Raises:
        StorageError: No space or no permission.
    """
    report = write_samples(drawn, recipe, snapshots, out=out / f"{recipe.name}-samples.parquet")
    write_file(out / f"{recipe.name}-curation.html", render_curation(report, snapshots=snapshots))
    write_file(out / f"{recipe.name}-curation.json", report.model_dump_json(indent=2) + "\n")
    return report


def _key(recipe: CurationRecipe, drawn: Draw, *sizes: int) -> str:
    facts = [recipe.digest, *(shard.sha256 for shard in drawn.shards), *sizes]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _copy(
    drawn: Draw,
    recipe: CurationRecipe,
    folder: Path,
    *,
    progress: Progress,
    rows_per_shard: int,
    bytes_per_shard: int,
) -> None:
    """Copy what is drawn into shards; those that are whole stay."""
    writer = ShardWriter(
        folder,
        SPLIT,
        rows_per_shard=rows_per_shard,
        bytes_per_shard=bytes_per_shard,
        provenance=any(has_provenance(shard.path, source=shard.source) for shard in drawn.shards),
    )
    writer.paths += sorted(folder.glob(f"{SPLIT}-*.parquet"))
    skip = sum(read_shard_metadata(path).num_rows for path in writer.paths)
    specs = {name: recipe.source(name) for name in drawn.sources}
    with writer:
        for record in _read_drawn(drawn, skip=skip, progress=progress):
            spec = specs[record.source]
            writer.write(record if spec.prompt is None else add_prompt(record, spec.prompt, spec.letter_prompt or ""))


def _read_drawn(drawn: Draw, *, skip: int, progress: Progress) -> Iterator[Record]:
    left: list[tuple[int, NDArray[np.int64]]] = []
    for number in range(len(drawn.shards)):
        start, end = drawn.first_samples[number : number + 2].tolist()
        rows = np.flatnonzero(drawn.fate[start:end] == 0)
        if skip < len(rows):
            left.append((number, rows[skip:]))
        skip = max(skip - len(rows), 0)
    coming = shards_in_turn([drawn.shards[number] for number, _ in left])
    for (number, rows), shard in zip(left, coming, strict=True):
        progress(f"copying {shard.dataset}, shard {number + 1} of {len(drawn.shards)}", number / len(drawn.shards))
        reader = RecordReader([shard.path], cached_groups=1, source=shard.source)
        for row in rows.tolist():
            yield reader.read(row)


def add_prompt(record: Record, prompt: str, letter_prompt: str = "") -> Record:
    """A record whose questions say how they are to be answered.

    A question that has a sentence about the answer's format already stays as it is.

    Args:
        record: The record.
        prompt: The sentence, for instance "Answer the question using a single word or phrase."
        letter_prompt: That of questions whose answer is an option's letter; ``prompt`` when empty.
    """
    turns = list(record.turns)
    for place, turn in enumerate(turns[:-1]):
        if turn.speaker == "human" and not has_format_prompt(turn.text):
            sentence = choose_sentence(turns[place + 1].text, prompt, letter_prompt)
            turns[place] = replace(turn, text=add_answer_format(turn.text, sentence))
    return replace(record, turns=tuple(turns))


def _replace(work: Path, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    work.replace(out)
    # Of runs of other recipes or inputs that were killed.
    for left in work.parent.glob(f"{work.name[:-12]}" + 12 * "[0-9a-f]"):
        shutil.rmtree(left)


def _provenance(
    drawn: Draw, recipe: CurationRecipe, snapshots: Sequence[Snapshot], report: CurationReport
) -> Provenance:
    entries = {shard.dataset: snapshots[shard.snapshot].dataset(shard.dataset) for shard in drawn.shards}
    licences = dict.fromkeys(entry.licence for entry in entries.values())
    return Provenance(
        " AND ".join(f"({name})" if " " in name else name for name in licences),
        f"{report.headline()} by curation recipe {recipe.name} ({report.recipe_digest[:12]}) from {', '.join(entries)}",
    )
