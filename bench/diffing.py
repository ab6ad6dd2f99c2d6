"""``python -m bench.diffing``: two snapshots of 10,000 to 100,000 samples each, of which one in a hundred differs.

Each size is compared by a process of its own. Seconds are processor time; memory is the peak of the resident set. A run
fails where a count is wrong, or where memory at the largest size is more than a quarter above that at the smallest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.loader import peak_mb

SIZES = (10_000, 100_000)
EVERY = 100
MOST_GROWTH = 1.25


def make_snapshot(folder: Path, size: int, *, changed: bool) -> None:
    """Samples of text in shards of a tenth; changed, the first half has other answers in one of a hundred."""
    from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
    from manyeyes.data.records import Record, Turn
    from manyeyes.data.shards import write_shards

    def records() -> list[Record]:
        found = []
        for number in range(size):
            answer = f"{number}: " + "a long answer, " * 30
            if changed and number < size // 2 and number % EVERY == 0:
                answer += "otherwise"
            turns = (Turn("human", "what is it?"), Turn("gpt", answer))
            found.append(Record(f"made/{number}", "made", (), turns))
        return found

    write_shards(records(), folder / "made", "train", rows_per_shard=size // 10)
    write_snapshot_manifest(folder, provenance={"made-train": Provenance("CC0-1.0", "made for a bench")})


def measure(folder: Path, size: int) -> dict[str, object]:
    """Compare one size."""
    from manyeyes.data.diff import compare_snapshots, open_version

    before, after = (open_version(str(folder / f"{name}-{size}")) for name in ("a", "b"))
    started = time.process_time()
    found = compare_snapshots(before, after).datasets["made-train"]
    seconds = time.process_time() - started
    return {
        "samples": size,
        "cpu_s": round(seconds, 2),
        "peak_mb": round(peak_mb()),
        "shards_skipped": found.shards_skipped,
        "right": (found.changed, found.came, found.went) == (size // 2 // EVERY, 0, 0),
    }


def main() -> int:
    """Print the figures; exit 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("measure", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, size = arguments.measure
        print(json.dumps(measure(Path(folder), int(size))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in arguments.sizes:
            for name in ("a", "b"):
                make_snapshot(Path(temporary) / f"{name}-{size}", size, changed=name == "b")
            command = [sys.executable, "-m", "bench.diffing", temporary, str(size)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(json.dumps(rows[-1]), flush=True)
    flat = rows[-1]["peak_mb"] <= MOST_GROWTH * rows[0]["peak_mb"]
    return 0 if flat and all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
