"""``python -m bench.processes MODEL``: answering in one process against several, by the clock.

One process has all cores; N processes have their share of them each. Both are loaded before the clock starts, caches
are off, A/B interleaved, the first round dropped. The work of one thread, timed before and after, says whether the
machine was busy with something else; a run whose answers differ fails.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot, open_snapshot, read_default_remote, read_dvc_file
from manyeyes.evaluation.answering.answerers import Answerer, AnswererSpec
from manyeyes.evaluation.answering.asking import open_answerer
from manyeyes.harness.base import num_cores
from manyeyes.runtime import Group

MOST_TOKENS = 8
# Above this change of the probe, the figures say more about the machine than about the processes.
MOST_DRIFT = 0.05


def read_batches(snapshot: Snapshot, *, images: int, batch_size: int) -> list[list[Group]]:
    """The first questions of easy-VQA's test set, in batches of ``batch_size`` images."""
    reader = RecordReader(snapshot.shards("easy-vqa-test"))
    groups = []
    for index in range(images):
        record = reader.read(index)
        questions = tuple(turn.text.replace("<image>\n", "") for turn in record.turns[::2])
        groups.append(Group(tuple(image.data for image in record.images), questions))
    return [list(batch) for batch in (groups[start : start + batch_size] for start in range(0, images, batch_size))]


def answer(answerer: Answerer, batches: Sequence[Sequence[Group]]) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds by the clock, and every answer's tokens in the order of the questions."""
    started = time.perf_counter()
    found = {index: answers for index, answers, _ in answerer.answer_batches(batches, max_new_tokens=MOST_TOKENS)}
    seconds = time.perf_counter() - started
    batch_answers = itertools.chain.from_iterable(found[index] for index in range(len(batches)))
    return seconds, [each.token_ids for group in batch_answers for each in group]


def probe() -> float:
    """Seconds of a fixed piece of work on one thread."""
    data = bytes(1 << 28)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    return time.perf_counter() - started


def main() -> int:
    """Print one line; exit 1 if the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="Folder of a checkpoint or a bundle.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    snapshot = open_snapshot(
        md5=read_dvc_file(root / "data.dvc").md5,
        remote=str(root / read_default_remote(root)),
        cache_dir=root / "runs" / "cache",
    )
    batches = read_batches(snapshot, images=arguments.images, batch_size=arguments.batch_size)
    kind = "bundle" if (arguments.model / "manifest.json").is_file() else "torch"
    spec = AnswererSpec(kind, arguments.model, threads=num_cores())
    before = probe()
    seconds: list[tuple[float, float]] = []
    with (
        open_answerer(spec, processes=1) as one,
        open_answerer(spec, processes=arguments.processes) as several,
    ):
        for _ in range(arguments.rounds + 1):
            alone, answers = answer(one, batches)
            together, again = answer(several, batches)
            seconds.append((alone, together))
            if again != answers:
                differing = sum(a != b for a, b in zip(answers, again, strict=True))
                print(f"DIFFERENT: {differing} of {len(answers)} answers", file=sys.stderr)
                return 1
    drift = probe() / before - 1
    ratios = [alone / together for alone, together in seconds[1:]]
    low, _, high = statistics.quantiles(ratios, n=4)
    alone, together = (statistics.median(side) for side in zip(*seconds[1:], strict=True))
    name = f"{kind}, {len(answers)} questions on {arguments.images} images, {num_cores()} cores"
    print(f"| {name}: 1 / {arguments.processes} processes | {alone:.2f} | {together:.2f} ", end="")
    print(f"| {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) | equal: {len(answers)} answers |")
    if abs(drift) > MOST_DRIFT:
        print(f"The machine was busy with something else: the probe took {100 * drift:+.0f}% at the end.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
