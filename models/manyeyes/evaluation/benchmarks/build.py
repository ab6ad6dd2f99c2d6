"""Makes a benchmark's data set in a snapshot folder from the hub, or from Parquet in the hub's schema.

The columns stay as they are; only row groups become small, and images that the hub keeps apart are joined to their
questions. Nothing is fetched unless a benchmark is built without ``parquet``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.builders.manifest import Provenance, replace_folder, write_manifest
from manyeyes.data.shards import BYTES_PER_SHARD, ROWS_PER_GROUP
from manyeyes.errors import EvaluationError, SourceError
from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow
from manyeyes.evaluation.benchmarks.items import check_columns

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def build_benchmark(row: BenchmarkRow, out: Path, *, parquet: Path | None = None, images: Path | None = None) -> None:
    """Write ``<name>/<split>-00000.parquet``, ... into a snapshot folder, and its manifest anew.

    Args:
        row: The benchmark.
        out: The snapshot's folder; made when missing. ``out/<name>`` is replaced, the rest stays.
        parquet: A Parquet file or a folder of them in the hub's schema; the hub itself for ``None``.
        images: The same for images that the hub keeps apart (``id``, ``image``); needed beside ``parquet`` where the
            rows have none.

    Raises:
        EvaluationError: A column is missing, a row names an image that is not there, or there are no rows.
        SourceError: The hub, a file or a folder cannot be read.
        StorageError: No space or no permission.
    """
    source = f"hub {row.hub_id}, {row.config}, {row.split}" if parquet is None else f"Parquet of {row.hub_id}"
    tables = _read_hub(row.hub_id, row.config, row.split) if parquet is None else _read_parquet(parquet)

    def fill(folder: Path) -> None:
        _write(folder, row, _with_images(row, tables, images, from_hub=parquet is None))

    replace_folder(out / row.name, fill)
    write_manifest(out, provenance={row.dataset: Provenance(row.licence, source, layout="hub")})


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


def _read_parquet(path: Path) -> Iterator[pa.Table]:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise SourceError(f"{path} has no Parquet files", "a Parquet file, or a folder of them", "Check the path.")
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=ROWS_PER_GROUP):
                    yield pa.Table.from_batches([batch], schema=opened.schema_arrow)
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"{file} cannot be read ({error})", "Parquet", "Get the file again.") from error


def _with_images(
    row: BenchmarkRow, tables: Iterator[pa.Table], images: Path | None, *, from_hub: bool
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
                apart = _read_hub(row.hub_id, row.images_config, row.split)
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


def _write(folder: Path, row: BenchmarkRow, tables: Iterator[pa.Table]) -> None:
    writer: pq.ParquetWriter | None = None
    shards = rows = size = 0
    try:
        for table in tables:
            check_columns(table.column_names, row.columns, name=row.name, where="the source")
            if writer is None:
                writer = pq.ParquetWriter(folder / f"{row.split}-{shards:05d}.parquet", table.schema)
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
