"""The search: what a snapshot's training data and benchmarks share, and the files that say so.

Images in three looks, each at fewer: bytes (sha256), dHash, and the pixels of what dHash cannot tell apart. Training
is streamed shard by shard, so memory grows with the benchmarks and with what is found, not with training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from manyeyes.data.contamination.benchmarks import IMAGE_KINDS, Benchmarks, Source
from manyeyes.data.contamination.findings import (
    ContaminationReport,
    DatasetFindings,
    Pair,
    Thresholds,
    render_contamination,
)
from manyeyes.data.contamination.fingerprints import fingerprint_shard, read_samples
from manyeyes.data.quarantine import CONTAMINATED_FILE, QuarantinedSample, write_quarantine
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import SnapshotError, did_you_mean
from manyeyes.sources import open_pinned, split_pin
from manyeyes.storage import hash_file, storage_errors, write_file

_EXAMPLES = 6  # of each kind, in the report


def open_source(name: str, *, snapshot: Snapshot) -> Source:
    """A data set of the snapshot by name, or Parquet files by path.

    Args:
        name: Of a data set, or the path of a Parquet file or of a folder with some, as ``open_pinned`` takes it.
        snapshot: Has the data set.

    Raises:
        SnapshotError: Neither.
        SourceError: The files are not those that the name's sha256 says.
    """
    name, digest = split_pin(name)
    if name in snapshot.manifest.datasets:
        entry = snapshot.dataset(name)
        return Source(name, tuple((snapshot.path / shard.path, shard.sha256) for shard in entry.shards))
    path = Path(name)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SnapshotError(
            f'data set is "{name}"',
            f"one of the snapshot ({', '.join(snapshot.manifest.datasets)}), or a Parquet file or a folder of them",
            did_you_mean(name, snapshot.manifest.datasets) + "Check the name or the path.",
        )
    if digest:
        open_pinned(f"{name}#sha256={digest}")
    return Source(path.stem, tuple((file, hash_file(file)) for file in files))


def find_contamination(
    snapshot: Snapshot,
    *,
    datasets: Sequence[str],
    benchmarks: Sequence[str],
    out_dir: Path,
    cache_dir: Path,
    thresholds: Thresholds | None = None,
    leave_out: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> ContaminationReport:
    """Compare every training sample with every benchmark, and write the report.

    Writes ``contamination.json``, ``contamination.html``, ``contamination.md``, ``pairs.jsonl``, and, with
    ``leave_out``, ``contaminated.jsonl``, whose samples training leaves out like those of ``quarantine.jsonl``.

    Memory: 900 bytes a benchmark image, 12 KiB for each with a candidate, 40 bytes an n-gram of a benchmark, the
    fingerprints (62 bytes an image) of one training shard, and what is found.

    Args:
        snapshot: Has the training data, and benchmarks that are named and not paths.
        datasets: Data sets to train on.
        benchmarks: Data sets of the snapshot, or paths, as ``open_source`` takes them.
        out_dir: Folder for the files; made when missing.
        cache_dir: Where fingerprints are kept; a killed search goes on at the next shard.
        thresholds: From where on two things are the same.
        leave_out: Whether training is to leave out what is found.
        progress: Called with a sentence and the share that is done.

    Raises:
        SnapshotError: A data set is missing or a file cannot be read.
        StorageError: No space or no permission.
    """
    limits = thresholds or Thresholds()
    judged = [open_source(name, snapshot=snapshot) for name in dict.fromkeys(benchmarks)]
    trained = [open_source(name, snapshot=snapshot) for name in dict.fromkeys(datasets) if name not in benchmarks]
    theirs = Benchmarks(judged, cache_dir=cache_dir, thresholds=limits)
    num_shards = sum(len(source.shards) for source in trained)
    pairs: list[Pair] = []
    rows: list[DatasetFindings] = []
    done = 0
    for source in trained:
        of_source: list[Pair] = []
        counts = np.zeros(3, int)  # images, undecidable, unreadable
        for (path, sha256), first_row in zip(source.shards, source.first_rows(), strict=True):
            if progress is not None:
                progress(f"comparing {source.name} with {len(judged)} benchmarks", done / num_shards)
            prints = fingerprint_shard(path, sha256=sha256, cache_dir=cache_dir)
            entropy = prints["entropy"]
            counts += [len(prints), ((entropy >= 0) & (entropy < limits.min_entropy)).sum(), (entropy < 0).sum()]
            of_source += theirs.match_images(source.name, path, prints, first_row=first_row)
            of_source += theirs.match_texts(source.name, path, first_row=first_row)
            done += 1
        rows.append(_sum_up(source.name, of_source, *(int(count) for count in counts)))
        pairs += of_source
    report = ContaminationReport(
        data_md5=snapshot.md5,
        thresholds=limits,
        benchmarks=theirs.findings(),
        datasets=tuple(rows),
        left_out=leave_out,
        examples=_choose_examples(pairs),
    )
    with storage_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    samples = {(pair.dataset, pair.row): pair for pair in reversed(pairs)}  # the first reason of each
    if leave_out:
        write_quarantine(
            out_dir / CONTAMINATED_FILE,
            (
                QuarantinedSample(dataset=pair.dataset, row=pair.row, id=pair.id, reason=pair.reason())
                for pair in reversed(samples.values())
            ),
        )
    else:
        (out_dir / CONTAMINATED_FILE).unlink(missing_ok=True)
    write_file(out_dir / "pairs.jsonl", "".join(pair.model_dump_json() + "\n" for pair in pairs))
    pictures = _read_pictures(report.examples, [*trained, *judged])
    write_file(out_dir / "contamination.html", render_contamination(report, pictures=pictures))
    write_file(out_dir / "contamination.md", report.as_markdown())
    write_file(out_dir / "contamination.json", report.model_dump_json(indent=2) + "\n")
    return report


def _sum_up(name: str, pairs: Sequence[Pair], images: int, undecidable: int, unreadable: int) -> DatasetFindings:
    first: dict[tuple[int, int | None], int] = {}
    for pair in pairs:
        if pair.kind != "text":
            place = IMAGE_KINDS.index(pair.kind)
            first[pair.row, pair.image] = min(place, first.get((pair.row, pair.image), place))
    kinds = list(first.values())
    return DatasetFindings(
        name=name,
        images=images,
        exact=kinds.count(0),
        near=kinds.count(1),
        mirrored=kinds.count(2),
        undecidable=undecidable,
        unreadable=unreadable,
        overlapping=len({pair.row for pair in pairs if pair.kind == "text"}),
        samples=len({pair.row for pair in pairs}),
    )


def _choose_examples(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """A few of each kind, first those of which one would most like to see that they are right."""
    chosen: list[Pair] = []
    for kind in (*IMAGE_KINDS, "text"):
        of_kind = [pair for pair in pairs if pair.kind == kind]
        chosen += sorted(of_kind, key=lambda pair: (-(pair.difference or 0), pair.share or 0))[:_EXAMPLES]
    return tuple(chosen)


def _read_pictures(examples: Sequence[Pair], sources: Sequence[Source]) -> dict[Pair, tuple[bytes, bytes]]:
    wanted = {(pair.dataset, pair.row) for pair in examples} | {
        (pair.benchmark, pair.benchmark_row) for pair in examples
    }
    names = {name for name, _ in wanted}
    images: dict[tuple[str, int], tuple[bytes, ...]] = {}
    for source in sources:
        if source.name not in names:
            continue
        for (path, _), first_row in zip(source.shards, source.first_rows(), strict=True):
            rows = {row - first_row for name, row in wanted if name == source.name}
            for group in read_samples(path, rows=rows, texts=False):
                images.update({(source.name, first_row + sample.row): sample.images for sample in group})
    return {
        pair: (
            images[pair.dataset, pair.row][pair.image],
            images[pair.benchmark, pair.benchmark_row][pair.benchmark_image],
        )
        for pair in examples
        if pair.image is not None and pair.benchmark_image is not None
    }
