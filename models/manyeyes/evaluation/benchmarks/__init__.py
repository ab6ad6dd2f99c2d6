"""The benchmarks, one a file; ``BENCHMARKS`` is the table."""

from __future__ import annotations

from manyeyes.errors import EvaluationError, did_you_mean
from manyeyes.evaluation.benchmarks.benchmark import Asked, Benchmark, BenchmarkRow, Item, load_benchmark
from manyeyes.evaluation.benchmarks.easy_vqa import EASY_VQA

__all__ = ["BENCHMARKS", "Asked", "Benchmark", "BenchmarkRow", "Item", "find_benchmark", "load_benchmark"]

BENCHMARKS: dict[str, BenchmarkRow] = {
    "easy-vqa": EASY_VQA,
}


def find_benchmark(name: str) -> BenchmarkRow:
    """A row of ``BENCHMARKS``.

    Raises:
        EvaluationError: No such benchmark; offers the nearest spelling.
    """
    if name not in BENCHMARKS:
        raise EvaluationError(
            f'benchmark is "{name}"',
            "no such benchmark",
            f"{did_you_mean(name, BENCHMARKS)}There are: {', '.join(BENCHMARKS)}.",
        )
    return BENCHMARKS[name]
