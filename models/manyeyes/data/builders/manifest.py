"""The manifest of a snapshot folder, and the pretrained parts that travel with it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from manyeyes.data.shards import read_shard_metadata
from manyeyes.data.snapshot import (
    MANIFEST,
    DatasetEntry,
    PretrainedEntry,
    ShardEntry,
    SnapshotManifest,
)
from manyeyes.errors import SnapshotError
from manyeyes.storage import hash_file, new_folder, write_file

_SHARD = re.compile(r"(?P<split>[a-z0-9-]+)-\d{5}\.parquet")


@dataclass(frozen=True)
class Provenance:
    """Where something comes from.

    Attributes:
        licence: SPDX name.
        source: In a sentence: who published it, what was done to it.
        layout: ``records``, or ``hub`` for a benchmark's own columns.
    """

    licence: str
    source: str
    layout: Literal["records", "hub"] = "records"


# The pretrained parts that this repository makes, and the command that makes each.
PRETRAINED_PROVENANCE: dict[str, Provenance] = {
    "tiny-lm": Provenance("Apache-2.0", "manyeyes step pretrain_language_model"),
    "tiny-vit": Provenance("Apache-2.0", "manyeyes step pretrain_encoder"),
}


def write_snapshot_manifest(folder: Path, *, provenance: Mapping[str, Provenance] | None = None) -> SnapshotManifest:
    """Write ``manifest.json`` for what is in a folder.

    ``<source>/<split>-00000.parquet`` becomes a shard of the data set ``<source>-<split>``; each folder below
    ``pretrained/`` becomes a pretrained part of its name.

    Args:
        folder: The snapshot's folder.
        provenance: Licence and source by data set, for data sets that the folder's manifest does not name yet, and for
            those to be replaced; by part for pretrained parts.

    Returns:
        The manifest as written.

    Raises:
        SnapshotError: A data set or a part without licence, or a shard that cannot be read.
        StorageError: No space or no permission.
    """
    known = _known_provenance(folder) | dict(PRETRAINED_PROVENANCE) | dict(provenance or {})
    shards: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*.parquet")):
        match = _SHARD.fullmatch(path.name)
        if match is None:
            raise SnapshotError(f"{path} is named otherwise", "<split>-00000.parquet", "Write it with write_shards.")
        shards.setdefault(f"{path.parent.name}-{match['split']}", []).append(path)
    manifest = SnapshotManifest(
        datasets={
            name: _describe_dataset(paths, folder=folder, provenance=_find(known, name, folder))
            for name, paths in sorted(shards.items())
        },
        pretrained={
            part.name: _describe_part(part, folder=folder, provenance=_find(known, part.name, folder))
            for part in sorted(folder.glob("pretrained/*"))
            if part.is_dir()
        },
    )
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def add_pretrained(
    folder: Path, parts: Path, *, provenance: Mapping[str, Provenance] | None = None
) -> SnapshotManifest:
    """Copy pretrained parts into a snapshot folder and write its manifest anew.

    Args:
        folder: The snapshot's folder.
        parts: A folder with one sub-folder a part (for instance ``tiny-lm``); each replaces the part of its name.
        provenance: Licence and command by part, for parts that this library does not make.

    Raises:
        SnapshotError: ``parts`` has no sub-folder, or a part without licence.
        StorageError: No space or no permission.
    """
    names = sorted(part.name for part in parts.iterdir() if part.is_dir()) if parts.is_dir() else []
    if not names:
        raise SnapshotError(
            f"{parts} has no sub-folder",
            "one sub-folder a pretrained part, for instance tiny-lm",
            "Make them: manyeyes step pretrain_language_model, manyeyes step pretrain_encoder",
        )
    for name in names:
        with new_folder(folder / "pretrained" / name) as new:
            _copy_files(parts / name, new)
    return write_snapshot_manifest(folder, provenance=provenance)


def _copy_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            # Content only: modes and times of the place where it was made say nothing.
            shutil.copyfile(file, target / file.name)


def _known_provenance(folder: Path) -> dict[str, Provenance]:
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        manifest = SnapshotManifest.model_validate_json(file.read_bytes())
    except pydantic.ValidationError:  # a damaged manifest is about to be replaced; what only it knew is asked for
        return {}
    datasets = {
        name: Provenance(entry.licence, entry.source, entry.layout) for name, entry in manifest.datasets.items()
    }
    parts = {name: Provenance(entry.licence, entry.how) for name, entry in manifest.pretrained.items()}
    return datasets | parts


def _find(known: Mapping[str, Provenance], name: str, folder: Path) -> Provenance:
    if name not in known:
        raise SnapshotError(
            f'nothing says under which licence "{name}" in {folder} is',
            "a licence",
            "Give provenance to write_snapshot_manifest.",
        )
    return known[name]


def _describe_dataset(paths: list[Path], *, folder: Path, provenance: Provenance) -> DatasetEntry:
    is_records = provenance.layout == "records"
    shards = tuple(
        ShardEntry(
            path=path.relative_to(folder).as_posix(),
            sha256=hash_file(path),
            rows=(read_shard_metadata(path) if is_records else pq.read_metadata(path)).num_rows,
            bytes=path.stat().st_size,
        )
        for path in paths
    )
    images = sum(_count_images(path) if is_records else _count_image_structs(path) for path in paths)
    return DatasetEntry(
        shards=shards,
        rows=sum(shard.rows for shard in shards),
        images=images,
        licence=provenance.licence,
        source=provenance.source,
        layout=provenance.layout,
    )


def _count_image_structs(path: Path) -> int:
    """Images in the hub's struct (``bytes``, ``path``), in any column and in lists of such."""
    count = 0
    with pq.ParquetFile(path) as file:
        leaves = [file.schema.column(place).path for place in range(len(file.schema))]
        for leaf in (leaf for leaf in leaves if leaf.endswith(".bytes")):
            for batch in file.iter_batches(columns=[leaf]):
                column = batch.column(0)
                values = column.flatten() if pa.types.is_list(column.type) else column
                count += len(values) - values.field("bytes").null_count
    return count


def _count_images(path: Path) -> int:
    column = pq.read_table(path, columns=["sha256"], use_threads=False).column("sha256")
    return sum(len(chunk.flatten()) for chunk in column.chunks)


def _describe_part(part: Path, *, folder: Path, provenance: Provenance) -> PretrainedEntry:
    return PretrainedEntry(
        path=part.relative_to(folder).as_posix(),
        files={file.name: hash_file(file) for file in sorted(part.iterdir()) if file.is_file()},
        licence=provenance.licence,
        how=provenance.source,
    )
