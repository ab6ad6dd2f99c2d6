"""Parts of a curation's inputs, which several steps look at side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manyeyes.errors import PipelineError

if TYPE_CHECKING:
    from manyeyes.data.curation.gathering import Shard

# Side by side: every pod more makes the one object larger in which Kubernetes keeps a run.
MAX_PARTS = 12
# A pod takes as long to start as these take to be looked at.
PART_BYTES = 1 << 28


def cut_into_parts(shards: Sequence[Shard]) -> list[str]:
    """Shares of about the same size for at most ``MAX_PARTS`` steps.

    Each is text, of lines that name consecutive shards of one data set: its name, the first one's number and the number
    after the last one's. A small data set is never cut.

    Args:
        shards: Of all inputs.
    """
    goal = max(PART_BYTES, sum(shard.size_bytes for shard in shards) // MAX_PARTS)
    runs: list[tuple[int, str, int, int]] = []  # bytes, data set, first, end
    for shard in shards:
        size, dataset, first, end = runs[-1] if runs else (0, "", 0, 0)
        if dataset != shard.dataset:
            runs.append((shard.size_bytes, shard.dataset, 0, 1))
        elif size + shard.size_bytes > goal:
            runs.append((shard.size_bytes, dataset, end, end + 1))
        else:
            runs[-1] = (size + shard.size_bytes, dataset, first, end + 1)
    parts: list[list[str]] = [[] for _ in range(min(MAX_PARTS, len(runs)))]
    loads = [0] * len(parts)
    for size, *run in sorted(runs, key=lambda run: -run[0]):
        least = loads.index(min(loads))
        parts[least].append(json.dumps(run))
        loads[least] += size
    return ["\n".join(lines) for lines in parts]


def part_key(part: str) -> str:
    """What tells a part apart in a step's name.

    Raises:
        PipelineError: Not one of ``cut_into_parts``.
    """
    (dataset, first, _), *more = parse_part(part)
    return f"{dataset}{f' from {first}' if first else ''}{f' and {len(more)} more' if more else ''}"


def parse_part(part: str) -> list[tuple[str, int, int]]:
    """Of each line the data set, the first shard's number, and the number after the last one's.

    Raises:
        PipelineError: Not one of ``cut_into_parts``.
    """
    try:
        return [(str(dataset), int(first), int(end)) for dataset, first, end in map(json.loads, part.split("\n"))]
    except (ValueError, TypeError) as error:
        raise PipelineError(
            f"part is {part[:60]!r}", 'lines such as ["llava-train", 0, 12]', "Pass on what plan_curation gave."
        ) from error
