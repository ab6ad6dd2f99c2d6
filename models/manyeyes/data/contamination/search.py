"""The search: what a snapshot's training data and benchmarks share, and the files that say so.

Images in three looks, each at fewer: bytes (sha256), dHash, and the pixels of what dHash cannot tell apart. Training
is streamed shard by shard, so memory grows with the benchmarks and with what is found, not with training.

``Benchmarks`` holds all benchmarks of a search at once: their fingerprints, hashes and texts.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.contamination.findings import (
    BenchmarkFindings,
    ContaminationReport,
    DatasetFindings,
    Kind,
    Pair,
    Thresholds,
    render_contamination,
)
from manyeyes.data.contamination.fingerprints import (
    DTYPE,
    HashIndex,
    TextIndex,
    count_rows,
    fingerprint_shard,
    make_thumbnail,
    read_samples,
)
from manyeyes.data.quarantine import CONTAMINATED_FILE, QuarantinedSample, write_quarantine
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import SnapshotError, did_you_mean
from manyeyes.sources import open_pinned, split_pin
from manyeyes.storage import hash_file, storage_errors, write_file

NEAREST = 16  # candidates of one training image that are looked at
IMAGE_KINDS: tuple[Kind, ...] = ("exact", "near", "mirrored")


@dataclass(frozen=True)
class Source:
    """A training data set or a benchmark.

    Attributes:
        name: For the report.
        shards: Parquet files, each with its sha256.
    """

    name: str
    shards: tuple[tuple[Path, str], ...]

    def first_rows(self) -> list[int]:
        """Where the rows of each file begin, counted over all files; a row of a data set is known by its place in it.

        Raises:
            SnapshotError: A file cannot be read.
        """
        return [0, *itertools.accumulate(count_rows(path) for path, _ in self.shards)][:-1]


@dataclass(frozen=True, order=True)
class _Match:
    """A training image (row of its shard's fingerprints) and an image of a benchmark (place among all of them)."""

    asked: int
    member: int
    kind: Kind
    distance: int | None = None
    difference: float | None = None


class Benchmarks:
    """Benchmarks to look training samples up in.

    Args:
        sources: The benchmarks.
        cache_dir: Where fingerprints are kept.
        thresholds: From where on two things are the same.

    Raises:
        SnapshotError: A file cannot be read.
        StorageError: No space or no permission for the cache.
    """

    def __init__(self, sources: Sequence[Source], *, cache_dir: Path, thresholds: Thresholds) -> None:
        self._sources = sources
        self._thresholds = thresholds
        self._files = [(number, path) for number, source in enumerate(sources) for path, _ in source.shards]
        self._first_rows = [first for source in sources for first in source.first_rows()]
        parts = [
            fingerprint_shard(path, sha256=sha256, cache_dir=cache_dir)
            for source in sources
            for path, sha256 in source.shards
        ]
        self._prints = np.concatenate([np.zeros(0, DTYPE), *parts])
        self._file_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self._decidable = np.flatnonzero(self._prints["entropy"] >= thresholds.min_entropy)
        self._index = HashIndex(self._prints["hash"][self._decidable], radius=thresholds.radius)
        self._by_sha256: dict[bytes, list[int]] = defaultdict(list)
        for place, digest in enumerate(self._prints["sha256"]):
            self._by_sha256[digest.tobytes()].append(place)
        self._heads = np.unique(self._prints["sha256"][:, 0])
        self._thumbnails: dict[int, NDArray[np.uint8]] = {}
        self._ids: dict[tuple[int, int], str] = {}  # by file and row
        self._kinds: dict[int, Kind] = {}  # by place of the image; the first of IMAGE_KINDS that was found
        texts: list[str] = []
        self._text_rows: list[tuple[int, int]] = []  # file and row of each text
        for file, (_, path) in enumerate(self._files):
            for group in read_samples(path, images=False):
                for sample in group:
                    texts += sample.texts
                    self._text_rows += [(file, sample.row)] * len(sample.texts)
        self._texts = TextIndex(texts, n=thresholds.words, share=thresholds.min_share)
        self._overlapping: set[int] = set()

    def match_images(self, dataset: str, path: Path, prints: NDArray[np.void], *, first_row: int) -> list[Pair]:
        """Images of a training shard that a benchmark has too.

        Args:
            dataset: The shard's data set.
            path: The shard.
            prints: Its fingerprints.
            first_row: Where the shard's rows begin in the data set.
        """
        exact = self._match_bytes(prints)
        known = {(match.asked, match.member) for match in exact}
        candidates = [match for match in self._match_hashes(prints) if (match.asked, match.member) not in known]
        matches = sorted([*exact, *self._look_at_pixels(path, prints, candidates)])
        ids = _read_ids(path, {int(prints["row"][match.asked]) for match in matches})
        self._learn_ids({(int(self._file_of[m.member]), int(self._prints["row"][m.member])) for m in matches})
        pairs = []
        for match in matches:
            first = self._kinds.get(match.member, match.kind)
            self._kinds[match.member] = min(first, match.kind, key=IMAGE_KINDS.index)
            file = int(self._file_of[match.member])
            pairs.append(
                Pair(
                    kind=match.kind,
                    dataset=dataset,
                    row=first_row + int(prints["row"][match.asked]),
                    id=ids[int(prints["row"][match.asked])],
                    image=int(prints["image"][match.asked]),
                    benchmark=self._name(file),
                    benchmark_row=self._first_rows[file] + int(self._prints["row"][match.member]),
                    benchmark_id=self._ids[file, int(self._prints["row"][match.member])],
                    benchmark_image=int(self._prints["image"][match.member]),
                    distance=match.distance,
                    difference=match.difference,
                    share=None,
                )
            )
        return pairs

    def match_texts(self, dataset: str, path: Path, *, first_row: int) -> list[Pair]:
        """Texts of a training shard that hold a benchmark's; arguments as for ``match_images``."""
        pairs: dict[tuple[int, int, int], Pair] = {}  # each sample and benchmark row once, with the largest share
        if self._texts.too_short.all():
            return []
        for group in read_samples(path, images=False):
            texts = [(sample, text) for sample in group for text in sample.texts]
            found = self._texts.search([text for _, text in texts])
            self._learn_ids({self._text_rows[member] for member in found[1]})
            for asked, member, share in zip(*found, strict=True):
                self._overlapping.add(int(member))
                file, row = self._text_rows[member]
                sample = texts[asked][0]
                key = (sample.row, file, row)
                if key not in pairs or (pairs[key].share or 0) < share:
                    pairs[key] = Pair(
                        kind="text",
                        dataset=dataset,
                        row=first_row + sample.row,
                        id=sample.id,
                        image=None,
                        benchmark=self._name(file),
                        benchmark_row=self._first_rows[file] + row,
                        benchmark_id=self._ids[file, row],
                        benchmark_image=None,
                        distance=None,
                        difference=None,
                        share=round(float(share), 4),
                    )
        return list(pairs.values())

    def findings(self) -> tuple[BenchmarkFindings, ...]:
        """What was found so far, by benchmark."""
        of_image = np.array([number for number, _ in self._files], int)[self._file_of]
        of_text = np.array([self._files[file][0] for file, _ in self._text_rows], int)
        entropy = self._prints["entropy"]
        rows = []
        for number, source in enumerate(self._sources):
            kinds = [kind for place, kind in self._kinds.items() if of_image[place] == number]
            mine = of_image == number
            rows.append(
                BenchmarkFindings(
                    name=source.name,
                    images=int(mine.sum()),
                    exact=kinds.count("exact"),
                    near=kinds.count("near"),
                    mirrored=kinds.count("mirrored"),
                    undecidable=int((mine & (entropy >= 0) & (entropy < self._thresholds.min_entropy)).sum()),
                    unreadable=int((mine & (entropy < 0)).sum()),
                    texts=int((of_text == number).sum()),
                    overlapping=sum(of_text[place] == number for place in self._overlapping),
                    too_short=int(((of_text == number) & self._texts.too_short).sum()),
                )
            )
        return tuple(rows)

    def _name(self, file: int) -> str:
        return self._sources[self._files[file][0]].name

    def _match_bytes(self, prints: NDArray[np.void]) -> list[_Match]:
        maybe = np.flatnonzero(np.isin(prints["sha256"][:, 0], self._heads))
        return [
            _Match(int(asked), member, "exact")
            for asked in maybe
            for member in self._by_sha256.get(prints["sha256"][asked].tobytes(), ())
        ]

    def _match_hashes(self, prints: NDArray[np.void]) -> list[_Match]:
        """Pairs whose hashes are near; of each training image the nearest few."""
        decidable = np.flatnonzero(prints["entropy"] >= self._thresholds.min_entropy)
        matches: list[_Match] = []
        for field, kind in (("hash", IMAGE_KINDS[1]), ("mirrored", IMAGE_KINDS[2])):
            asked, member, distance = self._index.search(prints[field][decidable])
            order = np.lexsort((distance, asked))
            asked, member, distance = asked[order], member[order], distance[order]
            starts = np.searchsorted(asked, asked)  # where each training image's candidates begin
            kept = np.arange(len(asked)) - starts < NEAREST
            for query, place, bits in zip(asked[kept], member[kept], distance[kept], strict=True):
                matches.append(_Match(int(decidable[query]), int(self._decidable[place]), kind, int(bits)))
        return matches

    def _look_at_pixels(self, path: Path, prints: NDArray[np.void], candidates: Sequence[_Match]) -> list[_Match]:
        """The candidates whose pixels are alike too; a symmetric image counts as near, not as mirrored."""
        by_image: dict[tuple[int, int], list[_Match]] = defaultdict(list)
        for match in candidates:
            by_image[int(prints["row"][match.asked]), int(prints["image"][match.asked])].append(match)
        self._read_thumbnails({match.member for match in candidates})
        found: dict[tuple[int, int], _Match] = {}
        for group in read_samples(path, rows={row for row, _ in by_image}, texts=False) if by_image else ():
            for sample in group:
                for number, data in enumerate(sample.images):
                    matches = by_image.get((sample.row, number), ())
                    thumbnail = make_thumbnail(data).astype(np.int16) if matches else None
                    for match in matches:
                        assert thumbnail is not None
                        mine = thumbnail[:, ::-1] if match.kind == "mirrored" else thumbnail
                        difference = float(np.abs(mine - self._thumbnails[match.member]).mean())
                        if difference <= self._thresholds.max_difference:
                            seen = _Match(match.asked, match.member, match.kind, match.distance, round(difference, 2))
                            found.setdefault((match.asked, match.member), seen)
        return list(found.values())

    def _read_thumbnails(self, members: Collection[int]) -> None:
        wanted: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # file, row, places
        for member in members:
            if member not in self._thumbnails:
                wanted[int(self._file_of[member])][int(self._prints["row"][member])].append(member)
        for file, rows in wanted.items():
            for group in read_samples(self._files[file][1], rows=rows.keys(), texts=False):
                for sample in group:
                    for member in rows[sample.row]:
                        self._thumbnails[member] = make_thumbnail(sample.images[int(self._prints["image"][member])])

    def _learn_ids(self, places: Iterable[tuple[int, int]]) -> None:
        wanted: dict[int, set[int]] = defaultdict(set)
        for file, row in places:
            if (file, row) not in self._ids:
                wanted[file].add(row)
        for file, rows in wanted.items():
            self._ids.update({(file, row): name for row, name in _read_ids(self._files[file][1], rows).items()})


def _read_ids(path: Path, rows: Collection[int]) -> dict[int, str]:
    if not rows:
        return {}
    return {
        sample.row: sample.id for group in read_samples(path, rows=rows, images=False, texts=False) for sample in group
    }


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
        digests = [shard.sha256 for shard in entry.shards]
        return Source(name, tuple(zip(snapshot.shards(name), digests, strict=True)))
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
