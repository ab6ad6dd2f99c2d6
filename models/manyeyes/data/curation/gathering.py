"""What a curation knows of a shard on its own, which is its costly part: every text is read, every image decoded.

Facts, fingerprints of images, what benchmarks hold, and noun phrases. Each is a file, kept by the shard's sha256 and by
what of the recipe it depends on: another cap or ratio looks at nothing again, and several machines may share the
shards, whose files are then put together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.contamination.comparison import BenchmarkComparison, ComparedShard, Source, open_source
from manyeyes.data.contamination.fingerprints import fingerprint_shard, fingerprints_path
from manyeyes.data.curation.facts import facts_path, read_facts
from manyeyes.data.curation.noun_phrases import phrases_path, read_phrases
from manyeyes.data.curation.recipe import CurationRecipe, DuplicateSpec, FilterSpec, NearSpec, NounPhraseSpec
from manyeyes.data.fetching import ShardsOnDemand, in_turn
from manyeyes.data.snapshot import Snapshot
from manyeyes.storage import link_or_copy, storage_errors, write_file

_VERSION = 1
# Folders of a cache, and of what was found elsewhere.
_CURATION, _FINGERPRINTS = "curation", "fingerprints"
_FOLDERS = (_CURATION, _FINGERPRINTS, "profiles")


@dataclass(frozen=True)
class Shard:
    """One shard of an input.

    Attributes:
        dataset: Its data set.
        path: Where it is or will be.
        sha256: As the manifest says.
        size_bytes: Of the file.
        rows: Samples.
        first_row: Its first sample's place in the data set.
        snapshot: Number of its input.
        source: Has it where it is not on this disk.
    """

    dataset: str
    path: Path
    sha256: str
    size_bytes: int
    rows: int
    first_row: int
    snapshot: int
    source: ShardsOnDemand | None = None


def shards_in_turn(shards: Sequence[Shard]) -> Iterator[Shard]:
    """Shards one after the other, each on this disk when it is its turn, the next few being fetched.

    Raises:
        SnapshotError: A shard is missing or damaged.
        StorageError: No space or no permission.
    """
    coming = {
        source: in_turn([shard.path for shard in shards if shard.source is source], source)
        for source in dict.fromkeys(shard.source for shard in shards)
    }
    for shard in shards:
        next(coming[shard.source])
        yield shard


def gathering_recipe(recipe: CurationRecipe) -> CurationRecipe:
    """What of a recipe the files of a shard depend on; whatever else differs, they are the same."""
    near, phrases = recipe.duplicates.near, recipe.noun_phrases
    return CurationRecipe(
        name="gathering",
        filters=FilterSpec(scripts=recipe.filters.scripts),
        duplicates=DuplicateSpec(near=None if near is None else NearSpec()),
        benchmarks=recipe.benchmarks,
        noun_phrases=None if phrases is None else NounPhraseSpec(sources=phrases.sources),
    )


class Gathering:
    """What is known of shards, from the cache or made now.

    Args:
        recipe: Says what is asked.
        snapshots: Where its benchmarks are.
        cache_dir: Folder of the cache; made when missing.
    """

    def __init__(self, recipe: CurationRecipe, snapshots: Sequence[Snapshot], *, cache_dir: Path) -> None:
        self._recipe, self._snapshots, self._cache_dir = recipe, snapshots, cache_dir

    @property
    def looks_at_images(self) -> bool:
        """Whether images are decoded."""
        return self._recipe.duplicates.near is not None or self._recipe.benchmarks is not None

    def facts_path(self, shard: Shard) -> Path:
        """Where a shard's facts are kept."""
        return facts_path(self._cache_dir / _CURATION, sha256=shard.sha256, scripts=self._recipe.filters.scripts)

    def fingerprints_path(self, shard: Shard) -> Path:
        """Where a shard's fingerprints are kept."""
        return fingerprints_path(self._cache_dir / _FINGERPRINTS, sha256=shard.sha256)

    def matches_path(self, shard: Shard) -> Path:
        """Where it is kept what benchmarks hold of a shard."""
        return self._cache_dir / _CURATION / f"{shard.sha256}-benchmarks-{self._benchmarks_key}.json"

    def phrases_path(self, shard: Shard) -> Path:
        """Where a shard's noun phrases are kept."""
        spec = self._recipe.noun_phrases
        assert spec is not None
        return phrases_path(self._cache_dir / _CURATION, sha256=shard.sha256, of=spec.sources)

    def read_facts(self, shard: Shard) -> Path:
        """The file of a shard's facts; errors as for ``facts.read_facts``."""
        return read_facts(
            shard.path,
            sha256=shard.sha256,
            cache_dir=self._cache_dir / _CURATION,
            scripts=self._recipe.filters.scripts,
            source=shard.source,
        )

    def fingerprint(self, shard: Shard) -> NDArray[np.void]:
        """Fingerprints of a shard's images; errors as for ``fingerprint_shard``."""
        return fingerprint_shard(
            shard.path, sha256=shard.sha256, cache_dir=self._cache_dir / _FINGERPRINTS, source=shard.source
        )

    def match_benchmarks(self, shard: Shard) -> dict[int, str]:
        """By row of a shard why it is a benchmark's; errors as for ``BenchmarkComparison``."""
        kept = self.matches_path(shard)
        if kept.is_file():
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        compared = ComparedShard(shard.path, shard.sha256, shard.rows, shard.first_row, shard.source)
        self._comparison.compare(compared)
        reasons: dict[int, str] = {}
        for pair in self._comparison.pairs(compared):
            reasons.setdefault(pair.row, pair.reason())
        write_file(kept, json.dumps(list(reasons.items())), flush=False)
        return reasons

    def read_phrases(self, shard: Shard) -> NDArray[np.void]:
        """Noun phrases of a shard's captions, as ``noun_phrases.read_phrases`` gives them."""
        spec = self._recipe.noun_phrases
        assert spec is not None
        return read_phrases(
            shard.path,
            sha256=shard.sha256,
            cache_dir=self._cache_dir / _CURATION,
            is_caption=spec.fits,
            of=spec.sources,
            source=shard.source,
        )

    def gather(self, shard: Shard) -> list[Path]:
        """Have all that a draw will ask of a shard, and say in which files it is.

        Raises:
            SnapshotError: The shard is damaged, or a benchmark is not there.
            StorageError: No space or no permission for the cache.
        """
        recipe = self._recipe
        files = [self.read_facts(shard)]
        if self.looks_at_images:
            self.fingerprint(shard)
            files.append(self.fingerprints_path(shard))
        if recipe.benchmarks is not None:
            self.match_benchmarks(shard)
            files.append(self.matches_path(shard))
        if recipe.noun_phrases is not None:
            self.read_phrases(shard)
            files.append(self.phrases_path(shard))
        return files

    @cached_property
    def _sources(self) -> list[Source]:
        assert self._recipe.benchmarks is not None
        found = []
        for name in dict.fromkeys(self._recipe.benchmarks.names):
            owner = next((each for each in self._snapshots if name in each.manifest.datasets), self._snapshots[0])
            found.append(open_source(name, snapshot=owner))
        return found

    @cached_property
    def _comparison(self) -> BenchmarkComparison:
        assert self._recipe.benchmarks is not None
        return BenchmarkComparison(
            self._sources,
            cache_dir=self._cache_dir / _FINGERPRINTS,
            thresholds=self._recipe.benchmarks.thresholds,
        )

    @cached_property
    def _benchmarks_key(self) -> str:
        spec = self._recipe.benchmarks
        assert spec is not None
        held = [(source.name, [shard.sha256 for shard in source.shards]) for source in self._sources]
        facts = [_VERSION, spec.thresholds.model_dump(), held]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def hand_over(files: Sequence[Path], *, cache_dir: Path, out: Path) -> None:
    """Put files of this machine's cache into a folder for ``take_over``.

    Args:
        files: What is known of shards.
        cache_dir: They are in its folders.
        out: The folder.

    Raises:
        StorageError: No space or no permission.
    """
    with storage_errors(out):
        for file in files:
            target = out / file.relative_to(cache_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)


def take_over(folder: Path, *, cache_dir: Path) -> None:
    """Put what was handed over elsewhere into this machine's cache, where it is not known.

    Args:
        folder: From ``hand_over``.
        cache_dir: Of whoever is to know it.

    Raises:
        StorageError: No space or no permission.
    """
    with storage_errors(cache_dir):
        for file in sorted(path for path in folder.glob("*/*") if path.parent.name in _FOLDERS):
            target = cache_dir / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_file():
                link_or_copy(file, target)
