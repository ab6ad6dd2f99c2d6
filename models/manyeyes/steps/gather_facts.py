"""Looks at every sample of some shards for a curation: the costly part of it, which several machines share."""

from __future__ import annotations

from pathlib import Path

from manyeyes.data.curation.gathering import shards_in_turn
from manyeyes.data.curation.planned import parse_planned
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.pages import Table, step_page


def gather_facts(reporter: Reporter, *, part: str, pinned: str, facts: Path) -> StepResult:
    """Leave what a draw asks of each shard: facts, fingerprints of images, what benchmarks hold, noun phrases.

    Args:
        reporter: Shows the progress.
        part: Which shards, from ``plan_curation``.
        pinned: From ``plan_curation``.
        facts: Folder to write; no image is in it.

    Raises:
        SnapshotError: A shard cannot be had or is damaged, or a benchmark is not there.
    """
    planned = parse_planned(pinned)
    shards = planned.read_part(part)
    for number, shard in enumerate(shards_in_turn(shards)):
        reporter.progress(f"{shard.dataset}, shard {number + 1} of {len(shards)}", done=number / len(shards))
        planned.gather(shard, out=facts)
    samples = sum(shard.rows for shard in shards)
    size, read = (
        sum(sizes) for sizes in ([path.stat().st_size for path in facts.glob("*/*")], [s.size_bytes for s in shards])
    )
    datasets = {shard.dataset: 0 for shard in shards}
    for shard in shards:
        datasets[shard.dataset] += shard.rows
    table = Table(("data set", "samples"), [[name, f"{count:,}"] for name, count in datasets.items()], numbers=(1,))
    headline = f"{samples:,} samples, {read / 1e6:,.1f} MB became {size / 1e6:,.1f} MB of facts"
    return StepResult(
        headline=headline,
        metrics={"samples": float(samples), "bytes_read": float(read), "bytes_of_facts": float(size)},
        html=step_page("Facts for a curation", headline, {"": table}),
        markdown=table.markdown() + "\n",
        metadata={"data_md5": planned.data_md5},
    )


STEP = Step(
    "gather_facts",
    gather_facts,
    imports=("manyeyes.data.contamination.search", "manyeyes.registry.tracking"),
    outputs=("facts",),
)
