"""The draw: of each sample whether it is in, and if not, why.

Every decision is a hash of what the sample is, so neither the order of files nor their cut into shards changes what is
drawn, and what a smaller cap draws of a source is part of what a larger one draws. Per sample 45 bytes are in memory,
whatever its images and texts.

Source: Cambrian-1, arXiv:2406.16860, section 4: a cap on each source, then a ratio among categories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manyeyes.data.curation.duplicates import Images, find_exact, find_near
from manyeyes.data.curation.gathering import Gathering, Shard, shards_in_turn
from manyeyes.data.curation.noun_phrases import thin_out
from manyeyes.data.curation.recipe import CurationRecipe, FilterSpec
from manyeyes.data.fetching import ShardsOnDemand
from manyeyes.data.quarantine import rows_of
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import DataError, SnapshotError, did_you_mean

DRAWN = "drawn"
# What became of a sample, in the order in which it is asked.
FATES = (
    *(DRAWN, "unusable", "question length", "answer length", "text length", "pairs", "images", "image side"),
    *("image aspect", "script", "benchmark", "duplicate", "near duplicate", "noun phrases", "cap", "ratio", "total"),
)
_FATE = {name: number for number, name in enumerate(FATES)}
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Draw:
    """What became of every sample, in the order of the shards.

    Attributes:
        shards: Of all inputs.
        facts: Of each shard, the file of its facts.
        first_samples: Number of each shard's first sample, and of all samples at the end.
        sources: Names of sources.
        source: Of each sample, the number of its source.
        fate: Of each sample, the number of what became of it in ``FATES``.
        twin: Of each duplicate the sample that stays; -1 otherwise.
        details: Words about a sample's fate, where it has its own.
        rank: Place of each sample in the order in which they are drawn.
        phrases: Noun phrases, and those that are frequent enough; None without that filter.
    """

    shards: Sequence[Shard]
    facts: Sequence[Path]
    first_samples: NDArray[np.int64]
    sources: Sequence[str]
    source: NDArray[np.int32]
    fate: NDArray[np.uint8]
    twin: NDArray[np.int64]
    details: Mapping[int, str]
    rank: NDArray[np.int64]
    phrases: tuple[int, int] | None

    def name(self, sample: int) -> str:
        """A sample as a quarantine names it."""
        number = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        shard = self.shards[number]
        return f"{shard.dataset}#{shard.first_row + sample - int(self.first_samples[number])}"


def list_shards(recipe: CurationRecipe, snapshots: Sequence[Snapshot]) -> list[Shard]:
    """The shards of all inputs; none is fetched.

    Args:
        recipe: Names the data sets.
        snapshots: One for each of its inputs.

    Raises:
        SnapshotError: No such data set, one that holds no records, or one that is named twice.
        DataError: There is nothing to draw from.
    """
    shards: list[Shard] = []
    seen: set[str] = set()
    sources: dict[int, ShardsOnDemand | None] = {}  # one for each snapshot: it bounds what its shards take of the disk
    for number, (spec, snapshot) in enumerate(zip(recipe.inputs, snapshots, strict=True)):
        if id(snapshot) not in sources:
            sources[id(snapshot)] = snapshot.on_demand(list(snapshot.manifest.datasets))
        of_records = [name for name, entry in snapshot.manifest.datasets.items() if entry.layout == "records"]
        for name in of_records if spec.datasets is None else dict.fromkeys(spec.datasets):
            entry = snapshot.dataset(name)
            if entry.layout != "records":
                raise SnapshotError(
                    f'inputs.{number}.datasets names "{name}", a benchmark in the hub\'s columns',
                    f"a data set of records: {', '.join(of_records) or 'the snapshot has none'}",
                    did_you_mean(name, of_records) or "Leave it out.",
                )
            if name in seen:
                raise SnapshotError(
                    f'two inputs have the data set "{name}"', "each name once", "Leave one out of its input's datasets."
                )
            seen.add(name)
            first = 0
            for shard, path in zip(entry.shards, snapshot.shard_paths(name), strict=True):
                source = sources[id(snapshot)]
                shards.append(Shard(name, path, shard.sha256, shard.bytes, shard.rows, first, number, source))
                first += shard.rows
    if not any(shard.rows for shard in shards):
        raise DataError("the inputs have no sample", "a data set of records", "Name other inputs.")
    return shards


def draw_mixture(
    recipe: CurationRecipe,
    snapshots: Sequence[Snapshot],
    *,
    cache_dir: Path,
    progress: Progress | None = None,
    quarantine: frozenset[str] = frozenset(),
) -> Draw:
    """Decide of every sample.

    Args:
        recipe: What is drawn.
        snapshots: One for each of its inputs.
        cache_dir: Where what is known of shards is kept; a killed draw goes on at the next shard.
        progress: Called with a sentence and the share that is done.
        quarantine: Rows that cannot be used, as ``row_name`` writes them.

    Raises:
        SnapshotError: A data set or a shard is missing or damaged.
        DataError: There is nothing to draw from, or a category of the ratio has no sample.
        StorageError: No space or no permission for the cache.
    """
    shards = list_shards(recipe, snapshots)
    known = Gathering(recipe, snapshots, cache_dir=cache_dir)
    return _Drawing(recipe, shards, known, progress=progress or (lambda *_: None)).run(quarantine)


class _Drawing:
    def __init__(
        self, recipe: CurationRecipe, shards: Sequence[Shard], known: Gathering, *, progress: Progress
    ) -> None:
        self._recipe, self._shards, self._known, self._progress = recipe, shards, known, progress
        self._first_samples = np.cumsum([0, *(shard.rows for shard in shards)])
        count = int(self._first_samples[-1])
        self._content, self._words, self._id_hash = (np.zeros(count, np.uint64) for _ in range(3))
        self._images, self._source = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self._fate = np.zeros(count, np.uint8)
        self._twin = np.full(count, -1, np.int64)
        self._details: dict[int, str] = {}
        self._sources: dict[str, int] = {}
        self._facts: list[Path] = []
        self._phrases: tuple[int, int] | None = None

    def run(self, quarantine: frozenset[str]) -> Draw:
        recipe = self._recipe
        for number in self._in_turn("reading samples", self._known.facts_path):
            self._read_facts(number)
        for number, shard in enumerate(self._shards):
            if shard.first_row == 0:
                rows = np.array(rows_of(quarantine, shard.dataset), np.int64)
                self._leave_out("unusable", rows + self._first_samples[number])
        order = _mix(self._content, recipe.seed)
        self._rank = np.empty(len(order), np.int64)
        self._rank[np.lexsort((self._id_hash, order))] = np.arange(len(order))
        if self._known.looks_at_images:
            self._look_at_images()
        if recipe.duplicates.exact:
            self._leave_out_twins("duplicate", *find_exact(self._left(), self._content, rank=self._rank))
        if recipe.duplicates.near is not None:
            self._leave_out_near()
        if recipe.noun_phrases is not None:
            self._thin_out_captions()
        self._cap()
        self._balance()
        return Draw(
            self._shards,
            self._facts,
            self._first_samples,
            list(self._sources),
            self._source,
            self._fate,
            self._twin,
            self._details,
            self._rank,
            self._phrases,
        )

    def _step(self, what: str, number: int) -> None:
        shard = self._shards[number]
        self._progress(
            f"{what}: {shard.dataset}, shard {number + 1} of {len(self._shards)}", number / len(self._shards)
        )

    def _in_turn(self, what: str, *kept: Callable[[Shard], Path]) -> Iterator[int]:
        """The numbers of all shards; those of which something is not known are there when it is their turn."""
        unknown = [shard for shard in self._shards if not all(path(shard).is_file() for path in kept)]
        coming, awaited = shards_in_turn(unknown), {shard.path for shard in unknown}
        for number, shard in enumerate(self._shards):
            self._step(what, number)
            if shard.path in awaited:
                next(coming)
            yield number

    def _left(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._fate == 0)

    def _leave_out(self, fate: str, samples: NDArray[np.int64]) -> None:
        self._fate[samples] = _FATE[fate]

    def _leave_out_twins(self, fate: str, samples: NDArray[np.int64], twins: NDArray[np.int64]) -> None:
        self._leave_out(fate, samples)
        self._twin[samples] = twins

    def _read_facts(self, number: int) -> None:
        shard, start = self._shards[number], int(self._first_samples[number])
        path = self._known.read_facts(shard)
        self._facts.append(path)
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != shard.rows:
                raise SnapshotError(
                    f"shard {shard.path} has {file.metadata.num_rows:,} samples",
                    f"{shard.rows:,}, as the manifest says",
                    "Build the snapshot again.",
                )
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                rows = slice(start, start + len(table))
                start += len(table)
                columns = {
                    name: table.column(name).to_numpy() for name in table.column_names if name not in _TEXT_COLUMNS
                }
                self._content[rows], self._words[rows] = columns["content"], columns["words"]
                self._id_hash[rows], self._images[rows] = columns["id_hash"], columns["images"]
                names = table.column("source").combine_chunks().dictionary_encode()
                numbers = [self._sources.setdefault(name, len(self._sources)) for name in names.dictionary.to_pylist()]
                self._source[rows] = np.array(numbers, np.int32)[names.indices.to_numpy()]
                self._fate[rows] = _judge(columns, self._recipe.filters)
                for row, problem in enumerate(table.column("problem").to_pylist()):
                    if problem:
                        self._fate[rows.start + row] = _FATE["unusable"]
                        self._details[rows.start + row] = problem

    def _look_at_images(self) -> None:
        self._hashes = np.zeros(len(self._fate), np.uint64)
        self._entropy = np.zeros(len(self._fate), np.float32)
        kept = [self._known.fingerprints_path]
        if self._recipe.benchmarks is not None:
            kept.append(self._known.matches_path)
        for number in self._in_turn("comparing", *kept):
            shard, start = self._shards[number], int(self._first_samples[number])
            prints = self._known.fingerprint(shard)
            first = prints[prints["image"] == 0]
            self._hashes[start + first["row"].astype(np.int64)] = first["hash"]
            self._entropy[start + first["row"].astype(np.int64)] = first["entropy"]
            for row in np.unique(prints["row"][prints["entropy"] < 0]).tolist():
                self._leave_out_for("unusable", start + row, "an image cannot be decoded")
            if self._recipe.benchmarks is not None:
                for row, reason in self._known.match_benchmarks(shard).items():
                    self._leave_out_for("benchmark", start + row, reason)

    def _leave_out_for(self, fate: str, sample: int, detail: str) -> None:
        if self._fate[sample] == 0:
            self._fate[sample] = _FATE[fate]
            self._details[sample] = detail

    def _leave_out_near(self) -> None:
        spec = self._recipe.duplicates.near
        assert spec is not None
        left = self._left()
        same_words = spec.words == "same"
        seen = left[(self._images[left] > 0) & (self._entropy[left] >= spec.min_entropy)]
        self._progress("looking for near duplicates", 0.9)
        self._leave_out_twins(
            "near duplicate",
            *find_near(
                seen,
                hashes=self._hashes,
                keys=self._words if same_words else None,
                rank=self._rank,
                spec=spec,
                images=Images(self._shards, self._first_samples),
            ),
        )
        text_only = left[self._images[left] == 0]
        self._leave_out_twins("near duplicate", *find_exact(text_only, self._words, rank=self._rank))

    def _thin_out_captions(self) -> None:
        spec = self._recipe.noun_phrases
        assert spec is not None
        wanted = [name for name in self._sources if spec.fits(name)]
        if not wanted:
            raise DataError(
                f"noun_phrases.sources is {', '.join(spec.sources)}",
                f"a source of the inputs: {', '.join(self._sources)}",
                did_you_mean(spec.sources[0], self._sources) or "Correct the recipe.",
            )
        samples, phrases = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for number in self._in_turn("noun phrases", self._known.phrases_path):
            pairs = self._known.read_phrases(self._shards[number])
            of_pair = pairs["row"].astype(np.int64) + int(self._first_samples[number])
            left = self._fate[of_pair] == 0
            samples.append(of_pair[left])
            phrases.append(pairs["phrase"][left])
        kept, unique, frequent = thin_out(
            np.concatenate(samples),
            np.concatenate(phrases),
            rank=self._rank,
            min_count=spec.min_count,
            max_count=spec.max_count,
        )
        self._phrases = (unique, frequent)
        captions = np.isin(self._source, [self._sources[name] for name in wanted]) & (self._fate == 0)
        captions[kept] = False
        self._leave_out("noun phrases", np.flatnonzero(captions))

    def _cap(self) -> None:
        recipe = self._recipe
        caps = [recipe.source(name).cap or recipe.cap or len(self._fate) for name in self._sources]
        left = self._left()
        self._leave_out("cap", self._beyond(left, self._source[left], np.array(caps, np.int64)))

    def _balance(self) -> None:
        recipe, left = self._recipe, self._left()
        categories = list(dict.fromkeys(recipe.category(name) for name in self._sources))
        of_source = np.array([categories.index(recipe.category(name)) for name in self._sources], np.int32)
        category = of_source[self._source[left]]
        if recipe.ratio:
            counts = dict(zip(categories, np.bincount(category, minlength=len(categories)).tolist(), strict=True))
            shares = allot(counts, recipe.ratio, total=recipe.total)
            wanted = np.array([shares.get(name, 0) for name in categories], np.int64)
            self._leave_out("ratio", self._beyond(left, category, wanted))
        elif recipe.total is not None:
            self._leave_out("total", self._beyond(left, np.zeros_like(category), np.array([recipe.total])))

    def _beyond(
        self, samples: NDArray[np.int64], group: NDArray[np.int32], most: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Of each group, the samples after the first so many in the order in which they are drawn."""
        order = np.lexsort((self._rank[samples], group))
        sorted_groups = group[order]
        place = np.arange(len(order)) - np.searchsorted(sorted_groups, sorted_groups)
        beyond: NDArray[np.int64] = samples[order[place >= most[sorted_groups]]]
        return beyond


_TEXT_COLUMNS = ("id", "source", "problem")


def _mix(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Another order of hashes for each seed."""
    salt = np.frombuffer(hashlib.sha256(f"curation {seed}".encode()).digest()[:8], "<u8")[0]
    with np.errstate(over="ignore"):
        mixed = (hashes ^ salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(29))
    return result


def _judge(columns: Mapping[str, NDArray], filters: FilterSpec) -> NDArray[np.uint8]:
    """The first filter that each sample fails; 0 for none."""
    pictured = columns["images"] > 0
    fate = np.zeros(len(pictured), np.uint8)
    tests = (
        ("question length", "question_chars", "question_chars", filters.question_chars, True),
        ("answer length", "answer_chars", "answer_chars", filters.answer_chars, True),
        ("text length", "text_chars", "text_chars", filters.text_chars, True),
        ("pairs", "pairs", "pairs", filters.pairs, True),
        ("images", "images", "images", filters.images, True),
        ("image side", "shortest", "longest", filters.side, pictured),
        ("image aspect", "aspect", "aspect", filters.aspect, pictured),
    )
    for name, low, high, limits, concerned in tests:
        fails = np.zeros(len(fate), bool)
        if limits.min is not None:
            fails |= columns[low] < limits.min
        if limits.max is not None:
            fails |= columns[high] > limits.max
        fate[fails & concerned & (fate == 0)] = _FATE[name]
    if filters.scripts:
        fate[(columns["foreign"] > 1 - filters.script_share + 1e-6) & (fate == 0)] = _FATE["script"]
    return fate


def allot(counts: Mapping[str, int], ratio: Mapping[str, float], *, total: int | None) -> dict[str, int]:
    """How many samples of each category, none twice.

    Args:
        counts: Samples that there are, by category.
        ratio: Parts of each category; those without one get none.
        total: Most samples altogether; as many as the scarcest category allows by default.

    Returns:
        Samples by category, within one sample of the ratio.

    Raises:
        DataError: A category has a part and no sample.
    """
    parts = {name: part / sum(ratio.values()) for name, part in ratio.items()}
    empty = [name for name in parts if not counts.get(name)]
    if empty:
        raise DataError(
            f"ratio names {', '.join(empty)}, of which no sample is left",
            "samples of each category",
            f"Leave it out of ratio, or correct sources; there are: {', '.join(n for n in counts if counts[n])}.",
        )
    most = min(counts[name] / part for name, part in parts.items())
    goal = most if total is None else min(most, total)
    return {name: min(counts[name], int(part * goal + 0.5)) for name, part in parts.items()}
