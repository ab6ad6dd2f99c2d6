"""Scores anyone's answers: references and predictions in, one report and one line an item out. No model, no images."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BenchmarkRow, Graded, Row, find_benchmark
from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    IMAGES,
    CheckedRow,
    MissingColumnError,
    is_of_type,
    refuse_hidden,
)
from manyeyes.evaluation.scorecard import Asked, ScoredBenchmark
from manyeyes.evaluation.statistics.intervals import sub_score_intervals
from manyeyes.evaluation.statistics.significance import score_interval
from manyeyes.storage import check_out, write_file

LISTED_IDS = 20
DEEPEST = 64
"""Levels of a line's lists and objects. No benchmark has more than four, and Python gives up at about a thousand."""

SCORE_FILE, ITEMS_FILE = "score.json", "items.jsonl"
_REFERENCES = 'one object a line: {"id": ..., the benchmark\'s columns}'
_PREDICTIONS = 'one object a line: {"id": ..., "prediction": "..."}'


class ScoreReport(ScoredBenchmark):
    """``score.json``, and what ``manyeyes score --json`` prints. A missing prediction is an item, and wrong."""

    benchmark: str = Field(description="Row of BENCHMARKS.")
    missing: int = Field(ge=0, description="Items without a prediction.")
    unexpected: int = Field(ge=0, description="Predictions for items that the references lack; not scored.")
    duplicates: int = Field(ge=0, description="Further predictions or references of an id; the first counts.")
    empty: int = Field(ge=0, description="Predictions of nothing but white space; scored as any other text.")
    clusters: int = Field(ge=0, description="Images or documents behind the interval.")
    missing_ids: list[str] = Field(max_length=LISTED_IDS, description="The first of them.")
    unexpected_ids: list[str] = Field(max_length=LISTED_IDS, description="The first of them.")
    duplicate_ids: list[str] = Field(max_length=LISTED_IDS, description="The first of them.")
    empty_ids: list[str] = Field(max_length=LISTED_IDS, description="The first of them.")
    parse_failure_ids: list[str] = Field(max_length=LISTED_IDS, description="The first of them.")
    references_digest: str = Field(
        default="",
        description="sha256 over scorer, variant, judge and every scored reference's id and columns without images; "
        "scores compare only where it is equal.",
    )
    per_item: str = Field(description="Path of the JSON Lines with each item's outcome; empty when not written.")

    @property
    def asked(self) -> Asked:
        """What was asked for it; nobody knows how others chose between options."""
        return Asked(self.references_digest, self.n, "generate")


class JsonLine(dict[str, Any]):
    """One line of a file.

    Args:
        values: The object that it holds.
        where: File and line, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


@dataclass(frozen=True)
class ScoredItem:
    """One line of the per-item file.

    Attributes:
        graded: Its score.
        prediction: As written; ``None`` where it is missing.
    """

    graded: Graded
    prediction: str | None


@dataclass(frozen=True)
class Matched:
    """References and predictions, brought together by id.

    Attributes:
        known: Reference by id, in their order.
        digests: sha256 of each reference's columns without images, by id.
        answers: Prediction by id; an item without one is missing.
        unexpected: Ids of predictions that the references lack.
        repeated: Ids of further predictions or references.
    """

    known: Mapping[str, CheckedRow]
    digests: Mapping[str, str]
    answers: Mapping[str, str]
    unexpected: tuple[str, ...]
    repeated: tuple[str, ...]


def score_predictions(
    name: str,
    references: Sequence[Row],
    predictions: Sequence[Mapping[str, Any]],
    *,
    variant: str | None = None,
    seed: int | None = None,
    out: Path | None = None,
) -> ScoreReport:
    """Score predictions against references.

    Args:
        name: Row of ``BENCHMARKS``.
        references: ``id`` and the benchmark's columns; images may be left out.
        predictions: ``id`` and ``prediction``, in any order.
        variant: Whose scoring; the row's default for ``None``.
        seed: Turns on the random answer of parsers that fall back on one (MMMU), drawn in the references' order.
        out: Folder for ``score.json`` and ``items.jsonl``; nothing is written for ``None``.

    Raises:
        EvaluationError: Unknown benchmark or variant, one that a language model judges, no references, a missing or
            wrong column, a hidden answer, or two references of one id that differ; names file, line and field of what
            ``read_references`` and ``read_predictions`` gave.
        StorageError: No space, no permission, or no place for a folder; the latter two before anything is scored.
    """
    row = find_benchmark(name)
    if row.judged:
        raise EvaluationError(
            f"{name} is judged by a language model", "a judge", "Score it with: manyeyes judge, or manyeyes evaluate."
        )
    variant = row.check_variant(variant)
    if out is not None:
        check_out(out)
    matched = match_predictions(row, references, predictions)
    return build_score_report(row, variant, matched, grade_predictions(row, matched, variant, seed=seed), out=out)


def match_predictions(
    row: BenchmarkRow, references: Sequence[Row], predictions: Sequence[Mapping[str, Any]]
) -> Matched:
    """Find each item's answer.

    Args:
        row: The benchmark.
        references: ``id`` and the benchmark's columns; images may be left out.
        predictions: ``id`` and ``prediction``, in any order.

    Raises:
        EvaluationError: No references, two of one id that differ, a prediction without its columns, or predictions of
            which none has the id of a reference.
    """
    known, digests, repeated = _by_id(row, references)
    answers: dict[str, str] = {}
    unexpected: list[str] = []
    for number, prediction in enumerate(predictions, start=1):
        item_id, text = _read_prediction(prediction, number)
        if item_id not in known:
            unexpected.append(item_id)
        elif item_id in answers:
            repeated.append(item_id)
        else:
            answers[item_id] = text
    if unexpected and not answers:
        raise EvaluationError(
            f"none of {len(unexpected):,} predictions has the id of a reference (predictions: {_some(unexpected)}; "
            f"references: {_some(list(known))})",
            "the same ids in both files",
            f"The ids of {row.name} are described in docs/benchmarks.md.",
        )
    return Matched(
        known=known, digests=digests, answers=answers, unexpected=tuple(unexpected), repeated=tuple(repeated)
    )


def grade_predictions(
    row: BenchmarkRow, matched: Matched, variant: str, *, seed: int | None = None
) -> list[ScoredItem]:
    """Grade every item by rules; one without a prediction is wrong.

    Args:
        row: The benchmark.
        matched: Its references, and the predictions of them.
        variant: Whose scoring.
        seed: As ``score_predictions``.

    Raises:
        EvaluationError: A reference lacks a column that grading needs; names its place.
    """
    draw = random.Random(seed)
    items = []
    for item_id, reference in matched.known.items():
        prediction = matched.answers.get(item_id)
        try:
            graded = row.grade(reference, prediction or "", variant)
        except EvaluationError as error:
            raise reference.placed(error) from error
        if prediction is None:
            graded = as_missing(graded)
        elif graded.parsed is None and seed is not None and row.guess is not None:
            guessed = row.grade(reference, row.guess(reference, draw), variant)
            graded = replace(guessed, parsed=None)
        items.append(ScoredItem(graded, prediction))
    return items


def build_score_report(
    row: BenchmarkRow,
    variant: str,
    matched: Matched,
    items: Sequence[ScoredItem],
    *,
    out: Path | None,
    judge: str = "",
) -> ScoreReport:
    """The report on graded items.

    Args:
        row: The benchmark.
        variant: Whose scoring.
        matched: What was found in the two files.
        items: Graded, in the references' order.
        out: Folder for ``score.json`` and ``items.jsonl``; nothing is written for ``None``.
        judge: Language model that judged and what it was asked; empty for rules.

    Raises:
        StorageError: No space, or no permission.
    """
    graded = [item.graded for item in items]
    scores = row.aggregate(graded, variant)
    missing = [item.graded.id for item in items if item.prediction is None]
    empty = [item.graded.id for item in items if item.prediction is not None and not item.prediction.strip()]
    failures = [item.graded.id for item in items if item.prediction is not None and item.graded.parsed is None]
    asked = "\n".join(sorted(f"{item.id} {matched.digests[item.id]}" for item in graded))
    path = "" if out is None else str(_write_items(out / ITEMS_FILE, row, matched, items))
    report = ScoreReport(
        benchmark=row.name,
        variant=variant,
        score=scores["score"],
        unit=row.unit,
        scores={part: value for part, value in scores.items() if part != "score"},
        scores_ci95=sub_score_intervals(row, graded, variant),
        n=len(items),
        parse_failures=len(failures),
        missing=len(missing),
        unexpected=len(matched.unexpected),
        duplicates=len(matched.repeated),
        empty=len(empty),
        ci95=score_interval(row, graded, variant),
        clusters=len({item.cluster for item in graded}),
        missing_ids=missing[:LISTED_IDS],
        unexpected_ids=list(matched.unexpected[:LISTED_IDS]),
        duplicate_ids=list(matched.repeated[:LISTED_IDS]),
        empty_ids=empty[:LISTED_IDS],
        parse_failure_ids=failures[:LISTED_IDS],
        references_digest=hashlib.sha256("\n".join([row.scorer, variant, judge, asked]).encode()).hexdigest(),
        per_item=path,
    )
    if out is not None:
        write_file(out / SCORE_FILE, report.model_dump_json(indent=2) + "\n")
    return report


def as_missing(graded: Graded) -> Graded:
    """What a grader says of an empty text, made wrong: nothing was answered."""
    return replace(graded, parsed=None, score=0.0)


def read_json_lines(path: Path, *, needed: str) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; blank lines are left out, and a byte order mark is.

    Args:
        path: The file.
        needed: What it should hold, for the error.

    Raises:
        EvaluationError: No such file, no UTF-8, or a line that is not a JSON object, or is nested too deep.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read ({error})", needed, "Give a file of UTF-8 text.") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise EvaluationError(f"{where} is nested too deep", needed, "Fix the line.") from error
        except ValueError as error:  # Besides bad JSON, whole numbers of more digits than Python reads.
            raise EvaluationError(f"{where} is not JSON ({error})", needed, "Fix the line.") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{where} is no object", needed, "Fix the line.")
        if line.count("{") + line.count("[") > DEEPEST and _is_deeper(row, DEEPEST):
            raise EvaluationError(f"{where} is nested more than {DEEPEST} levels deep", needed, "Fix the line.")
        rows.append(JsonLine(row, where))
    return rows


def read_references(path: Path) -> list[dict[str, Any]]:
    """Read references; see ``read_json_lines``."""
    return read_json_lines(path, needed=_REFERENCES)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read predictions; see ``read_json_lines``.

    Raises:
        EvaluationError: As there, or the file holds none: a score of 0 would say that all answers are wrong.
    """
    rows = read_json_lines(path, needed=_PREDICTIONS)
    if not rows:
        raise EvaluationError(f"{path} holds no prediction", _PREDICTIONS, "Check the file.")
    return rows


def _by_id(row: BenchmarkRow, references: Sequence[Row]) -> tuple[dict[str, CheckedRow], dict[str, str], list[str]]:
    known: dict[str, CheckedRow] = {}
    digests: dict[str, str] = {}
    repeated: list[str] = []
    for number, reference in enumerate(references, start=1):
        where = _where(reference, f"{row.name} references, row {number}")
        whole = {column: _without_halves(value) for column, value in reference.items()}
        checked = CheckedRow(whole, row.columns, where)
        item_id = _read_id(checked["id"], where) if "id" in whole else row.item_id(checked)
        checked = CheckedRow({**whole, "id": item_id}, row.columns, where)
        refuse_hidden(row, {**whole, "id": item_id}, where)
        try:
            _shown(row.reference, checked)
        except EvaluationError as error:
            raise checked.placed(error) from error
        if item_id not in known:
            known[item_id] = checked
            digests[item_id] = _digest(row, whole)
        elif dict(known[item_id]) == dict(checked):
            repeated.append(item_id)
        else:
            raise EvaluationError(
                f'{where}: a second "{item_id}", which differs from the first',
                "one reference an id",
                "Make the ids unique; the benchmark's own are described in docs/benchmarks.md.",
            )
    if not known:
        raise EvaluationError("there are no references", _REFERENCES, "Check the file.")
    return known, digests, repeated


def unmatched(report: ScoreReport | Matched) -> str:
    """A sentence on predictions that match no reference; empty where all do."""
    ids = report.unexpected_ids if isinstance(report, ScoreReport) else list(report.unexpected)
    count = report.unexpected if isinstance(report, ScoreReport) else len(ids)
    return f"{count:,} predictions have the id of no reference and are not scored: {_some(ids, count)}" if count else ""


def _some(ids: Sequence[str], count: int | None = None) -> str:
    """The first of some ids, in words."""
    shown = ", ".join(json.dumps(item_id[:40], ensure_ascii=False) for item_id in ids[:3])
    return shown + (", ..." if (len(ids) if count is None else count) > 3 else "")


def _digest(row: BenchmarkRow, reference: Row) -> str:
    images = [name for name, kind in row.columns.items() if kind in (IMAGE, IMAGES)]
    columns = {name: reference[name] for name in row.columns if name in reference and name not in images}
    return hashlib.sha256(json.dumps(columns, sort_keys=True, default=str).encode()).hexdigest()


def _read_prediction(prediction: Mapping[str, Any], number: int) -> tuple[str, str]:
    where = _where(prediction, f"predictions, row {number}")
    for column in ("id", "prediction"):
        if column not in prediction:
            raise EvaluationError(
                f'{where} has no "{column}" (it has {", ".join(prediction)})', _PREDICTIONS, "Fix the row."
            )
    text = prediction["prediction"]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise EvaluationError(f'{where}: "prediction" is {type(text).__name__}', "text", "Write it as text.")
    return _read_id(_without_halves(prediction["id"]), where), str(_without_halves(text))


def _where(row: Mapping[str, Any], otherwise: str) -> str:
    return row.where if isinstance(row, JsonLine) else otherwise


def _read_id(value: object, where: str) -> str:
    if not is_of_type(value, ID):
        raise EvaluationError(f'{where}: "id" is {type(value).__name__} {str(value)[:60]!r}', ID, "Write it as text.")
    return str(value)


def _without_halves(value: Any) -> Any:
    """The value with U+FFFD for each half of a character beyond U+FFFF: JSON may have one alone, no file of text can.

    Halves that belong together become their character.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value
    if isinstance(value, list | tuple):
        return [_without_halves(part) for part in value]
    if isinstance(value, Mapping):
        return {_without_halves(name): _without_halves(part) for name, part in value.items()}
    return value


def _is_deeper(value: object, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(part, levels - 1) for part in parts)


def _write_items(path: Path, row: BenchmarkRow, matched: Matched, items: Sequence[ScoredItem]) -> Path:
    lines = [
        json.dumps(
            {
                "id": item.graded.id,
                "score": item.graded.score,
                "parsed": item.graded.parsed,
                "prediction": item.prediction,
                "missing": item.prediction is None,
                "cluster": item.graded.cluster,
                "facets": dict(item.graded.facets),
                "question": _shown(row.question, matched.known[item.graded.id]),
                "reference": _shown(row.reference, matched.known[item.graded.id]),
            },
            ensure_ascii=False,
        )
        for item in items
    ]
    write_file(path, ("\n".join(lines) + "\n"))
    return path


def _shown(part: Callable[[Row], str], reference: Row) -> str:
    """What a report shows of a reference; empty where it lacks the columns, which scoring may do without."""
    try:
        return part(reference)
    except MissingColumnError:
        return ""
