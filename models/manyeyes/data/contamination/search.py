"""The search: what a snapshot's training data and benchmarks share, and the files that say so.

Training is looked at shard by shard, the next ones being fetched meanwhile, and what is found of a shard is kept. So
memory grows with the benchmarks, not with training nor with what is found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

from manyeyes.data.contamination.comparison import (
    EXAMPLES,
    IMAGE_KINDS,
    BenchmarkComparison,
    BenchmarkSize,
    ShardFindings,
    ShownPair,
    Source,
    example_order,
    open_source,
)
from manyeyes.data.contamination.findings import (
    BenchmarkFindings,
    ContaminationReport,
    DatasetFindings,
    Kind,
    Pair,
    Thresholds,
    render_contamination,
)
from manyeyes.data.fetching import in_turn
from manyeyes.data.quarantine import CONTAMINATED_FILE, QuarantinedSample, write_quarantine
from manyeyes.data.snapshot import Snapshot
from manyeyes.sources import split_pin
from manyeyes.storage import new_file, storage_errors, write_file

_COUNTS = frozenset(DatasetFindings.model_fields) - {"name"}


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

    Memory: that of ``Benchmarks``, and what ``BenchmarkComparison.compare`` needs for one shard.

    Args:
        snapshot: Has the training data, and benchmarks that are named and not paths.
        datasets: Data sets to train on.
        benchmarks: Data sets of the snapshot, or paths, as ``open_source`` takes them.
        out_dir: Folder for the files; made when missing.
        cache_dir: Where fingerprints and findings are kept: a killed search goes on at the next shard, and of another
            snapshot the shards that changed are read.
        thresholds: From where on two things are the same.
        leave_out: Whether training is to leave out what is found.
        progress: Called with a sentence and the share that is done.

    Raises:
        SnapshotError: A data set is missing or a file cannot be read.
        StorageError: No space or no permission.
    """
    limits = thresholds or Thresholds()
    names = dict.fromkeys(split_pin(name)[0] for name in [*benchmarks, *datasets])
    on_demand = snapshot.on_demand([name for name in names if name in snapshot.manifest.datasets])
    judged = [open_source(name, snapshot=snapshot, on_demand=on_demand) for name in dict.fromkeys(benchmarks)]
    trained = [
        open_source(name, snapshot=snapshot, on_demand=on_demand)
        for name in dict.fromkeys(datasets)
        if name not in benchmarks
    ]
    theirs = BenchmarkComparison(judged, cache_dir=cache_dir, thresholds=limits)
    shards = [(source, shard) for source in trained for shard in source.shards]
    unknown = [shard.path for _, shard in shards if not theirs.kept(shard).is_file()]
    coming, awaited = in_turn(unknown, on_demand), set(unknown)
    sums = _Sums()
    for done, (source, shard) in enumerate(shards):
        if progress is not None:
            progress(f"comparing {source.name} with {len(judged)} benchmarks", done / len(shards))
        if shard.path in awaited:
            next(coming)
        sums.add(source.name, theirs.compare(shard), first_row=shard.first_row)
    report = ContaminationReport(
        data_md5=snapshot.md5,
        thresholds=limits,
        benchmarks=sums.of_benchmarks(judged, theirs.sizes()),
        datasets=tuple(DatasetFindings(name=source.name, **sums.counts[source.name]) for source in trained),
        left_out=leave_out,
        examples=tuple(example.pair for example in sums.examples()),
    )
    with storage_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    contaminated = _write_pairs(out_dir / "pairs.jsonl", trained, theirs)
    if leave_out:
        write_quarantine(out_dir / CONTAMINATED_FILE, contaminated)
    else:
        deque(contaminated, maxlen=0)
        (out_dir / CONTAMINATED_FILE).unlink(missing_ok=True)
    pictures = {example.pair: example.pictures for example in sums.examples()}
    write_file(out_dir / "contamination.html", render_contamination(report, pictures=pictures))
    write_file(out_dir / "contamination.md", report.as_markdown())
    write_file(out_dir / "contamination.json", report.model_dump_json(indent=2) + "\n")
    return report


def compare_shards(
    snapshot: Snapshot,
    shards: Sequence[tuple[str, int]],
    *,
    benchmarks: Sequence[str],
    cache_dir: Path,
    progress: Callable[[str, float], None] | None = None,
) -> list[Path]:
    """Find what ``find_contamination`` asks of some shards, for another machine that is to join what several found.

    Args:
        snapshot: As for ``find_contamination``.
        shards: Data set and number of each; those of benchmarks are left out.
        benchmarks: As for ``find_contamination``.
        cache_dir: Where findings are kept; put into that of ``find_contamination``, they are known there.
        progress: Called with a sentence and the share that is done.

    Returns:
        The files of findings, and the fingerprints that they are of.

    Raises:
        SnapshotError: A data set is missing or a file cannot be read.
        StorageError: No space or no permission.
    """
    names = dict.fromkeys(name for name, _ in shards if name not in benchmarks)
    on_demand = snapshot.on_demand([*names, *(name for name in benchmarks if name in snapshot.manifest.datasets)])
    judged = [open_source(name, snapshot=snapshot, on_demand=on_demand) for name in dict.fromkeys(benchmarks)]
    theirs = BenchmarkComparison(judged, cache_dir=cache_dir, thresholds=Thresholds())
    trained = {name: open_source(name, snapshot=snapshot, on_demand=on_demand).shards for name in names}
    wanted = [trained[name][number] for name, number in shards if name in names]
    unknown = [shard.path for shard in wanted if not theirs.kept(shard).is_file()]
    coming, awaited = in_turn(unknown, on_demand), set(unknown)
    files: list[Path] = []
    for done, shard in enumerate(wanted):
        if shard.path in awaited:
            next(coming)
        if progress is not None:
            progress(f"comparing with {len(judged)} benchmarks", done / len(wanted))
        theirs.compare(shard)
        files += theirs.files(shard)
    return files


def _write_pairs(path: Path, trained: Sequence[Source], theirs: BenchmarkComparison) -> Iterator[QuarantinedSample]:
    """Write all pairs, a line each; yields the samples with the first reason of each, by row."""
    with new_file(path) as file, file.open("w", encoding="utf-8", newline="\n") as lines:
        for source in trained:
            for shard in source.shards:
                first: dict[int, Pair] = {}
                for pair in theirs.pairs(shard, dataset=source.name, first_row=shard.first_row):
                    lines.write(pair.model_dump_json() + "\n")
                    first.setdefault(pair.row, pair)
                for row, pair in sorted(first.items(), key=itemgetter(0)):
                    yield QuarantinedSample(dataset=pair.dataset, row=row, id=pair.id, reason=pair.reason())


class _Sums:
    """What is summed up over shards."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(lambda: Counter(dict.fromkeys(_COUNTS, 0)))
        self._images: dict[int, int] = {}  # of each image of a benchmark that was found, the first kind
        self._texts: set[int] = set()
        self._examples: dict[Kind, list[ShownPair]] = defaultdict(list)

    def add(self, dataset: str, findings: ShardFindings, *, first_row: int) -> None:
        self.counts[dataset].update(findings.model_dump(include=set(_COUNTS)))
        for place, kind in findings.seen_images:
            number = IMAGE_KINDS.index(kind)
            self._images[place] = min(number, self._images.get(place, number))
        self._texts.update(findings.seen_texts)
        for example in findings.examples:
            pair = example.pair
            moved = pair.model_copy(update={"dataset": dataset, "row": first_row + pair.row})
            of_kind = self._examples[pair.kind]
            of_kind.append(example.model_copy(update={"pair": moved}))
            of_kind.sort(key=lambda shown: example_order(shown.pair))
            del of_kind[EXAMPLES:]

    def examples(self) -> list[ShownPair]:
        return [example for kind in (*IMAGE_KINDS, "text") for example in self._examples[kind]]

    def of_benchmarks(self, judged: Sequence[Source], sizes: Sequence[BenchmarkSize]) -> tuple[BenchmarkFindings, ...]:
        images, texts = ([0, *accumulate(getattr(size, what) for size in sizes)] for what in ("images", "texts"))
        kinds, overlapping = Counter[tuple[int, int]](), Counter[int]()
        for place, kind in self._images.items():
            kinds[bisect_right(images, place) - 1, kind] += 1
        for place in self._texts:
            overlapping[bisect_right(texts, place) - 1] += 1
        return tuple(
            BenchmarkFindings(
                name=source.name,
                **size.model_dump(),
                **{kind: kinds[number, place] for place, kind in enumerate(IMAGE_KINDS)},
                overlapping=overlapping[number],
            )
            for number, (source, size) in enumerate(zip(judged, sizes, strict=True))
        )
