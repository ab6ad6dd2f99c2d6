"""Makes a benchmark's data set in a snapshot folder from the hub, or from Parquet in the hub's schema.

The columns stay as they are; only row groups become small, and images that the hub keeps apart are joined to their
questions. Nothing is fetched unless a benchmark is built without ``parquet``.

Of the Parquet files of a folder, those of one split and one configuration are taken, all of them. The hub writes
``data/validation-00000-of-00001.parquet``, ``SUBJECT/test-00000-of-00002.parquet`` and, where it converts,
``CONFIG/SPLIT/0000.parquet``; people write ``mmmu_val.parquet``. Of several files each has to say its split: rows of
another one have other questions, hidden answers, or both.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.shards import BYTES_PER_SHARD, ROWS_PER_GROUP
from manyeyes.errors import EvaluationError, SourceError
from manyeyes.evaluation.benchmarks.benchmark import (
    IMAGE,
    IMAGES,
    ROW_NUMBER,
    BenchmarkRow,
    position,
    refuse_hidden,
)
from manyeyes.evaluation.benchmarks.items import check_columns
from manyeyes.storage import new_folder

_SAME = {"val": "validation", "valid": "validation", "training": "train", "testing": "test"}
_KNOWN = {*_SAME, *_SAME.values(), "dev", "testdev", "testmini", "challenge", "submission"}
_HUB_SHARD = re.compile(r"(?P<split>[A-Za-z][\w.]*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
_NAMED = 3


@dataclass(frozen=True)
class SourceFiles:
    """What is read of a source.

    Attributes:
        split: Whose files.
        files: In order.
        left_out: The source's other Parquet files.
    """

    split: str
    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    def describe(self, source: Path) -> str:
        """A sentence on which files were taken."""
        names = _name([file.relative_to(source) if file != source else Path(file.name) for file in self.files])
        total = len(self.files) + len(self.left_out)
        return f"split {self.split}: {len(self.files)} of {total} Parquet files ({names})"


def find_files(row: BenchmarkRow, source: Path, *, split: str, config: str) -> SourceFiles:
    """The files of a split and a configuration.

    Args:
        row: The benchmark.
        source: A Parquet file, which is the user's choice unless its name says another split; or a folder.
        split: Name of the split.
        config: Name of the configuration; it only counts where there are several folders.

    Raises:
        SourceError: There is none, it cannot be told which they are, or one is missing.
    """
    if source.is_file():
        found = split_of(source, source.parent)
        if found not in (None, same_split(split)):
            raise _other_split(row, f"{source} is of the split {found}", [str(found)], split)
        return SourceFiles(split, (source,))
    files = sorted(file for file in source.rglob("*.parquet") if not _is_hidden(file.relative_to(source)))
    if not files:
        kinds = Counter(file.suffix for file in source.rglob("*") if file.is_file() and file.suffix)
        others = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(_NAMED))
        raise SourceError(
            f"{source} has no Parquet files" + (f" (it has {others})" if others else ""),
            "a Parquet file, or a folder of them",
            "Check the path.",
        )
    splits = {file: split_of(file, source) for file in files}
    untold = [file for file, found in splits.items() if found is None]
    if untold == files and len(files) == 1:
        return SourceFiles(split, (files[0],))
    if untold:
        raise SourceError(
            f"{len(untold)} of {len(files)} Parquet files below {source} do not say their split "
            f"({_name([file.relative_to(source) for file in untold])})",
            "the split in the name of each file, or of its folder",
            f"Name them {split}-00000.parquet and so on, or give one file.",
        )
    chosen = [file for file, found in splits.items() if found == same_split(split)]
    if not chosen:
        there = sorted({found for found in splits.values() if found is not None})
        raise _other_split(row, f"{source} has the split{'s' * (len(there) > 1)} {', '.join(there)}", there, split)
    chosen = _of_config(row, chosen, source, split=split, config=config)
    _refuse_missing(chosen)
    return SourceFiles(split, tuple(chosen), tuple(file for file in files if file not in chosen))


def same_split(name: str) -> str:
    """One name for a split that has several: ``val`` is ``validation``; ``dev`` is not."""
    return _SAME.get(name, name)


def split_of(file: Path, source: Path) -> str | None:
    """The split that a file's name says, else the nearest folder's up to ``source`` itself; ``None`` without one."""
    shard = _HUB_SHARD.fullmatch(file.stem)
    if shard is not None:
        said = _said(shard["split"])
        return said.pop() if len(said) == 1 else shard["split"]
    names = [file.stem]
    folder = file.parent
    while folder != source:
        names.append(folder.name)
        folder = folder.parent
    for name in names:
        said = _said(name)
        if said:
            return said.pop() if len(said) == 1 else None
    own = source.resolve().name.lower()
    return same_split(own) if own in _KNOWN else None


def _said(name: str) -> set[str]:
    joined = re.sub(r"test[-_](dev|mini)", r"test\1", name.lower())
    return {same_split(word) for word in re.split(r"[^a-z]+", joined) if word in _KNOWN}


def _of_config(row: BenchmarkRow, files: list[Path], source: Path, *, split: str, config: str) -> list[Path]:
    folders = {file.parent for file in files}
    if len(folders) == 1:
        return files
    own = [file for file in files if config in file.relative_to(source).parts[:-1]]
    if own:
        return own
    # The subjects of MMMU are folders of one set; rows without ids of their own do not show what is there twice.
    if config == "default" and row.item_id is not position:
        return files
    names = _name(sorted(folder.relative_to(source) for folder in folders))
    raise SourceError(
        f"files of the split {split} are in {len(folders)} folders below {source} ({names})",
        f"one configuration of {row.hub_id}" + (f": {config}" if config != "default" else ""),
        "Give its folder: --from FOLDER.",
    )


def _refuse_missing(files: Sequence[Path]) -> None:
    sets: dict[tuple[Path, str], list[re.Match[str]]] = {}
    for file in files:
        shard = _HUB_SHARD.fullmatch(file.stem)
        if shard is not None:
            sets.setdefault((file.parent, shard["split"]), []).append(shard)
    for (folder, split), shards in sets.items():
        count = int(shards[0]["count"])
        numbers = sorted(int(shard["number"]) for shard in shards)
        if any(int(shard["count"]) != count for shard in shards) or numbers != list(range(count)):
            missing = [number for number in range(count) if number not in numbers]
            raise SourceError(
                f"{folder} has {len(shards)} files of the split {split}"
                + (f", and none of number {missing[0]:05d}" if missing else " that do not belong together"),
                f"{split}-00000-of-{count:05d}.parquet to {split}-{count - 1:05d}-of-{count:05d}.parquet, once each",
                "Get the folder again.",
            )


def _other_split(row: BenchmarkRow, found: str, there: Sequence[str], split: str) -> SourceError:
    do = f"Get the files of {split}"
    do += f", or say --split {there[0]}." if split == row.split else "."
    return SourceError(found, f"files of {split}" + (f", which {row.name} is scored on" * (split == row.split)), do)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _name(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(path.as_posix() for path in paths[:_NAMED]) + more


_SPLIT = re.compile(r"[a-z0-9-]+")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def build_benchmark(
    row: BenchmarkRow,
    out: Path,
    *,
    parquet: Path | None = None,
    images: Path | None = None,
    split: str | None = None,
) -> str:
    """Write ``<name>/<split>-00000.parquet``, ... into a snapshot folder, and its manifest anew.

    Args:
        row: The benchmark.
        out: The snapshot's folder; made when missing. ``out/<name>`` is replaced, the rest stays.
        parquet: A Parquet file or a folder of them in the hub's schema, of which those of the split are taken; the hub
            itself for ``None``.
        images: The same for images that the hub keeps apart (``id``, ``image``); needed beside ``parquet`` where the
            rows have none.
        split: Another one than the row's, for what reads questions and not answers, as the search for contamination
            does; models are scored on the row's own, which may hide no answer.

    Returns:
        What was taken, in a sentence.

    Raises:
        EvaluationError: A column is missing, a row names an image that is not there, hides its answer or has the id of
            another, or there are no rows.
        SourceError: The hub, a file or a folder cannot be read, or it cannot be told which files are of the split.
        StorageError: No space or no permission.
    """
    split = split or row.split
    if not _SPLIT.fullmatch(split):
        raise EvaluationError(f'the split is "{split}"', "small letters, digits and -", f"For instance {row.split}.")
    if parquet is None:
        source = f"hub {row.hub_id}, {row.config}, {split}"
        taken, tables = source, _read_hub(row.hub_id, row.config, split)
    else:
        found = find_files(row, parquet, split=split, config=row.config)
        source = f"Parquet of {row.hub_id}, {split}"
        taken, tables = found.describe(parquet), _read_parquet(found.files)
    apart = None if images is None else find_files(row, images, split=split, config=row.images_config).files

    with new_folder(out / row.name) as folder:
        joined = _with_images(row, tables, apart, split=split, from_hub=parquet is None)
        _write(folder, row, _checked(row, joined, is_scored=split == row.split), split=split)
    dataset = row.dataset if split == row.split else f"{row.name}-{split}"
    write_snapshot_manifest(out, provenance={dataset: Provenance(row.licence, source, layout="hub")})
    return taken


def _read_hub(hub_id: str, config: str, split: str) -> Iterator[pa.Table]:
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, config, split=split)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{hub_id} ({config}, {split}) cannot be read from the hub: {error}",
            "the data set, its configuration and its split",
            "Check the network and the hub's token, or give Parquet files: --from FOLDER.",
        ) from error
    yield from loaded.with_format("arrow").iter(batch_size=ROWS_PER_GROUP)


def _read_parquet(files: Sequence[Path]) -> Iterator[pa.Table]:
    schema: pa.Schema | None = None
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                schema = schema or opened.schema_arrow
                for batch in opened.iter_batches(batch_size=ROWS_PER_GROUP):
                    yield _in_schema(pa.Table.from_batches([batch], schema=opened.schema_arrow), schema, file, files[0])
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"{file} cannot be read ({error})", "Parquet", "Get the file again.") from error


def _in_schema(table: pa.Table, schema: pa.Schema, file: Path, first: Path) -> pa.Table:
    """The table with the columns of the first file, which all are written with."""
    if table.schema.equals(schema):
        return table
    try:
        return table.select(schema.names).cast(schema)
    except (KeyError, ValueError, pa.ArrowNotImplementedError) as error:
        raise SourceError(
            f"{file} has other columns than {first} ({error})", "files of one set", "Give the folder of one."
        ) from error


def _with_images(
    row: BenchmarkRow, tables: Iterator[pa.Table], images: Sequence[Path] | None, *, split: str, from_hub: bool
) -> Iterator[pa.Table]:
    """The tables, with the column ``image`` joined where a benchmark's rows have none."""
    by_id: dict[str, Any] | None = None
    for table in tables:
        if not row.images_key or "image" in table.column_names:
            yield table
            continue
        if by_id is None:
            if images is not None:
                apart = _read_parquet(images)
            elif from_hub:
                apart = _read_hub(row.hub_id, row.images_config, split)
            else:
                raise EvaluationError(
                    f"the rows of {row.name} have no images",
                    f"the configuration {row.images_config} too, which holds them",
                    "Name it: --images-from PATH",
                )
            by_id = {str(one["id"]): one["image"] for part in apart for one in part.to_pylist()}
        wanted = [str(value) for value in table.column(row.images_key).to_pylist()]
        for name in wanted:
            if name not in by_id:
                raise EvaluationError(
                    f'a row of {row.name} names the image "{name}"',
                    f"one of the {len(by_id):,} images of {row.images_config}",
                    "Use questions and images of one version.",
                )
        joined = table.append_column("image", pa.array([by_id[name] for name in wanted], type=_IMAGE))
        yield joined.replace_schema_metadata(_with_image_feature(table.schema.metadata))


def _with_image_feature(metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes] | None:
    """The hub's description of the columns, with ``image`` added, so that ``datasets`` decodes it."""
    if not metadata or b"huggingface" not in metadata:
        return metadata
    described = json.loads(metadata[b"huggingface"])
    described.get("info", {}).get("features", {})["image"] = {"_type": "Image"}
    return {**metadata, b"huggingface": json.dumps(described).encode()}


def _checked(row: BenchmarkRow, tables: Iterator[pa.Table], *, is_scored: bool) -> Iterator[pa.Table]:
    """The tables, once their rows have ids that are unique and, where they are scored, answers that are public."""
    columns = [name for name, kind in row.columns.items() if kind not in (IMAGE, IMAGES) and name != ROW_NUMBER]
    seen: dict[str, int] = {}
    number = 0
    for table in tables:
        check_columns(table.column_names, row.columns, name=row.name, where="the source")
        for values in table.select(columns).to_pylist():
            where = f"{row.name} row {number}"
            if is_scored:
                refuse_hidden(row, values, where)
            item_id = str(number) if row.item_id is position else str(row.item_id(values))
            if item_id in seen:
                raise EvaluationError(
                    f'{where} has the id of row {seen[item_id]}, "{item_id}"',
                    "ids that are unique",
                    "Give one configuration or subject once.",
                )
            seen[item_id] = number
            number += 1
        yield table


def _write(folder: Path, row: BenchmarkRow, tables: Iterator[pa.Table], *, split: str) -> None:
    writer: pq.ParquetWriter | None = None
    shards = rows = size = 0
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(folder / f"{split}-{shards:05d}.parquet", table.schema)
                shards, size = shards + 1, 0
            writer.write_table(table)
            rows, size = rows + table.num_rows, size + table.nbytes
            if size >= BYTES_PER_SHARD:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    if not rows:
        raise EvaluationError(f"the source of {row.name} has no rows", "at least one", "Check the source.")
