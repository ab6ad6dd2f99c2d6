"""The benchmarks, one a file; ``BENCHMARKS`` is the table."""

from __future__ import annotations

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError, did_you_mean
from manyeyes.evaluation.benchmarks.ai2d import AI2D
from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow, Graded, Row
from manyeyes.evaluation.benchmarks.chartqa import CHARTQA
from manyeyes.evaluation.benchmarks.cv_bench import CV_BENCH
from manyeyes.evaluation.benchmarks.docvqa import DOCVQA, INFOVQA
from manyeyes.evaluation.benchmarks.easy_vqa import EASY_VQA
from manyeyes.evaluation.benchmarks.gqa import GQA
from manyeyes.evaluation.benchmarks.items import Benchmark, Item, MultipleChoice, load_benchmark
from manyeyes.evaluation.benchmarks.llava_bench import LLAVA_BENCH_COCO, LLAVA_BENCH_WILD
from manyeyes.evaluation.benchmarks.mathvista import MATHVISTA
from manyeyes.evaluation.benchmarks.mm_vet import MM_VET
from manyeyes.evaluation.benchmarks.mmbench import MMBENCH
from manyeyes.evaluation.benchmarks.mme import MME
from manyeyes.evaluation.benchmarks.mmmu import MMMU
from manyeyes.evaluation.benchmarks.mmvp import MMVP
from manyeyes.evaluation.benchmarks.ocrbench import OCRBENCH
from manyeyes.evaluation.benchmarks.pope import POPE
from manyeyes.evaluation.benchmarks.realworldqa import REALWORLDQA
from manyeyes.evaluation.benchmarks.scienceqa import SCIENCEQA
from manyeyes.evaluation.benchmarks.seed import SEED
from manyeyes.evaluation.benchmarks.textvqa import TEXTVQA
from manyeyes.evaluation.benchmarks.vizwiz import VIZWIZ
from manyeyes.evaluation.benchmarks.vqav2 import VQAV2
from manyeyes.recipe import EvaluationSpec

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkRow",
    "Graded",
    "Item",
    "MultipleChoice",
    "Row",
    "find_benchmark",
    "load_benchmark",
    "load_benchmarks",
]

# One row a line, so that a new benchmark is one line here and one import above.
BENCHMARKS: dict[str, BenchmarkRow] = {
    row.name: row
    for row in (
        VQAV2,
        GQA,
        VIZWIZ,
        TEXTVQA,
        OCRBENCH,
        CHARTQA,
        DOCVQA,
        INFOVQA,
        AI2D,
        SCIENCEQA,
        MME,
        MMBENCH,
        SEED,
        MATHVISTA,
        MMMU,
        POPE,
        MMVP,
        REALWORLDQA,
        CV_BENCH,
        LLAVA_BENCH_COCO,
        LLAVA_BENCH_WILD,
        MM_VET,
        EASY_VQA,
    )
}  # fmt: skip


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


def load_benchmarks(spec: EvaluationSpec, *, snapshot: Snapshot, max_items: int | None = None) -> list[Benchmark]:
    """The benchmarks of a recipe, in its order, with its prompts and variants.

    Args:
        spec: The recipe's ``evaluation``.
        snapshot: Has the data sets.
        max_items: First N questions of each; the recipe's own limit for ``None``.

    Raises:
        EvaluationError: Unknown benchmark or variant, or a data set without questions or with other columns.
        SnapshotError: The snapshot lacks a data set.
    """
    rows = [find_benchmark(name) for name in spec.benchmarks]
    return [
        load_benchmark(
            row,
            snapshot=snapshot,
            max_items=spec.max_items if max_items is None else max_items,
            variant=spec.variants.get(row.name),
            style=spec.prompts,
            multiple_choice=spec.multiple_choice,
        )
        for row in rows
    ]
