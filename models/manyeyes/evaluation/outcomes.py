"""``items.parquet``: what a model answered to each question, one row a question.

The file's metadata names the model and the benchmarks, so that outcomes are never compared with those of other
questions.

``average_groups`` makes Cambrian-1's four groups of four benchmarks. Each benchmark counts as percent of its maximum:
MME's perception by 20, OCRBench by 10. CV-Bench counts twice, as its 2D and its 3D part, whose mean its score is. A
group that lacks a benchmark has no average, and says what it lacks.

Source: Cambrian-1, arXiv:2406.16860, table 1 and section 2.2.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.benchmarks.benchmark import Graded
from manyeyes.evaluation.scorecard import BenchmarkScore, GroupAverage
from manyeyes.evaluation.statistics.intervals import average_interval
from manyeyes.storage import write_file

_METADATA = b"manyeyes"


@dataclass(frozen=True)
class Outcome:
    """One question, answered with the image and without it.

    Attributes:
        benchmark: Row of ``BENCHMARKS``.
        id: Of the item.
        image_sha256: Of its first image; the cluster of the intervals. Empty without images: the item is its own.
        question: As the data set has it.
        answer_type: Group within the benchmark.
        reference: What counts as right.
        prediction: What the model wrote.
        parsed: The answer read from it, or ``None``.
        correct: Its score in [0, 1].
        prediction_image_off: What the model wrote without the image.
        parsed_image_off: The answer read from that, or ``None``.
        correct_image_off: Its score in [0, 1].
        cluster_id: Image or document by the benchmark's own columns; empty where the first image says it.
        facets: JSON object of what the benchmark's ``aggregate`` groups by.
        prediction_grey: What the model wrote on a grey image; ``None`` where it was not asked.
        correct_grey: Its score in [0, 1].
        prediction_other_image: What the model wrote on another item's image; ``None`` where it was not asked.
        correct_other_image: Its score in [0, 1].
    """

    benchmark: str
    id: str
    image_sha256: str
    question: str
    answer_type: str
    reference: str
    prediction: str
    parsed: str | None
    correct: float
    prediction_image_off: str
    parsed_image_off: str | None
    correct_image_off: float
    cluster_id: str = ""
    facets: str = "{}"
    prediction_grey: str | None = None
    correct_grey: float | None = None
    prediction_other_image: str | None = None
    correct_other_image: float | None = None

    @property
    def cluster(self) -> str:
        """What the outcome is not independent of."""
        return self.cluster_id or self.image_sha256 or self.id

    @property
    def graded(self) -> Graded:
        """The outcome with the image, as the benchmark's ``aggregate`` takes it."""
        return Graded(self.id, self.cluster, self.parsed, self.correct, json.loads(self.facets))


@dataclass(frozen=True)
class OutcomeFile:
    """What ``items.parquet`` holds.

    Attributes:
        model_digest: Digest of the checkpoint or of the bundle.
        kind: ``torch`` or ``bundle``.
        benchmark_digests: By benchmark.
        outcomes: One a question.
    """

    model_digest: str
    kind: str
    benchmark_digests: Mapping[str, str]
    outcomes: Sequence[Outcome]

    def of(self, benchmark: str) -> list[Outcome]:
        """The outcomes of one benchmark, in file order."""
        return [outcome for outcome in self.outcomes if outcome.benchmark == benchmark]


_COLUMNS = [field.name for field in fields(Outcome)]
_FIRST_COLUMNS = _COLUMNS[: _COLUMNS.index("cluster_id")]
"""Those of files that were written before scores other than means were compared."""

_SCHEMA = pa.schema(
    [pa.field(name, pa.float64() if name.startswith("correct") else pa.string()) for name in _COLUMNS],
)


def write_outcomes(contents: OutcomeFile, path: Path) -> None:
    """Write ``items.parquet``; whole or not at all, the same bytes for the same contents.

    Raises:
        StorageError: No space, or no permission.
    """
    about = {
        "format_version": 1,
        "model_digest": contents.model_digest,
        "kind": contents.kind,
        "benchmark_digests": dict(contents.benchmark_digests),
    }
    table = pa.Table.from_pylist([asdict(outcome) for outcome in contents.outcomes], schema=_SCHEMA)
    table = table.replace_schema_metadata({_METADATA: json.dumps(about, sort_keys=True)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_file(path, buffer.getvalue())


def read_outcomes(path: Path) -> OutcomeFile:
    """Read ``items.parquet``.

    Raises:
        EvaluationError: Missing, or not such a file.
    """
    wrong = "the items.parquet that `manyeyes evaluate` writes"
    if not path.is_file():
        raise EvaluationError(f"no file {path}", wrong, "Run the evaluate step first.")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise EvaluationError(f"{path} is not Parquet ({error})", wrong, "Evaluate the model again.") from error
    about: dict[str, Any] = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    if table.column_names not in (_COLUMNS, _FIRST_COLUMNS) or about.get("format_version") != 1:
        raise EvaluationError(
            f"{path} has the columns {', '.join(table.column_names)}", wrong, "Evaluate the model again."
        )
    return OutcomeFile(
        model_digest=about["model_digest"],
        kind=about["kind"],
        benchmark_digests=about["benchmark_digests"],
        outcomes=[Outcome(**row) for row in table.to_pylist()],
    )


GROUPS: dict[str, tuple[str, ...]] = {
    "general": ("mme", "mmbench", "seed", "gqa"),
    "knowledge": ("scienceqa", "mmmu", "mathvista", "ai2d"),
    "ocr-chart": ("chartqa", "ocrbench", "textvqa", "docvqa"),
    "vision-centric": ("mmvp", "realworldqa", "cv-bench", "cv-bench"),
}
"""Name of the group to its benchmarks; one that stands twice counts twice."""


def average_groups(benchmarks: Mapping[str, BenchmarkScore], outcomes: Sequence[Outcome]) -> dict[str, GroupAverage]:
    """The average of each group of which two benchmarks or more are scored, by name, in the groups' order.

    Args:
        benchmarks: Scores by benchmark.
        outcomes: Every item's answer; the intervals are drawn from them.
    """
    groups: dict[str, GroupAverage] = {}
    for group, names in GROUPS.items():
        percents = {
            name: round(100 * benchmarks[name].score / benchmarks[name].maximum, 4)
            for name in dict.fromkeys(names)
            if name in benchmarks
        }
        missing = [name for name in dict.fromkeys(names) if name not in benchmarks]
        if len(percents) < 2:
            continue
        if missing:
            groups[group] = GroupAverage(score=None, ci95=None, parts=percents, missing=missing)
            continue
        score = sum(percents[name] for name in names) / len(names)
        parts = {
            name: (
                find_benchmark(name),
                [outcome.graded for outcome in outcomes if outcome.benchmark == name],
                benchmarks[name].variant,
            )
            for name in percents
        }
        # A benchmark that stands twice is drawn the same way twice, so that its halves go together.
        low, high = average_interval([parts[name] for name in names])
        groups[group] = GroupAverage(
            score=round(score, 4),
            ci95=(round(max(0.0, min(low, score)), 4), round(min(100.0, max(high, score)), 4)),
            parts=percents,
            missing=[],
        )
    return groups
