"""Opens a model for an evaluation, in this process or in several, and asks it questions whose answers are not known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from manyeyes.errors import EvaluationError, RecordError
from manyeyes.evaluation.answering.answer_cache import AnswerCache, AnswerKeys
from manyeyes.evaluation.answering.answerers import AnsweredBatch, Answerer, AnswererSpec, answer_in_turn
from manyeyes.evaluation.answering.conditions import Condition, Question, plan_questions
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.evaluation.answering.processes import AnswererPool
from manyeyes.evaluation.benchmarks import Benchmark, Graded
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from manyeyes.runtime.sessions import count_cuda_devices

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
        graded: What rules say of it, by item id; empty where a judge has to.
        asked: Questions that were asked now.
        from_cache: Questions whose answers were known.
        seconds: Spent on those that were asked.
    """

    predictions: dict[str, str]
    graded: dict[str, Graded]
    asked: int
    from_cache: int
    seconds: float


class _Tally:
    """Predictions so far, what they are graded as, and their score."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.predictions: dict[str, str] = {}
        self.graded: dict[str, Graded] = {}
        self._benchmark = benchmark
        self._correct = 0.0

    def add(self, question: Question, text: str) -> None:
        """Give every item of a question its answer."""
        row = self._benchmark.row
        for item in question.items:
            self.predictions[item.id] = text
            if not row.judged:
                self.graded[item.id] = row.grade(item.row, text, self._benchmark.variant)
                self._correct += self.graded[item.id].score

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
    return Answered(tally.predictions, tally.graded, asked, from_cache, seconds)


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


PROCESSES = "MANYEYES_EVALUATION_PROCESSES"


@contextmanager
def open_answerer(spec: AnswererSpec, *, processes: int | None = None) -> Iterator[Answerer]:
    """A model that is loaded with the first question, and not at all where every answer is known already.

    Args:
        spec: The model; its threads and its encoder cache's memory are shared out among the processes.
        processes: How many answer side by side; else ``MANYEYES_EVALUATION_PROCESSES``, else one a CUDA device, else 1.
            Each holds the whole model.

    Yields:
        The model. With several processes they end with the block.

    Raises:
        EvaluationError: The number of processes is none.
    """
    devices = () if spec.device == "cpu" else cuda_devices(spec.kind)
    count = count_processes(processes, devices=len(devices))
    if count == 1:
        yield LateAnswerer(spec)
        return
    cache = spec.encoder_cache
    share = replace(
        spec,
        threads=None if spec.threads is None else max(1, spec.threads // count),
        encoder_cache=None if cache is None else replace(cache, memory_bytes=cache.memory_bytes // count),
    )
    with AnswererPool(share, processes=count, devices=devices) as pool:
        yield pool


def count_processes(given: int | None, *, devices: int) -> int:
    """Processes that answer.

    Args:
        given: As asked for; else the environment says.
        devices: CUDA devices that there are.

    Raises:
        EvaluationError: Not a whole number of at least 1.
    """
    text = str(given) if given is not None else os.environ.get(PROCESSES, "")
    if not text:
        return max(1, devices)
    if not text.isdecimal() or int(text) < 1:
        name = PROCESSES if given is None else "processes"
        raise EvaluationError(f"{name} is {text!r}", "a whole number of at least 1", "Leave it out, or set it to 1.")
    return int(text)


def cuda_devices(kind: ModelKind) -> tuple[str, ...]:
    """The CUDA devices that a kind of model can use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Args:
        kind: ``torch`` or ``bundle``.
    """
    if kind == "torch":
        import torch

        count = torch.cuda.device_count()
    else:
        count = count_cuda_devices()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Only those before the first wrong name count.
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]
    return tuple(name.strip() for name in names)


class LateAnswerer:
    """Loads the model when it is first asked.

    Args:
        spec: The model.
    """

    def __init__(self, spec: AnswererSpec) -> None:
        self.name: ModelKind = spec.kind
        self._spec = spec
        self._loaded: Answerer | None = None

    @property
    def image_counts(self) -> ImageCounts:
        """Images shown since it was made, by where their visual tokens came from."""
        return ImageCounts() if self._loaded is None else self._loaded.image_counts

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order.

        Raises:
            CheckpointError: The checkpoint is missing or incomplete.
            BundleError: The bundle is incomplete or was changed.
            RecordError: An image cannot be decoded, or a question is too long.
        """
        return self._load().answer_groups(groups, max_new_tokens=max_new_tokens)

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        """Answer one batch after the other; loading is none of their seconds."""
        for index, groups in enumerate(batches):
            answerer = self._load()
            ((_, answers, seconds),) = answer_in_turn(answerer, [groups], max_new_tokens=max_new_tokens)
            yield index, answers, seconds

    def _load(self) -> Answerer:
        if self._loaded is None:
            self._loaded = self._spec.build()
        return self._loaded
