"""Looks at every sample of some shards for a validation: the costly part of it, which several machines share."""

from __future__ import annotations

from pathlib import Path

from manyeyes.data.curation.parts import parse_part
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import cache_dir, parse_pinned
from manyeyes.pages import Table, step_page
from manyeyes.steps.validate_data import compared_with, fit_of


def profile_shards(reporter: Reporter, *, part: str, pinned: str, facts: Path) -> StepResult:
    """Leave what ``judge_snapshot`` asks of each shard: its rows of the profile, and what benchmarks share with it.

    What is known is taken from ``MANYEYES_CACHE``, where a killed step leaves it too.

    Args:
        reporter: Shows the progress.
        part: Which shards, from ``plan_validation``.
        pinned: From ``plan_validation``.
        facts: Folder to write; no image is in it.

    Raises:
        SnapshotError: A shard cannot be had or is damaged, or a benchmark is not there.
        SourceError: The language model's tokenizer cannot be had.
    """
    from manyeyes.data import profile
    from manyeyes.data.contamination.search import compare_shards
    from manyeyes.data.curation.gathering import hand_over

    inputs = parse_pinned(pinned)
    snapshot, benchmarks = inputs.snapshot, compared_with(inputs.recipe)
    shards = [(name, number) for name, first, end in parse_part(part) for number in range(first, end)]
    files = profile.profile_shards(
        snapshot,
        shards,
        **fit_of(inputs),
        progress=lambda sentence, done: reporter.progress(sentence, done=(0.5 if benchmarks else 1.0) * done),
    )
    if benchmarks:
        files += compare_shards(
            snapshot,
            shards,
            benchmarks=benchmarks,
            cache_dir=cache_dir() / "fingerprints",
            progress=lambda sentence, done: reporter.progress(sentence, done=0.5 + 0.5 * done),
        )
    hand_over(files, cache_dir=cache_dir(), out=facts)
    samples: dict[str, int] = {}
    for name, number in shards:
        samples[name] = samples.get(name, 0) + snapshot.dataset(name).shards[number].rows
    size = sum(path.stat().st_size for path in facts.glob("*/*"))
    table = Table(("data set", "samples"), [[name, f"{count:,}"] for name, count in samples.items()], numbers=(1,))
    headline = f"{sum(samples.values()):,} samples of {len(shards)} shards became {size / 1e6:,.1f} MB of facts"
    return StepResult(
        headline=headline,
        metrics={"samples": float(sum(samples.values())), "bytes_of_facts": float(size)},
        html=step_page("Facts for a validation", headline, {"": table}),
        markdown=table.markdown() + "\n",
        metadata={"data_md5": inputs.data_md5},
    )


STEP = Step(
    "profile_shards",
    profile_shards,
    imports=("manyeyes.data.contamination.search", "manyeyes.registry.tracking", "manyeyes.training.batches"),
    outputs=("facts",),
)
