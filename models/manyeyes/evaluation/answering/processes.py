"""Several processes that answer side by side, each with the model on a device of its own.

This process plans, keeps and grades; the others only answer (``manyeyes.children``).

Batches are cut into pieces, so that every process has work to the end. Most batches go whole to one process: a large
batch is what makes a device fast. Only the last ones are cut, as many as there are processes; else all of them would
wait for the one that got the last batch. What is cut follows from the batches alone, never from who was quicker, so
that a run asks the same pieces each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

from manyeyes.children import FAILED, child_connection, describe_end, start_child, telling_why, unpickle_error
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.answerers import AnsweredBatch, Answerer
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.runtime.bundle import GeneratedAnswer, Group

# An image costs about as much as this many questions without one; the same figure as where batches are planned.
_QUESTIONS_PER_IMAGE = 8
# This many pieces a process at the end: what the slowest still has to do then is half of its share at most.
_PIECES_PER_PROCESS = 2


@dataclass(frozen=True)
class Piece:
    """Some questions of a batch.

    Attributes:
        batch: Place of the batch, from 0.
        place: Of the piece in its batch, from 0.
        pieces: How many the batch was cut into.
        groups: To be asked together.
        origins: Place in the batch of the group that each one is of; a group may go on in the next piece.
        size: How many groups the batch has.
    """

    batch: int
    place: int
    pieces: int
    groups: tuple[Group, ...]
    origins: tuple[int, ...]
    size: int


def cut_batches(batches: Iterable[Sequence[Group]], *, processes: int) -> Iterator[Piece]:
    """Pieces in the order of the batches; all batches whole but for the last ``processes`` of them.

    Reads ``processes`` batches ahead.

    Args:
        batches: What to ask.
        processes: Which answer side by side; 1 cuts nothing.
    """
    ahead: deque[tuple[int, Sequence[Group]]] = deque()
    for index, groups in enumerate(batches):
        ahead.append((index, groups))
        if len(ahead) > processes:
            yield from _pieces(*ahead.popleft(), parts=1)
    if not ahead:
        return
    parts = 1 if processes == 1 else math.ceil(_PIECES_PER_PROCESS * processes / len(ahead))
    for index, groups in ahead:
        yield from _pieces(index, groups, parts=parts)


def join_pieces(answered: Sequence[tuple[Piece, Sequence[Sequence[GeneratedAnswer]]]]) -> list[list[GeneratedAnswer]]:
    """The answers of a batch, one list a group, from those of its pieces in any order."""
    groups: list[list[GeneratedAnswer]] = [[] for _ in range(answered[0][0].size)]
    for piece, answers in sorted(answered, key=lambda pair: pair[0].place):
        for origin, of_group in zip(piece.origins, answers, strict=True):
            groups[origin] += of_group
    return groups


def _pieces(batch: int, groups: Sequence[Group], *, parts: int) -> Iterator[Piece]:
    cut = _cut(groups, parts)
    for place, piece in enumerate(cut):
        yield Piece(
            batch=batch,
            place=place,
            pieces=len(cut),
            groups=tuple(group for _, group in piece),
            origins=tuple(origin for origin, _ in piece),
            size=len(groups),
        )


def _cut(groups: Sequence[Group], parts: int) -> list[list[tuple[int, Group]]]:
    """At most ``parts`` runs of groups of about the same weight; never none."""
    total = sum(_weight(group) for group in groups)
    if parts == 1 or total == 0:
        return [list(enumerate(groups))]
    shares = [
        (origin, share) for origin, group in enumerate(groups) for share in _share_questions(group, total / parts)
    ]
    total = sum(_weight(share) for _, share in shares)
    runs: dict[int, list[tuple[int, Group]]] = {}
    before = 0
    for origin, share in shares:
        weight = _weight(share)
        # By where its middle lies, so that each run comes close to its part of the total.
        runs.setdefault(min(parts - 1, int((before + weight / 2) / total * parts)), []).append((origin, share))
        before += weight
    return list(runs.values())


def _share_questions(group: Group, most: float) -> list[Group]:
    """A group heavier than ``most`` as several on the same images, where their questions outweigh these."""
    images = _QUESTIONS_PER_IMAGE * len(group.images)
    count = math.ceil(_weight(group) / most)
    # Each share encodes the images again, which has to pay.
    count = min(count, len(group.questions) // max(1, images))
    if count < 2:
        return [group]
    ends = [round(len(group.questions) * part / count) for part in range(count + 1)]
    return [
        dataclasses.replace(group, questions=group.questions[start:end], choices=group.choices[start:end])
        for start, end in itertools.pairwise(ends)
    ]


def _weight(group: Group) -> int:
    """What a group costs, in questions; nothing is done for images without one."""
    return _QUESTIONS_PER_IMAGE * len(group.images) + len(group.questions) if group.questions else 0


# One is answered while the next one already lies there.
_IN_FLIGHT = 2
# A piece that ended its process is given to one other: an accident does not happen twice.
_MOST_DEATHS = 2
# What a process may take to end in order.
_END_S = 5.0


class ProcessLostWarning(UserWarning):
    """A process that answered is gone; the others go on."""


class Buildable(Protocol):
    """What a process builds its model from; it is pickled. ``AnswererSpec`` is one."""

    @property
    def kind(self) -> ModelKind:
        """Kind of model: ``torch`` or ``bundle``."""

    @property
    def threads(self) -> int | None:
        """CPU threads of one process; the library's own number when left out."""

    def build(self) -> Answerer:
        """Load the model."""


@dataclass(eq=False)
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    counts: ImageCounts = field(default_factory=ImageCounts)
    in_flight: deque[tuple[int, Piece]] = field(default_factory=deque)


class AnswererPool:
    """Asks several processes. They start with the first question and end with the ``with`` block.

    Args:
        spec: The model, as each process builds it.
        processes: How many.
        devices: CUDA devices as ``CUDA_VISIBLE_DEVICES`` names them; each process sees one of them, in turn. Empty:
            all see what this one sees.

    Attributes:
        lost: Processes that ended before their time.
    """

    def __init__(self, spec: Buildable, *, processes: int, devices: Sequence[str] = ()) -> None:
        self.name: ModelKind = spec.kind
        self.lost = 0
        self._spec = spec
        self._processes = processes
        self._devices = tuple(devices)
        self._workers: list[_Worker] = []
        self._counts_of_ended = ImageCounts()
        self._runs = itertools.count()

    def __enter__(self) -> AnswererPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def image_counts(self) -> ImageCounts:
        """Images shown since it was made, by where their visual tokens came from; as the processes last said."""
        return sum((worker.counts for worker in self._workers), self._counts_of_ended)

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order; the processes share them out.

        Raises:
            RecordError: An image cannot be decoded, or a question is too long.
            EvaluationError: As ``answer_batches``.
        """
        if not groups:
            return []
        ((_, answers, _),) = self.answer_batches([groups], max_new_tokens=max_new_tokens)
        return answers

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        """Answer batches side by side. One call at a time; it may be left before its end.

        Args:
            batches: Read as they are needed, a few ahead.
            max_new_tokens: Most tokens an answer.

        Yields:
            Place of the batch, its answers, and the seconds that passed since the batch before it: together they are
            the time that all took. In the order of completion.

        Raises:
            RecordError: An image cannot be decoded, or a question is too long.
            EvaluationError: The same questions ended two processes, or no process is left.
        """
        run = next(self._runs)
        todo = _Todo(cut_batches(batches, processes=self._processes))
        collected: dict[int, list[tuple[Piece, list[list[GeneratedAnswer]]]]] = {}
        since: float | None = None
        while todo or any(owner == run for worker in self._workers for owner, _ in worker.in_flight):
            self._hand_out(run, todo, max_new_tokens)
            if since is None and any(worker.in_flight for worker in self._workers):
                since = time.perf_counter()
            for worker, message in self._receive(run, todo):
                if message[0] == "ready":
                    worker.ready = True
                    continue
                if message[0] == FAILED:
                    self.close()
                    raise unpickle_error(*message[1:], where="an answering process")
                _, answers, worker.counts = message
                owner, piece = worker.in_flight.popleft()
                if owner != run:
                    continue
                parts = collected.setdefault(piece.batch, [])
                parts.append((piece, answers))
                if len(parts) == piece.pieces:
                    now = time.perf_counter()
                    yield piece.batch, join_pieces(collected.pop(piece.batch)), now - (since or now)
                    since = now

    def close(self) -> None:
        """End all processes; at once those that are answering."""
        self._counts_of_ended = self.image_counts
        workers, self._workers = self._workers, []
        for worker in workers:
            if worker.in_flight or not worker.ready:
                worker.process.kill()
            worker.connection.close()
        for worker in workers:
            try:
                worker.process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _hand_out(self, run: int, todo: _Todo, max_new_tokens: int) -> None:
        if todo and not self._workers:
            for number in range(self._processes):
                self._workers.append(self._start(number))
        # Each gets one before any gets two.
        while ready := [worker for worker in self._workers if worker.ready and len(worker.in_flight) < _IN_FLIGHT]:
            piece = todo.next()
            if piece is None:
                return
            worker = min(ready, key=lambda worker: len(worker.in_flight))
            worker.in_flight.append((run, piece))
            # It is gone where this fails; what it had is handed out again as soon as its end is read.
            with contextlib.suppress(OSError):
                worker.connection.send((piece.groups, max_new_tokens))

    def _receive(self, run: int, todo: _Todo) -> Iterator[tuple[_Worker, tuple[Any, ...]]]:
        """What has come from any process; waits for something."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection)):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                self._bury(worker, run, todo)
                continue
            yield worker, message

    def _bury(self, worker: _Worker, run: int, todo: _Todo) -> None:
        """Hand out again what a process had that is gone, and say so."""
        worker.connection.close()
        worker.process.kill()  # it may have lost no more than its socket
        ended = describe_end(worker.process.wait())
        self._workers.remove(worker)
        self._counts_of_ended += worker.counts
        self.lost += 1
        pieces = [piece for owner, piece in worker.in_flight if owner == run]
        idle = "with nothing to answer" if worker.ready else "while it loaded the model"
        doing = f"while it answered {_describe(pieces[0])}" if pieces else idle
        found = f"process {worker.number + 1} of {self._processes} {ended} {doing}"
        # It answers in order, so the one behind the first had not begun.
        if pieces and todo.count_death(pieces[0]) >= _MOST_DEATHS:
            self.close()
            raise EvaluationError(
                f"{found}, and so did another process before",
                "questions that the model can be asked",
                "The log has what it said. Look for the item, or lower evaluation.batch_size where memory ran out.",
            )
        if not self._workers:
            raise EvaluationError(
                f"{found}, and no process is left",
                "a process that answers",
                "Ask for fewer (--processes, MANYEYES_EVALUATION_PROCESSES), or lower evaluation.batch_size; "
                "the same command goes on from here.",
            )
        warnings.warn(f"{found}; processes left: {len(self._workers)}", ProcessLostWarning, stacklevel=2)
        todo.give_back(pieces)

    def _start(self, number: int) -> _Worker:
        environment: dict[str, str] = {}
        if self._spec.threads is not None:
            # Before numpy or torch are loaded: their thread pools read this once.
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MANYEYES_THREADS"), str(self._spec.threads))
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[number % len(self._devices)]
        process, connection = start_child("manyeyes.evaluation.answering.processes", environment=environment)
        with contextlib.suppress(OSError):  # it is gone already; its end is read later
            connection.send(self._spec)
        return _Worker(number, process, connection)


class _Todo:
    """Pieces to hand out: those given back first."""

    def __init__(self, source: Iterator[Piece]) -> None:
        self._source = source
        self._first: deque[Piece] = deque()
        self._deaths: Counter[tuple[int, int]] = Counter()

    def __bool__(self) -> bool:
        piece = self.next()
        if piece is None:
            return False
        self._first.appendleft(piece)
        return True

    def next(self) -> Piece | None:
        return self._first.popleft() if self._first else next(self._source, None)

    def give_back(self, pieces: Iterable[Piece]) -> None:
        self._first.extend(pieces)

    def count_death(self, piece: Piece) -> int:
        self._deaths[piece.batch, piece.place] += 1
        return self._deaths[piece.batch, piece.place]


def _describe(piece: Piece) -> str:
    questions = [question for group in piece.groups for question in group.questions]
    part = f", part {piece.place + 1} of {piece.pieces}" if piece.pieces > 1 else ""
    images = sum(len(group.images) for group in piece.groups)
    first = f", the first: {questions[0][:80]!r}" if questions else ""
    return f"batch {piece.batch + 1}{part} ({len(questions)} questions on {images} images{first})"


# --- what a started process does -----------------------------------------------------------------------------------


def serve_answers(descriptor: int) -> None:
    """Build the model, then answer what comes until there is no more.

    Args:
        descriptor: Of the socket to the process that started this one.
    """
    connection = child_connection(descriptor)
    with telling_why(connection):
        spec = connection.recv()
        asked: queue.SimpleQueue[tuple[tuple[Group, ...], int]] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(connection, asked), daemon=True).start()
        answerer = spec.build()
        connection.send(("ready",))
        while True:
            groups, max_new_tokens = asked.get()
            answers = answerer.answer_groups(groups, max_new_tokens=max_new_tokens)
            connection.send(("answered", answers, answerer.image_counts))


def _read(connection: Connection, asked: queue.SimpleQueue[tuple[tuple[Group, ...], int]]) -> None:
    """Take what comes, so that the other side never waits to send; end where that side is gone."""
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    serve_answers(int(sys.argv[1]))
