"""``make bench``: every ratio side by side in one run, medians, the equality of results beside them.

Rules: one thread, process CPU time, A/B interleaved, the first round dropped, the median and quartiles of paired
ratios. A benchmark whose two sides do not give the same result fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.compare import evaluation, training
from manyeyes.data.snapshot import open_snapshot, read_default_remote, read_dvc_file
from manyeyes.model import build_model, save_checkpoint
from manyeyes.recipe import load_recipe


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same result.

    Attributes:
        name: What is compared.
        slow: The plain way.
        fast: Ours.
        equal: What is compared of the results, and whether it is equal.
    """

    name: str
    slow: Callable[[], object]
    fast: Callable[[], object]
    equal: Callable[[object, object], tuple[str, bool]]


def measure(comparison: Comparison, rounds: int) -> bool:
    """Run both sides in turn and print one line; whether the results were equal."""
    seconds: list[tuple[float, float]] = []
    results: tuple[object, object] = (None, None)
    for _ in range(rounds + 1):
        started = time.process_time()
        slow = comparison.slow()
        middle = time.process_time()
        fast = comparison.fast()
        seconds.append((middle - started, time.process_time() - middle))
        results = (slow, fast)
    ratios = [slow / fast for slow, fast in seconds[1:]]
    low, _, high = statistics.quantiles(ratios, n=4)
    slow_s, fast_s = (statistics.median(side) for side in zip(*seconds[1:], strict=True))
    evidence, equal = comparison.equal(*results)
    ratio = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
    verdict = "equal" if equal else "DIFFERENT"
    print(f"| {comparison.name} | {slow_s:.2f} | {fast_s:.2f} | {ratio} | {verdict}: {evidence} |", flush=True)
    return equal


def main() -> int:
    """Run every comparison; exit 1 if one is not equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[1]
    snapshot = open_snapshot(
        md5=read_dvc_file(root / "data.dvc").md5,
        remote=str(root / read_default_remote(root)),
        cache_dir=root / "runs" / "cache",
    )
    recipe = load_recipe("tiny")
    model, processor = build_model(recipe.model, snapshot_path=snapshot.path, seed=recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        save_checkpoint(model, processor, checkpoint)
        print("| comparison | plain, CPU s | ours, CPU s | ratio, median (quartiles) | results |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        comparisons = [
            Comparison(*training(recipe, snapshot, model, processor)),
            Comparison(*evaluation(recipe, snapshot, checkpoint)),
        ]
        equal = [measure(comparison, arguments.rounds) for comparison in comparisons]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
