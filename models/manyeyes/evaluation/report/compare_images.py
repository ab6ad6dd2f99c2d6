"""Finds the images that a comparison shows in the snapshot that both models were asked on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.benchmarks.benchmark import CheckedRow
from manyeyes.evaluation.benchmarks.items import RowReader


def read_images(snapshot: Snapshot, wanted: Mapping[str, Collection[str]]) -> dict[tuple[str, str], bytes]:
    """Image files by benchmark and sha256; those that the snapshot lacks are left out.

    A data set is read until all of its images are found.

    Args:
        snapshot: Has the benchmarks' data sets.
        wanted: sha256s by benchmark.

    Raises:
        SnapshotError: The snapshot lacks a data set.
        EvaluationError: A column is missing.
    """
    found: dict[tuple[str, str], bytes] = {}
    for name, sha256s in wanted.items():
        left = set(sha256s)
        row = find_benchmark(name)
        rows = RowReader(snapshot.shards(row.dataset), columns=row.columns, name=name) if left else ()
        for number, parquet_row in enumerate(rows):
            asked = row.unfold(parquet_row)[0]
            for data in row.images(CheckedRow(asked, row.columns, f"{name} row {number}")):
                sha256 = hashlib.sha256(data).hexdigest()
                if sha256 in left:
                    left.remove(sha256)
                    found[name, sha256] = data
            if not left:
                break
    return found
