"""What a model answered and scored, from wherever it was written: an evaluation's folder, or one of ``manyeyes score``.

Both have figures with a digest of what was asked, and every item's outcome; that is all that comparing needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.items import MultipleChoice
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, read_outcomes
from manyeyes.evaluation.score import ITEMS_FILE, SCORE_FILE, ScoreReport, read_json_lines
from manyeyes.evaluation.scorecard import Interval, read_scorecard

ANSWERS = "answers"
"""Kind of a model that is known by its answers alone."""


class AskedScore(Protocol):
    """A figure and what was asked for it; a scorecard's are such."""

    @property
    def variant(self) -> str:
        """Whose scoring."""

    @property
    def benchmark_digest(self) -> str:
        """Equal where the same questions were asked."""

    @property
    def multiple_choice(self) -> MultipleChoice:
        """How options were chosen."""

    @property
    def n(self) -> int:
        """Items."""

    @property
    def n_total(self) -> int:
        """Items that the benchmark has."""

    @property
    def score(self) -> float:
        """In the benchmark's unit."""

    @property
    def ci95(self) -> Interval:
        """Its 95% interval."""


@dataclass(frozen=True)
class Results:
    """What was found of one model.

    Attributes:
        name: As the user named it.
        digest: Of the checkpoint or the bundle; of the answers where nothing else is known.
        kind: ``torch``, ``bundle`` or ``answers``.
        recipe: Its name; empty for answers.
        data_md5: Of the snapshot; empty for answers.
        scores: By benchmark.
        items: Every item's answer.
    """

    name: str
    digest: str
    kind: str
    recipe: str
    data_md5: str
    scores: Mapping[str, AskedScore]
    items: OutcomeFile


@dataclass(frozen=True)
class _ScoredAnswers:
    """The figure of a folder of ``manyeyes score``."""

    variant: str
    benchmark_digest: str
    n: int
    n_total: int
    score: float
    ci95: Interval
    multiple_choice: MultipleChoice = "generate"


def read_results(path: Path, *, name: str = "", scorecard: str = "scorecard.json") -> Results:
    """Read a model's results.

    Args:
        path: A folder with a scorecard and ``items.parquet`` in it or in its folder ``scorecard``, or the scorecard;
            or a folder of ``manyeyes score``.
        name: For reports; the path when empty.
        scorecard: File name of the scorecard in a folder.

    Raises:
        EvaluationError: A file is missing or broken, or two do not belong together.
    """
    file = path
    if path.is_dir():
        file = path / scorecard
        if not file.is_file() and (path / "scorecard" / scorecard).is_file():
            file = path / "scorecard" / scorecard
        if not file.is_file() and ((path / SCORE_FILE).is_file() or (path / ITEMS_FILE).is_file()):
            return _read_scored_answers(path, name or str(path))
    card = read_scorecard(file)
    items = read_outcomes(file.parent / "items.parquet")
    digests = {benchmark: score.benchmark_digest for benchmark, score in card.benchmarks.items()}
    if items.model_digest != card.model.digest or dict(items.benchmark_digests) != digests:
        raise EvaluationError(
            f"{file.parent / 'items.parquet'} is of another evaluation than {file.name}",
            "the two files of one evaluation",
            "Evaluate the model again.",
        )
    return Results(
        name=name or str(path),
        digest=card.model.digest,
        kind=card.model.kind,
        recipe=card.recipe,
        data_md5=card.data_md5,
        scores=card.benchmarks,
        items=items,
    )


def _read_scored_answers(folder: Path, name: str) -> Results:
    path = folder / SCORE_FILE
    try:
        report = ScoreReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error})", "what `manyeyes score` writes", "Score the answers again."
        ) from error
    lines = read_json_lines(folder / ITEMS_FILE, needed="every item's outcome")
    if len(lines) != report.n or not report.references_digest:
        raise EvaluationError(
            f"{folder} has {len(lines):,} items in {ITEMS_FILE} and {report.n:,} in {SCORE_FILE}",
            "the two files of one `manyeyes score`",
            "Score the answers again.",
        )
    answers = json.dumps([[line.get("id"), line.get("prediction")] for line in lines])
    digest = hashlib.sha256(answers.encode()).hexdigest()
    digests = {report.benchmark: report.references_digest}
    return Results(
        name=name,
        digest=digest,
        kind=ANSWERS,
        recipe="",
        data_md5="",
        scores={
            report.benchmark: _ScoredAnswers(
                variant=report.variant,
                benchmark_digest=report.references_digest,
                n=report.n,
                n_total=report.n,
                score=report.score,
                ci95=report.ci95,
            )
        },
        items=OutcomeFile(digest, ANSWERS, digests, [_outcome(report.benchmark, line, folder) for line in lines]),
    )


def _outcome(benchmark: str, line: Mapping[str, Any], folder: Path) -> Outcome:
    try:
        return Outcome(
            benchmark=benchmark,
            id=line["id"],
            image_sha256="",
            question=line["question"],
            answer_type="",
            reference=line["reference"],
            prediction=line["prediction"] or "",
            parsed=line["parsed"],
            correct=line["score"],
            # Nothing was asked without the image, and comparing does not look at it.
            prediction_image_off="",
            parsed_image_off=None,
            correct_image_off=0.0,
            cluster_id=line["cluster"],
            facets=json.dumps(line["facets"], sort_keys=True),
        )
    except KeyError as error:
        raise EvaluationError(
            f"{folder / ITEMS_FILE} lacks {error} of an item",
            "what `manyeyes score` writes",
            "Score the answers again.",
        ) from error
