"""Asks a model a benchmark's questions under one condition, but those whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from manyeyes.errors import EvaluationError, RecordError
from manyeyes.evaluation.answering.answer_cache import AnswerCache, AnswerKeys
from manyeyes.evaluation.answering.answerers import AnsweredBatch, Answerer
from manyeyes.evaluation.answering.conditions import Condition, Question, plan_questions
from manyeyes.evaluation.benchmarks import Benchmark
from manyeyes.runtime.bundle import Group

_NAMED_ITEMS = 5


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is.

    Attributes:
        benchmark: Being answered.
        condition: What the model is shown.
        done: Questions answered under this condition, known ones too.
        total: Questions of this condition; equal inputs count once.
        score: Percent right so far under this condition; 0 until a judge has judged.
        questions_per_s: Since this condition began, of those that were not known; 0 before the first.
        eta_s: Seconds that this condition still takes; 0 before the first answer.
        from_cache: Of ``done``, those that were known.
    """

    benchmark: str
    condition: Condition
    done: int
    total: int
    score: float
    questions_per_s: float
    eta_s: float
    from_cache: int = 0


@dataclass(frozen=True)
class Answered:
    """A condition's answers.

    Attributes:
        predictions: Text by item id.
        asked: Questions that were asked now.
        from_cache: Questions whose answers were known.
        seconds: Spent on those that were asked.
    """

    predictions: dict[str, str]
    asked: int
    from_cache: int
    seconds: float


class _Tally:
    """Predictions so far, and their score."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.predictions: dict[str, str] = {}
        self._benchmark = benchmark
        self._correct = 0.0

    def add(self, question: Question, text: str) -> None:
        """Give every item of a question its answer."""
        row = self._benchmark.row
        for item in question.items:
            self.predictions[item.id] = text
            if not row.judged:
                self._correct += row.grade(item.row, text, self._benchmark.variant).score

    @property
    def score(self) -> float:
        """Percent right."""
        return 100 * self._correct / max(len(self.predictions), 1)


def ask_benchmark(
    benchmark: Benchmark,
    condition: Condition,
    answerer: Answerer,
    *,
    known: AnswerCache,
    keys: AnswerKeys,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> Answered:
    """Answer every item of a benchmark under a condition; each answer is kept as soon as it is there.

    Args:
        benchmark: The questions.
        condition: What takes the image's place.
        answerer: The model.
        known: Answers so far; gets the new ones.
        keys: Under which they are kept.
        batch_size: Most images a batch.
        max_new_tokens: Longest answer.
        on_progress: Called after each batch, and once before the first where answers were known.

    Raises:
        EvaluationError: The answerer returns another number of answers than questions.
        RecordError: An image cannot be decoded, or a question is too long; names the data set and the items.
    """

    def key(question: Question) -> str:
        return keys.of(question.prompt, images=question.images, options=question.options, max_new_tokens=max_new_tokens)

    plan = plan_questions(benchmark, condition)
    total = len(plan.questions)
    tally = _Tally(benchmark)
    asked = 0
    seconds = 0.0
    found = {question: known.find(key(question)) for question in plan.questions}
    for question, text in found.items():
        if text is not None:
            tally.add(question, text)
    from_cache = sum(text is not None for text in found.values())

    def show() -> None:
        if on_progress is None:
            return
        rate = asked / max(seconds, 1e-9) if asked else 0.0
        on_progress(
            EvaluationProgress(
                benchmark=benchmark.row.name,
                condition=condition,
                done=from_cache + asked,
                total=total,
                score=tally.score,
                questions_per_s=rate,
                eta_s=(total - from_cache - asked) / rate if asked else 0.0,
                from_cache=from_cache,
            )
        )

    if from_cache:
        show()
    waiting: dict[int, tuple[list[Group], list[Question]]] = {}

    def batches() -> Iterator[Sequence[Group]]:
        missing = plan.batches(batch_size=batch_size, leave_out=lambda question: found[question] is not None)
        for index, (groups, questions) in enumerate(missing):
            waiting[index] = groups, questions
            yield groups

    answered = answerer.answer_batches(batches(), max_new_tokens=max_new_tokens)
    for index, answers, took in _naming_items(answered, benchmark, waiting):
        groups, questions = waiting.pop(index)
        texts = [answer.text for group in answers for answer in group]
        if [len(group) for group in answers] != [len(group.questions) for group in groups]:
            raise EvaluationError(
                f"{answerer.name} returned {len(texts)} answers to {len(questions)} questions",
                "one answer per question, in order",
                "Check the answerer.",
            )
        known.add({key(question): text for question, text in zip(questions, texts, strict=True)})
        for question, text in zip(questions, texts, strict=True):
            tally.add(question, text)
        asked += len(questions)
        seconds += took
        show()
    if from_cache + asked != total:
        raise EvaluationError(
            f"{answerer.name} answered {asked} of {total - from_cache} questions",
            "every batch, whatever the order",
            "Check the answerer.",
        )
    return Answered(tally.predictions, asked, from_cache, seconds)


def _naming_items(
    answered: Iterator[AnsweredBatch],
    benchmark: Benchmark,
    waiting: Mapping[int, tuple[Sequence[Group], Sequence[Question]]],
) -> Iterator[AnsweredBatch]:
    """The same batches; an answerer knows nothing of items, so they are named here: all whose answers are awaited."""
    try:
        yield from answered
    except RecordError as error:
        ids = [item.id for _, questions in waiting.values() for question in questions for item in question.items]
        more = f" and {len(ids) - _NAMED_ITEMS:,} more" if len(ids) > _NAMED_ITEMS else ""
        raise RecordError(
            f"{benchmark.row.dataset}, among the items {', '.join(ids[:_NAMED_ITEMS])}{more}: {error.found}",
            error.needed,
            error.do,
            retry=error.retry,
        ) from error
