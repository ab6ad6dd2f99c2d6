"""What a benchmark is: a data set of the snapshot, how its records become items, and how answers are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from manyeyes.chat import without_placeholders
from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError


@dataclass(frozen=True)
class Asked:
    """One question of a record, before the benchmark's prompt is put around it.

    Attributes:
        question: As the data set has it, without image placeholders.
        reference: The answer that counts as right.
        answer_type: A row of ``BenchmarkRow.answer_types``.
    """

    question: str
    reference: str
    answer_type: str


@dataclass(frozen=True)
class Item:
    """One question that a model answers.

    Attributes:
        id: Record id and number of the question in it, for instance ``easy-vqa/test/3#0``.
        record: Index of the record in the data set.
        image_sha256s: Of the record's images, in order; the first one is the cluster of the interval.
        question: As the data set has it.
        prompt: What the model reads.
        reference: The answer that counts as right.
        answer_type: Group within the benchmark.
    """

    id: str
    record: int
    image_sha256s: tuple[str, ...]
    question: str
    prompt: str
    reference: str
    answer_type: str


@dataclass(frozen=True)
class BenchmarkRow:
    """One benchmark: everything that decides a score, as data and three small functions.

    Attributes:
        name: Key in ``BENCHMARKS``.
        title: For reports.
        dataset: A data set of the snapshot.
        prompt: What the model reads; ``{question}`` stands for the question.
        ask: A record's questions, in order.
        parse: The answer that a text gives, or ``None`` where it gives none: that counts as wrong and as a parse
            failure.
        score: How right a parsed answer is, in [0, 1].
        scorer: Name and version of prompt handling, parser and scorer; part of the digest.
        chance: Percent that guessing blindly gets, by answer type; its keys are the answer types.
        source: Where the questions come from, with the licence.
        metric: What the score is, in words for a report.
    """

    name: str
    title: str
    dataset: str
    prompt: str
    ask: Callable[[Record], Sequence[Asked]] = field(repr=False)
    parse: Callable[[str], str | None] = field(repr=False)
    score: Callable[[str, str], float] = field(repr=False)
    scorer: str
    chance: dict[str, float]
    source: str
    metric: str

    @property
    def answer_types(self) -> tuple[str, ...]:
        """The groups of the report, in order."""
        return tuple(self.chance)

    def grade(self, text: str, reference: str) -> tuple[str | None, float]:
        """The answer read from a text, ``None`` where there is none, and its score in [0, 1]."""
        parsed = self.parse(text)
        return parsed, 0.0 if parsed is None else self.score(parsed, reference)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's items on one snapshot.

    Attributes:
        row: What is asked and how it is scored.
        items: The questions that are asked, ordered by record.
        n_total: How many questions there are when ``max_items`` does not cut.
        reader: Reads the records again, for their images.
    """

    row: BenchmarkRow
    items: tuple[Item, ...]
    n_total: int
    reader: RecordReader = field(repr=False)

    @property
    def digest(self) -> str:
        """sha256 over scorer and every item's id, images, prompt and reference; equal digests ask the same thing."""
        lines = sorted(
            json.dumps([item.id, item.image_sha256s, item.prompt, item.reference], ensure_ascii=False)
            for item in self.items
        )
        return hashlib.sha256("\n".join([self.row.scorer, *lines]).encode()).hexdigest()

    @property
    def question_only_ceiling(self) -> float:
        """Percent that the best guess per question text gets on these very items; more, image off, means a leak."""
        counts: dict[str, dict[str, int]] = {}
        for item in self.items:
            answers = counts.setdefault(item.prompt, {})
            answers[item.reference] = answers.get(item.reference, 0) + 1
        return 100 * sum(max(answers.values()) for answers in counts.values()) / len(self.items)


def load_benchmark(row: BenchmarkRow, *, snapshot: Snapshot, max_items: int | None = None) -> Benchmark:
    """Read a benchmark's questions.

    Args:
        row: The benchmark.
        snapshot: Has the data set.
        max_items: First so many questions only; ``None`` for all.

    Raises:
        EvaluationError: The data set has no questions, or one of an answer type that the row does not name.
        SnapshotError: The snapshot lacks the data set, or a shard is broken.
    """
    reader = RecordReader(snapshot.shards(row.dataset))
    items: list[Item] = []
    total = 0
    for index in range(len(reader)):
        record = reader.read(index)
        asked = row.ask(record)
        total += len(asked)
        sha256s = tuple(image.sha256 for image in record.images)
        for number, question in enumerate(asked):
            if question.answer_type not in row.chance:
                raise EvaluationError(
                    f'"{record.id}" has an answer of type "{question.answer_type}" ("{question.reference}")',
                    f"{row.name} knows {', '.join(row.answer_types)}",
                    "Check that the snapshot has the data set that the benchmark was written for.",
                )
            if max_items is None or len(items) < max_items:
                items.append(
                    Item(
                        id=f"{record.id}#{number}",
                        record=index,
                        image_sha256s=sha256s,
                        question=question.question,
                        prompt=row.prompt.format(question=question.question),
                        reference=question.reference,
                        answer_type=question.answer_type,
                    )
                )
    if not items:
        raise EvaluationError(
            f'data set "{row.dataset}" has no questions', f"{row.name} needs at least one", "Build the snapshot again."
        )
    return Benchmark(row=row, items=tuple(items), n_total=total, reader=reader)


def question_answer_pairs(record: Record) -> list[tuple[str, str]]:
    """A record's questions without image placeholders, each with its answer."""
    texts = [without_placeholders(turn.text).strip() for turn in record.turns]
    return list(zip(texts[0::2], texts[1::2], strict=True))
