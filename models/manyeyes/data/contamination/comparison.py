"""What one training shard and benchmarks share.

Images in three looks, each at fewer: bytes (sha256), dHash, and the pixels of what dHash cannot tell apart. What is
found of a shard depends on it, on the benchmarks, the thresholds and the code alone, so it is kept by their digests, as
validation keeps the facts of shards: what is known of a shard is neither read nor fetched again.

``Benchmarks`` holds all benchmarks of a search at once: their fingerprints, hashes and texts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from manyeyes.data.contamination import fingerprints
from manyeyes.data.contamination.findings import Kind, Pair, Thresholds
from manyeyes.data.contamination.fingerprints import (
    DTYPE,
    HashIndex,
    TextIndex,
    count_rows,
    fingerprint_shard,
    fingerprints_path,
    make_thumbnail,
    read_samples,
    unreadable,
    within,
)
from manyeyes.data.profile import digest_of_code
from manyeyes.data.shards import ShardSource, open_shard
from manyeyes.data.snapshot import Snapshot
from manyeyes.data.validation_report import show_image
from manyeyes.errors import SnapshotError, did_you_mean
from manyeyes.pages import Picture
from manyeyes.runtime import preprocess
from manyeyes.sources import open_pinned, split_pin
from manyeyes.storage import content_digest, new_file, write_file
from manyeyes.strict import StrictModel

NEAREST = 16  # things of benchmarks that one training image is said to be alike with
EXAMPLES = 6  # of each kind, in the report
IMAGE_KINDS: tuple[Kind, ...] = ("exact", "near", "mirrored")
_TOGETHER = 2_000  # training images whose pairs are in memory at a time


@dataclass(frozen=True)
class ComparedShard:
    """A Parquet file of a training data set or of a benchmark.

    Attributes:
        path: Where it is or will be.
        sha256: Of the file.
        rows: Its samples.
        first_row: Its first one's place in the data set.
        source: Has it where it is not on this disk.
    """

    path: Path
    sha256: str
    rows: int
    first_row: int
    source: ShardSource | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What of a shard goes into what is found: samples without an id are called by the file's name."""
        return self.path.stem, self.sha256


@dataclass(frozen=True)
class Source:
    """A training data set or a benchmark.

    Attributes:
        name: For the report.
        shards: In order.
    """

    name: str
    shards: tuple[ComparedShard, ...]


def open_source(name: str, *, snapshot: Snapshot, on_demand: ShardSource | None = None) -> Source:
    """A data set of the snapshot by name, or Parquet files by path; nothing is fetched.

    Args:
        name: Of a data set, or the path of a Parquet file or of a folder with some, as ``open_pinned`` takes it.
        snapshot: Has the data set.
        on_demand: Has the shards of data sets; the snapshot's own when left out.

    Raises:
        SnapshotError: Neither.
        SourceError: The files are not those that the name's sha256 says.
    """
    name, digest = split_pin(name)
    if name in snapshot.manifest.datasets:
        entries = snapshot.dataset(name).shards
        return Source(
            name,
            _number(
                snapshot.shard_paths(name),
                [entry.sha256 for entry in entries],
                [entry.rows for entry in entries],
                on_demand or snapshot.on_demand([name]),
            ),
        )
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
    return Source(path.stem, _number(files, map(content_digest, files), map(count_rows, files), None))


def _number(
    paths: Sequence[Path], digests: Iterable[str], rows: Iterable[int], source: ShardSource | None
) -> tuple[ComparedShard, ...]:
    counts = list(rows)
    starts = itertools.accumulate(counts, initial=0)
    return tuple(
        ComparedShard(path, digest, count, start, source)
        for path, digest, count, start in zip(paths, digests, counts, starts, strict=False)
    )


class BenchmarkSize(StrictModel):
    """What there is of a benchmark to compare with; the fields are those of ``BenchmarkFindings``."""

    images: int
    undecidable: int
    unreadable: int
    texts: int
    too_short: int


class ShownPair(StrictModel):
    """A pair of the report, with the images as a page shows them: training's, then the benchmark's."""

    pair: Pair
    pictures: tuple[Picture | None, ...]


class ShardFindings(StrictModel):
    """What was found of one training shard; its pairs lie beside it."""

    images: int = Field(description="Each as often as it is used.")
    exact: int = Field(description="Of them, those whose very bytes a benchmark has.")
    near: int = Field(description="Further near duplicates.")
    mirrored: int = Field(description="Further near duplicates when mirrored.")
    undecidable: int = Field(description="Of which only the bytes were compared.")
    unreadable: int = Field(description="That cannot be decoded.")
    overlapping: int = Field(description="Samples with a text that holds a benchmark's.")
    samples: int = Field(description="Samples with any of these.")
    seen_images: tuple[tuple[int, Kind], ...] = Field(description="Of all benchmarks, by place, and how.")
    seen_texts: tuple[int, ...] = Field(description="Of all benchmarks, by place.")
    examples: tuple[ShownPair, ...] = Field(description="A few of each kind.")


class BenchmarkComparison:
    """Compares training shards with benchmarks, or knows what was found.

    Args:
        benchmarks: To compare with; read when the first shard is not known.
        cache_dir: Where fingerprints and findings are kept.
        thresholds: From where on two things are the same.
    """

    def __init__(self, benchmarks: Sequence[Source], *, cache_dir: Path, thresholds: Thresholds) -> None:
        self._sources, self._cache_dir, self._thresholds = benchmarks, cache_dir, thresholds
        code = digest_of_code(sys.modules[__name__], fingerprints, preprocess)
        named = [[source.name, [shard.key for shard in source.shards]] for source in benchmarks]
        self._made_with = [code, thresholds.model_dump(), named]

    def kept(self, shard: ComparedShard) -> Path:
        """Where what is found of a shard lies when it is known."""
        return self._kept(shard.key)

    def files(self, shard: ComparedShard) -> list[Path]:
        """All that is kept of a shard that was compared."""
        kept = self.kept(shard)
        return [kept, _pairs_of(kept), fingerprints_path(self._cache_dir, sha256=shard.sha256)]

    def compare(self, shard: ComparedShard) -> ShardFindings:
        """What is found of a shard.

        Memory: 62 bytes an image of the shard, and a few thousand pairs.

        Raises:
            SnapshotError: A file cannot be read or fetched, or has another number of rows than the manifest says.
            StorageError: No space or no permission for the cache.
        """
        kept = self._kept(shard.key)
        if not kept.is_file():
            findings = _FindingsWriter(shard, self.benchmarks, thresholds=self._thresholds)
            with new_file(_pairs_of(kept)) as file, file.open("w", encoding="utf-8", newline="\n") as lines:
                found = findings.write(lines.write, cache_dir=self._cache_dir)
            write_file(kept, found.model_dump_json())
        return ShardFindings.model_validate_json(kept.read_bytes())

    def pairs(self, shard: ComparedShard, *, dataset: str = "", first_row: int = 0) -> Iterator[Pair]:
        """The pairs of a shard that was compared.

        Args:
            shard: The shard.
            dataset: Its data set.
            first_row: From which number on its rows are counted.
        """
        with _pairs_of(self._kept(shard.key)).open("rb") as lines:
            for line in lines:
                pair = Pair.model_validate_json(line)
                yield pair.model_copy(update={"dataset": dataset, "row": first_row + pair.row})

    def sizes(self) -> tuple[BenchmarkSize, ...]:
        """What there is of each benchmark."""
        kept = self._kept("benchmarks")
        if not kept.is_file():
            write_file(kept, json.dumps([size.model_dump() for size in self.benchmarks.sizes()]))
        return tuple(map(BenchmarkSize.model_validate, json.loads(kept.read_bytes())))

    @cached_property
    def benchmarks(self) -> Benchmarks:
        """All that is compared with, in memory.

        Raises:
            SnapshotError: A file cannot be read.
            StorageError: No space or no permission for the cache.
        """
        return Benchmarks(self._sources, cache_dir=self._cache_dir, thresholds=self._thresholds)

    def _kept(self, what: object) -> Path:
        key = json.dumps([what, *self._made_with])
        return self._cache_dir / f"found-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()}.json"


def _pairs_of(kept: Path) -> Path:
    return kept.with_suffix(".pairs.jsonl")


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

    Memory: 130 bytes an image, 12 KiB for each with a candidate, 40 bytes an n-gram.

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
        self._files = [(number, shard) for number, source in enumerate(sources) for shard in source.shards]
        parts = [
            fingerprint_shard(shard.path, sha256=shard.sha256, cache_dir=cache_dir, source=shard.source)
            for _, shard in self._files
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
        texts: list[str] = []
        self._text_rows: list[tuple[int, int]] = []  # file and row of each text
        for file, (_, shard) in enumerate(self._files):
            for group in read_samples(shard.path, images=False, source=shard.source):
                for sample in group:
                    texts += sample.texts
                    self._text_rows += [(file, sample.row)] * len(sample.texts)
        self._texts = TextIndex(texts, n=thresholds.words, share=thresholds.min_share)

    def sizes(self) -> list[BenchmarkSize]:
        """What there is of each benchmark."""
        of_image = np.array([number for number, _ in self._files], int)[self._file_of]
        of_text = np.array([self._files[file][0] for file, _ in self._text_rows], int)
        entropy = self._prints["entropy"]
        return [
            BenchmarkSize(
                images=int((of_image == number).sum()),
                undecidable=int(
                    ((of_image == number) & (entropy >= 0) & (entropy < self._thresholds.min_entropy)).sum()
                ),
                unreadable=int(((of_image == number) & (entropy < 0)).sum()),
                texts=int((of_text == number).sum()),
                too_short=int(((of_text == number) & self._texts.too_short).sum()),
            )
            for number in range(len(self._sources))
        ]

    def match_images(
        self, shard: ComparedShard, prints: NDArray[np.void], seen: dict[int, Kind]
    ) -> Iterator[tuple[Pair, int]]:
        """Images of a training shard that a benchmark has too, each with at most ``NEAREST`` of each kind.

        Args:
            shard: The shard.
            prints: Its fingerprints, or some of them.
            seen: Gets the benchmarks' images that are found, by place, and the first of ``IMAGE_KINDS`` that they are.

        Yields:
            Pairs, rows counted in the shard, each with the place of the benchmark's image.
        """
        exact = self._match_bytes(prints, seen)
        candidates = [
            match
            for match in self._match_hashes(prints)
            if (prints["sha256"][match.asked] != self._prints["sha256"][match.member]).any()
        ]
        matches = sorted([*exact, *self._look_at_pixels(shard, prints, candidates)])
        ids = _read_ids(shard, {int(prints["row"][match.asked]) for match in matches})
        self._learn_ids({(int(self._file_of[m.member]), int(self._prints["row"][m.member])) for m in matches})
        for match in matches:
            seen[match.member] = min(seen.get(match.member, match.kind), match.kind, key=IMAGE_KINDS.index)
            file, row = int(self._file_of[match.member]), int(self._prints["row"][match.member])
            pair = Pair(
                kind=match.kind,
                dataset="",
                row=int(prints["row"][match.asked]),
                id=ids[int(prints["row"][match.asked])],
                image=int(prints["image"][match.asked]),
                **self._of_benchmark(file, row),
                benchmark_image=int(self._prints["image"][match.member]),
                distance=match.distance,
                difference=match.difference,
                share=None,
            )
            yield pair, match.member

    def match_texts(self, shard: ComparedShard, seen: set[int]) -> Iterator[Pair]:
        """Texts of a training shard that hold a benchmark's; each sample and benchmark row once.

        Args:
            shard: The shard.
            seen: Gets the benchmarks' texts that are found, by place.

        Yields:
            Pairs with the largest share, rows counted in the shard.
        """
        if self._texts.too_short.all():
            return
        for group in read_samples(shard.path, images=False, source=shard.source):
            texts = [(sample, text) for sample in group for text in sample.texts]
            found = self._texts.search([text for _, text in texts])
            self._learn_ids({self._text_rows[member] for member in found[1]})
            pairs: dict[tuple[int, int, int], Pair] = {}
            for asked, member, share in zip(*found, strict=True):
                seen.add(int(member))
                file, row = self._text_rows[member]
                sample = texts[asked][0]
                key = (sample.row, file, row)
                if key not in pairs or (pairs[key].share or 0) < share:
                    pairs[key] = Pair(
                        kind="text",
                        dataset="",
                        row=sample.row,
                        id=sample.id,
                        image=None,
                        **self._of_benchmark(file, row),
                        benchmark_image=None,
                        distance=None,
                        difference=None,
                        share=round(float(share), 4),
                    )
            yield from pairs.values()

    def read_image(self, member: int) -> bytes:
        """An image of a benchmark.

        Args:
            member: Its place among all.
        """
        shard, row = self._files[int(self._file_of[member])][1], int(self._prints["row"][member])
        (sample,) = next(iter(read_samples(shard.path, rows=[row], texts=False, source=shard.source)))
        return sample.images[int(self._prints["image"][member])]

    def _of_benchmark(self, file: int, row: int) -> dict[str, Any]:
        number, shard = self._files[file]
        return {
            "benchmark": self._sources[number].name,
            "benchmark_row": shard.first_row + row,
            "benchmark_id": self._ids[file, row],
        }

    def _match_bytes(self, prints: NDArray[np.void], seen: dict[int, Kind]) -> list[_Match]:
        matches = []
        for asked in np.flatnonzero(np.isin(prints["sha256"][:, 0], self._heads)).tolist():
            members = self._by_sha256.get(prints["sha256"][asked].tobytes(), ())
            matches += [_Match(asked, member, "exact") for member in members[:NEAREST]]
            if members and seen.get(members[-1]) != "exact":
                seen.update(dict.fromkeys(members, "exact"))
        return matches

    def _match_hashes(self, prints: NDArray[np.void]) -> list[_Match]:
        """Pairs whose hashes are near; of each training image the nearest few."""
        decidable = np.flatnonzero(prints["entropy"] >= self._thresholds.min_entropy)
        matches: list[_Match] = []
        for field, kind in (("hash", IMAGE_KINDS[1]), ("mirrored", IMAGE_KINDS[2])):
            hashes, which = np.unique(prints[field][decidable], return_inverse=True)  # many images may share one
            asked, member, distance = self._index.search(hashes)
            order = np.lexsort((distance, asked))
            asked, member, distance = asked[order], member[order], distance[order]
            starts = np.searchsorted(asked, np.arange(len(hashes)))
            counts = np.minimum(np.diff(starts, append=len(asked)), NEAREST)[which]
            places = np.repeat(starts[which], counts) + within(counts)
            for query, place in zip(np.repeat(decidable, counts).tolist(), places.tolist(), strict=True):
                matches.append(_Match(query, int(self._decidable[member[place]]), kind, int(distance[place])))
        return matches

    def _look_at_pixels(
        self, shard: ComparedShard, prints: NDArray[np.void], candidates: Sequence[_Match]
    ) -> list[_Match]:
        """The candidates whose pixels are alike too; a symmetric image counts as near, not as mirrored."""
        by_image: dict[tuple[int, int], list[_Match]] = defaultdict(list)
        for match in candidates:
            by_image[int(prints["row"][match.asked]), int(prints["image"][match.asked])].append(match)
        self._read_thumbnails({match.member for match in candidates})
        found: dict[tuple[int, int], _Match] = {}
        rows = {row for row, _ in by_image}
        for group in read_samples(shard.path, rows=rows, texts=False, source=shard.source) if rows else ():
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
            shard = self._files[file][1]
            for group in read_samples(shard.path, rows=rows.keys(), texts=False, source=shard.source):
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


def _read_ids(shard: ComparedShard, rows: Collection[int]) -> dict[int, str]:
    if not rows:
        return {}
    return {
        sample.row: sample.id
        for group in read_samples(shard.path, rows=rows, images=False, texts=False, source=shard.source)
        for sample in group
    }


class _FindingsWriter:
    """Looks at one shard."""

    def __init__(self, shard: ComparedShard, benchmarks: Benchmarks, *, thresholds: Thresholds) -> None:
        self._shard, self._benchmarks, self._thresholds = shard, benchmarks, thresholds
        self._seen_images: dict[int, Kind] = {}
        self._seen_texts: set[int] = set()
        self._kinds: dict[tuple[int, int], int] = {}  # of each image the first kind
        self._overlapping: set[int] = set()
        self._examples: dict[Kind, list[tuple[Pair, int]]] = {kind: [] for kind in (*IMAGE_KINDS, "text")}

    def write(self, write: Callable[[str], object], *, cache_dir: Path) -> ShardFindings:
        """Write the pairs, a line each, and sum up."""
        shard, seen = self._shard, self._seen_images
        self._check_rows()
        prints = fingerprint_shard(shard.path, sha256=shard.sha256, cache_dir=cache_dir, source=shard.source)
        entropy = prints["entropy"]
        parts = (prints[start : start + _TOGETHER] for start in range(0, len(prints), _TOGETHER))
        of_images = (found for part in parts for found in self._benchmarks.match_images(shard, part, seen))
        of_texts = ((pair, -1) for pair in self._benchmarks.match_texts(shard, self._seen_texts))
        for pair, member in itertools.chain(of_images, of_texts):
            write(pair.model_dump_json() + "\n")
            self._count(pair, member)
        kinds = list(self._kinds.values())
        return ShardFindings(
            images=len(prints),
            exact=kinds.count(0),
            near=kinds.count(1),
            mirrored=kinds.count(2),
            undecidable=int(((entropy >= 0) & (entropy < self._thresholds.min_entropy)).sum()),
            unreadable=int((entropy < 0).sum()),
            overlapping=len(self._overlapping),
            samples=len(self._overlapping | {row for row, _ in self._kinds}),
            seen_images=tuple(sorted(seen.items())),
            seen_texts=tuple(sorted(self._seen_texts)),
            examples=tuple(self._show(pair, member) for of_kind in self._examples.values() for pair, member in of_kind),
        )

    def _check_rows(self) -> None:
        shard = self._shard
        try:
            with open_shard(shard.path, shard.source) as file:
                rows = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise unreadable(shard.path, error) from error
        if rows != shard.rows:
            raise SnapshotError(
                f"shard {shard.path} has {rows:,} samples",
                f"{shard.rows:,}, as the manifest says",
                "Build the snapshot again.",
            )

    def _count(self, pair: Pair, member: int) -> None:
        if pair.image is None:
            self._overlapping.add(pair.row)
        else:
            kind = IMAGE_KINDS.index(pair.kind)
            self._kinds[pair.row, pair.image] = min(kind, self._kinds.get((pair.row, pair.image), kind))
        chosen = self._examples[pair.kind]
        chosen.append((pair, member))
        chosen.sort(key=lambda found: example_order(found[0]))
        del chosen[EXAMPLES:]

    def _show(self, pair: Pair, member: int) -> ShownPair:
        if pair.image is None:
            return ShownPair(pair=pair, pictures=())
        shard = self._shard
        (sample,) = next(iter(read_samples(shard.path, rows=[pair.row], texts=False, source=shard.source)))
        files = (sample.images[pair.image], self._benchmarks.read_image(member))
        return ShownPair(pair=pair, pictures=tuple(map(show_image, files)))


def example_order(pair: Pair) -> tuple[float, float]:
    """Of one kind, those come first of which one would most like to see that they are right."""
    return -(pair.difference or 0), pair.share or 0
