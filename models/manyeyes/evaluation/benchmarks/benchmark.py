"""What a benchmark is: its columns, what a model reads, and how an answer and a set of answers are scored.

Rows come in the hub's own schema, from Parquet or from JSON Lines. Everything here works without images and without a
model, so that anyone's answers can be scored; ``items`` reads a snapshot.

A benchmark that a language model judges also says how it is asked, and how its verdict is read.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from manyeyes.errors import EvaluationError, did_you_mean

Row = Mapping[str, Any]
"""One row of the benchmark's own columns, plus ``id``."""

STYLES = ("default", "llava", "cambrian", "eagle", "mini-gemini")
VARIANTS = ("official", "lmms", "vlmevalkit", "cambrian")

ROW_NUMBER = "row_number"
"""Column that the loader adds: the position in the split, from 0; the id of rows that have none of their own."""

# Types of columns, in the words of an error.
TEXT = "text"
TEXT_OR_NOTHING = "text or nothing"
TEXTS = "list of texts"
TEXT_OR_TEXTS = "text or list of texts"
WHOLE = "whole number"
INDEX = "whole number, also as text"
ID = "text or whole number"
NUMBER = "number"
NUMBER_OR_NOTHING = "number or nothing"
YES_NO = "true or false"
RECORD = "record"
RECORDS = "list of records"
ANSWERS = 'list of records with the text "answer"'
IMAGE = "image"
IMAGES = "list of images"
_IMAGE_TYPES = (IMAGE, IMAGES)

_WHOLE = re.compile(r"-?[0-9]{1,18}")

Unit = Literal["percent", "points", "relative"]
"""``relative`` is percent of what a reference answer gets, and may be above 100."""


@dataclass(frozen=True)
class Graded:
    """One item's answer, judged.

    What was answered is in ``parsed`` and ``score`` alone: a missing answer has ``None`` and 0, whatever the grader
    makes of an empty text. ``facets`` describe the reference. Items that are judged together (the two questions of an
    image, the rotations of a question) share the facet ``unit``; resampling renames it where a cluster is drawn twice.

    Attributes:
        id: Of the item.
        cluster: Image or document; what the item is not independent of.
        parsed: The answer read from the text, or ``None`` where none can be read.
        score: In [0, 1].
        facets: Whatever ``aggregate`` groups by: ``unit``, category, type, split, reference.
    """

    id: str
    cluster: str
    parsed: str | None
    score: float
    facets: Mapping[str, str] = field(default_factory=dict)


def mean_percent(graded: Sequence[Graded], variant: str) -> dict[str, float]:  # noqa: ARG001
    """Mean of the items' scores times 100: what ``BenchmarkRow.aggregate`` is unless a row says otherwise."""
    return {"score": 100 * sum(item.score for item in graded) / len(graded)}


def mean_percent_by(facet: str) -> Callable[[Sequence[Graded], str], dict[str, float]]:
    """Mean over all items times 100, and the same for each value of a facet under the value's name.

    Items that lack the facet, or have it empty, count in the mean over all.
    """

    def aggregate(graded: Sequence[Graded], variant: str) -> dict[str, float]:
        parts: dict[str, list[Graded]] = {}
        for item in graded:
            if item.facets.get(facet):
                parts.setdefault(item.facets[facet], []).append(item)
        by_value = {value: mean_percent(part, variant)["score"] for value, part in sorted(parts.items())}
        return mean_percent(graded, variant) | by_value

    return aggregate


def image_bytes(row: Row, column: str = "image") -> list[bytes]:
    """The image files of a column in the hub's struct (``bytes``, ``path``) or a list of such; empty without one.

    Raises:
        EvaluationError: An image is named and its bytes are not there.
    """
    value = row.get(column)
    values = value if isinstance(value, list | tuple) else [value]
    files: list[bytes] = []
    for image in (image for image in values if image is not None):
        file = image.get("bytes") if isinstance(image, Mapping) else image
        if not isinstance(file, bytes):
            raise EvaluationError(
                f'column "{column}" names an image ({str(image)[:60]}) and does not hold its bytes',
                "the hub's image struct with bytes",
                "Build the data set with its images embedded.",
            )
        files.append(file)
    return files


def cluster_by(column: str) -> Callable[[Row], str]:
    """The value of a column as the cluster; the item itself where the references lack the column."""

    def cluster(row: Row) -> str:
        value = row.get(column)
        return str(row["id"]) if value is None else str(value)

    return cluster


def facet_of(row: Row, column: str) -> str:
    """A column as text for a facet; empty where references lack it, which costs a sub-score and nothing else."""
    value = row.get(column)
    return "" if value is None else str(value)


def read_from(text: str, answer: str) -> str | None:
    """``answer``, or ``None`` where the prediction is nothing but white space: free answers fail to parse only then."""
    return answer if text.strip() else None


def by_item(row: Row) -> str:
    """The item itself as the cluster, where every item has its own image."""
    return str(row["id"])


def position(row: Row) -> str:
    """The row's position in the split, for benchmarks whose rows have no id of their own (lmms-eval's ``doc_id``)."""
    return str(row[ROW_NUMBER])


def no_chance(row: Row) -> float:  # noqa: ARG001
    """0: what guessing blindly gets where answers are free."""
    return 0.0


def _question(row: Row) -> str:
    return str(row["question"])


def _answer(row: Row) -> str:
    return str(row["answer"])


def _one_group(row: Row) -> str:  # noqa: ARG001
    return "all"


def itself(row: Row) -> Sequence[Row]:
    """One question: the row."""
    return [row]


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One benchmark: everything that decides a score, as data and small functions.

    Attributes:
        name: Key in ``BENCHMARKS``.
        title: For reports.
        hub_id: Data set on the hub, ``owner/name``.
        config: Its configuration; ``default`` where it has one only.
        split: The one that is scored, for instance ``validation``.
        hidden_splits: Splits whose answers the hub's copy does not have.
        columns: Column to its type in words (``TEXT``, ``TEXTS``, ``IMAGE``, ...). Reading a snapshot needs all of
            them; scoring answers needs those that ``grade`` asks for.
        licence: Of the data and who says so; ``unknown`` and why where nobody was found to say it.
        cambrian_group: ``general``, ``knowledge``, ``ocr-chart`` or ``vision-centric``; ``None`` outside Cambrian's 16.
        reported_by: Which of ``llava``, ``eagle``, ``cambrian``, ``mini-gemini`` report it.
        variants: Whose scoring there is to choose from; a subset of ``VARIANTS``.
        default_variant: The one that papers report.
        default_reason: Why that one.
        item_id: Stable id from the columns; ``position`` where they have none.
        cluster: Image or document of the row, from its columns.
        prompt: (row, style) to the text that the model reads; style is one of ``STYLES``.
        images: The row's image files.
        max_new_tokens: Longest answer.
        chance: What guessing blindly gets on this row, in [0, 1].
        grade: (row, prediction, variant) to the item's score; the prediction as it was written.
        aggregate: (items, variant) to ``{"score": ..., sub-scores}``.
        mean_scale: ``score`` is the mean of the items' scores times this; ``None`` where it is no mean, and intervals
            come from resampling clusters. 100 by itself where ``aggregate`` is ``mean_percent``.
        judged: A language model judges; without one the benchmark is skipped by name.
        scorer: Name and version of prompt, parser and metric; part of the digest.
        unit: Of ``score``.
        maximum: The best ``score`` there is.
        single_answer: Each item has one right answer, compared whole; then the best guess by question text is known.
        metric: What ``score`` is, in words for a report.
        question: The question as a report shows it.
        reference: What counts as right, as a report shows it.
        group: A report's part of the benchmark that the row belongs to.
        guess: A random answer, for parsers that fall back on one; used only where a seed is given and nothing was read.
        options: What a question's answer may be chosen from, in the words that its prompt asks for (``A``, ``B``; yes
            and no); empty for a row with a free answer, ``None`` where every row has one. Asked for where the recipe
            says ``multiple_choice: prefill``.
        images_config: Configuration that holds the images, where the hub keeps them apart, and
        images_key: the column of a row that names its image's ``id`` there.
        dataset: Data set of a snapshot; ``<name>-<split>`` when empty.
        unfold: A Parquet row's questions; itself unless the benchmark keeps several in a row.
    """

    name: str
    title: str
    hub_id: str
    config: str = "default"
    split: str
    hidden_splits: tuple[str, ...] = ()
    columns: Mapping[str, str]
    licence: str
    cambrian_group: str | None = None
    reported_by: tuple[str, ...] = ()
    variants: tuple[str, ...]
    default_variant: str
    default_reason: str
    item_id: Callable[[Row], str] = field(default=position, repr=False)
    cluster: Callable[[Row], str] = field(repr=False)
    prompt: Callable[[Row, str], str] = field(repr=False)
    images: Callable[[Row], Sequence[bytes]] = field(default=image_bytes, repr=False)
    max_new_tokens: int
    chance: Callable[[Row], float] = field(default=no_chance, repr=False)
    grade: Callable[[Row, str, str], Graded] = field(repr=False)
    aggregate: Callable[[Sequence[Graded], str], dict[str, float]] = field(default=mean_percent, repr=False)
    mean_scale: float | None = None
    judged: bool = False
    scorer: str
    unit: Unit = "percent"
    maximum: float = 100.0
    single_answer: bool = False
    metric: str = "percent right"
    question: Callable[[Row], str] = field(default=_question, repr=False)
    reference: Callable[[Row], str] = field(default=_answer, repr=False)
    group: Callable[[Row], str] = field(default=_one_group, repr=False)
    guess: Callable[[Row, random.Random], str] | None = field(default=None, repr=False)
    options: Callable[[Row], Sequence[str]] | None = field(default=None, repr=False)
    images_config: str = ""
    images_key: str = ""
    dataset: str = ""
    unfold: Callable[[Row], Sequence[Row]] = field(default=itself, repr=False)

    def __post_init__(self) -> None:
        """Fill in what follows from other fields."""
        if self.aggregate is mean_percent and self.mean_scale is None:
            object.__setattr__(self, "mean_scale", 100.0)
        if not self.dataset:
            object.__setattr__(self, "dataset", f"{self.name}-{self.split}")

    def check_variant(self, variant: str | None) -> str:
        """The variant to score with; the default one for ``None``.

        Raises:
            EvaluationError: The benchmark has no such variant.
        """
        if variant is None:
            return self.default_variant
        if variant not in self.variants:
            raise EvaluationError(
                f'variant is "{variant}"',
                f"{self.name} is scored as {', '.join(self.variants)}",
                f"{did_you_mean(variant, self.variants)}Leave it out for {self.default_variant}: {self.default_reason}",
            )
        return variant


class CheckedRow(Mapping[str, Any]):
    """A row that says which column is missing or of the wrong type, when it is asked for.

    Args:
        values: The row.
        columns: The benchmark's columns.
        where: Names the row in an error, for instance ``vqav2 references, line 3``.

    Raises:
        EvaluationError: (from ``row[column]`` and ``row.get``) No such column, or a wrong type.
    """

    def __init__(self, values: Row, columns: Mapping[str, str], where: str) -> None:
        self._given = values
        self._columns = columns
        self._where = where

    def __getitem__(self, column: str) -> Any:
        """The value of a column."""
        if column not in self._given:
            raise MissingColumnError(
                f'{self._where} has no column "{column}" (it has {", ".join(self._given)})',
                f'"{column}": {self._columns.get(column, "a column that the scoring reads")}',
                f"{did_you_mean(column, self._given)}Give it as the hub has it.",
            )
        value = self._given[column]
        kind = self._columns.get(column)
        if kind is not None and not is_of_type(value, kind):
            raise EvaluationError(
                f'{self._where}: column "{column}" holds {type(value).__name__} {str(value)[:60]!r}',
                f'"{column}": {kind}',
                "Give it as the hub has it.",
            )
        return value

    def placed(self, error: EvaluationError) -> EvaluationError:
        """The error of a grader, which does not know where the row is, with its place."""
        if error.found.startswith(self._where):
            return error
        return type(error)(f"{self._where}: {error.found}", error.needed, error.do)

    def __iter__(self) -> Iterator[str]:
        """The columns that are there."""
        return iter(self._given)

    def __len__(self) -> int:
        """How many columns are there."""
        return len(self._given)

    def __contains__(self, column: object) -> bool:
        """Whether the column is there."""
        return column in self._given

    def get(self, column: str, default: Any = None) -> Any:
        """The value of a column, or the default where it is missing."""
        return self[column] if column in self._given else default


def hides_answer(row: BenchmarkRow, values: Row, where: str) -> bool:
    """Whether what stands for the answer only says that it is not public: ``?``, nothing, ``-1`` for an option.

    Args:
        row: The benchmark.
        values: The columns of one row; images may be left out.
        where: Names the row in an error.

    Raises:
        EvaluationError: A column that has the options is of another type.
    """
    found = [values[column] for column in _ANSWER_COLUMNS if column in row.columns and column in values]
    if any(_is_mark(value, _HIDDEN) for value in found):
        return True
    # An index or a letter is never these, but a number that is asked for may be -1.
    is_choice = row.options is not None and any(_is_mark(value, _NO_OPTION) for value in found)
    return is_choice and row.options is not None and bool(row.options(CheckedRow(values, row.columns, where)))


def refuse_hidden(row: BenchmarkRow, values: Row, where: str) -> None:
    """Refuse a row whose answer is hidden, which nothing can be right about.

    Args:
        row: The benchmark.
        values: As for ``hides_answer``.
        where: Names the row in the error.

    Raises:
        EvaluationError: It is, or as ``hides_answer``.
    """
    if hides_answer(row, values, where):
        shown = next(f'"{column}" is {values[column]!r}'[:80] for column in _ANSWER_COLUMNS if column in values)
        hidden = f", those of {' and '.join(row.hidden_splits)} are hidden" if row.hidden_splits else ""
        raise EvaluationError(
            f"{where}: {shown}, which hides the answer",
            "rows whose answers are public",
            f"{row.name} is scored on its split {row.split}, whose answers are{hidden}.",
        )


_ANSWER_COLUMNS = ("answer", "answers", "gpt_answer", "Correct Answer")
_HIDDEN = ("", "?")
_NO_OPTION = ("-1", "nan")


def _is_mark(value: object, marks: Sequence[str]) -> bool:
    if isinstance(value, Mapping):
        return "answer" in value and _is_mark(value["answer"], marks)
    if isinstance(value, list | tuple):
        return all(_is_mark(part, marks) for part in value) and ("" in marks or bool(value))
    if value is None:
        return "" in marks
    return str(value).strip().lower() in marks if isinstance(value, str | int) else False


class MissingColumnError(EvaluationError):
    """A row lacks a column that the benchmark has."""


def is_of_type(value: object, kind: str) -> bool:
    """Whether a value read from Parquet or JSON is of a column's type.

    Args:
        value: From the row.
        kind: One of this module's types.
    """
    if kind.endswith(" or nothing") and value is None:
        return True
    match kind.removesuffix(" or nothing"):
        case "text":
            return isinstance(value, str)
        case "whole number":
            return isinstance(value, int) and not isinstance(value, bool)
        case "whole number, also as text":
            return is_of_type(value, WHOLE) or (isinstance(value, str) and _WHOLE.fullmatch(value) is not None)
        case "text or whole number":
            return isinstance(value, str | int) and not isinstance(value, bool)
        case "number":
            return is_of_type(value, WHOLE) or (isinstance(value, float) and math.isfinite(value))
        case "true or false":
            return isinstance(value, bool)
        case "text or list of texts":
            return is_of_type(value, TEXT) or is_of_type(value, TEXTS)
        case "list of texts":
            return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
        case "record":
            return isinstance(value, Mapping)
        case "list of records":
            return isinstance(value, list | tuple) and all(isinstance(part, Mapping) for part in value)
        case 'list of records with the text "answer"':
            return isinstance(value, list | tuple) and all(
                isinstance(part, Mapping) and isinstance(part.get("answer"), str) for part in value
            )
        case "image":
            # References may keep the name of an image that was left out.
            return value is None or isinstance(value, bytes | Mapping | str)
        case "list of images":
            return value is None or isinstance(value, list | tuple)
    raise ValueError(f"no such type of column: {kind}")


@dataclass(frozen=True)
class Judging:
    """What a judge is asked about one benchmark's answers.

    Attributes:
        ask: (row, prediction, variant) to the conversation, ``role`` and ``content`` of each turn; ``None`` where no
            judge is needed.
        read: (row, prediction, judge's text, variant) to the graded item; ``None`` where the text makes no sense.
        direct: (row, prediction, variant) to the graded item where no judge is needed.
        temperature: What the benchmark's authors used.
        max_tokens: Longest verdict.
        prompts: Name and version of the texts above; part of a report.
        example: A judge's text that makes sense, with which a row is tried out before anybody is asked.
    """

    ask: Callable[[Row, str, str], Sequence[Mapping[str, str]] | None]
    read: Callable[[Row, str, str, str], Graded | None]
    temperature: float
    max_tokens: int
    prompts: str
    example: str
    direct: Callable[[Row, str, str], Graded] | None = None


def needs_judge(row: Row, prediction: str, variant: str) -> Graded:  # noqa: ARG001
    """The ``grade`` of a benchmark that only a judge can grade.

    Raises:
        EvaluationError: Always.
    """
    raise EvaluationError(
        f'the answer to "{row["id"]}" is free text',
        "a language model that judges it",
        "Score it with: manyeyes judge; or give evaluation.judge in the recipe.",
    )
