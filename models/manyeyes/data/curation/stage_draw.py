"""A stage's own draw: what it trains on of its data sets, with nothing copied.

The same draw as a curation's, of a cap on each source and a ratio among categories, so that what several caps or ratios
do to a model is found out on one snapshot; the winner's becomes a data set with ``curate``.

Source: Cambrian-1, arXiv:2406.16860, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydantic
from numpy.typing import NDArray

from manyeyes.data.curation.draw import Draw, Progress, draw_mixture
from manyeyes.data.curation.recipe import CurationRecipe, DuplicateSpec, InputSpec, SourceSpec
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import DataError
from manyeyes.recipe import DrawSpec
from manyeyes.recipe.loading import explain_invalid
from manyeyes.storage import file_lock


def curation_of(spec: DrawSpec, datasets: Sequence[str]) -> CurationRecipe:
    """The curation recipe that draws the same.

    Args:
        spec: What a stage says.
        datasets: Of its mixture.

    Raises:
        RecipeError: A category that there is not, or one without a part of the ratio.
    """
    try:
        return CurationRecipe(
            name="draw",
            seed=spec.seed,
            inputs=(InputSpec(datasets=tuple(dict.fromkeys(datasets))),),
            sources={name: SourceSpec(category=own.category, cap=own.cap) for name, own in spec.sources.items()},
            duplicates=DuplicateSpec(exact=False),
            cap=spec.cap,
            ratio=dict(spec.ratio),
            total=spec.total,
        )
    except pydantic.ValidationError as error:
        raise explain_invalid(error, where="draw", model=CurationRecipe, see="Fields: docs/curation.md") from error


def draw_of_stage(
    spec: DrawSpec,
    datasets: Sequence[str],
    snapshot: Snapshot,
    *,
    quarantine: frozenset[str],
    cache_dir: Path,
    progress: Progress | None = None,
) -> Draw:
    """Draw from the data sets of a stage; what is in quarantine is not drawn, and takes nobody's place.

    Args:
        spec: What the stage says.
        datasets: Of its mixture.
        snapshot: Where they are; every shard is read once, without its images, for facts that are kept.
        quarantine: Rows to leave out, as ``row_name`` writes them.
        cache_dir: Where the facts are kept; several processes share them.
        progress: Called with a sentence and the share that is done.

    Raises:
        RecipeError: As for ``curation_of``.
        SnapshotError: A data set or a shard is missing or damaged.
        DataError: A category of the ratio has no sample, or nothing is left.
    """
    recipe = curation_of(spec, datasets)
    # Of the processes that train, one reads the shards.
    with file_lock(cache_dir / "curation" / ".lock"):
        drawn = draw_mixture(recipe, [snapshot], cache_dir=cache_dir, progress=progress, quarantine=quarantine)
    if not (drawn.fate == 0).any():
        raise DataError(f"none of {len(drawn.fate):,} samples is drawn", "one at least", "Widen the stage's draw.")
    return drawn


def drawn_rows(drawn: Draw) -> Mapping[str, NDArray[np.int64]]:
    """Of each data set the rows that are drawn, ascending."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    for shard, start in zip(drawn.shards, drawn.first_samples, strict=False):
        rows = np.flatnonzero(drawn.fate[start : start + shard.rows] == 0) + shard.first_row
        found.setdefault(shard.dataset, []).append(rows)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def count_drawn(drawn: Draw, spec: DrawSpec) -> dict[str, int]:
    """Drawn samples by category, largest first."""
    recipe = curation_of(spec, [])
    counts = np.bincount(drawn.source[drawn.fate == 0], minlength=len(drawn.sources))
    found: dict[str, int] = {}
    for name, count in zip(drawn.sources, counts.tolist(), strict=True):
        category = recipe.category(name)
        found[category] = found.get(category, 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))
