"""Micro-batches in the order in which a stage trains on them, built here or ahead of it by processes of their own.

A worker process builds the micro-batch of the positions that it is told, so what comes when depends on no worker, and a
stage goes on after a kill with any number of them. What it built travels in memory that the kernel gives it by a file
descriptor: it needs no ``/dev/shm`` (64 MB in a pod), and it is gone with the last process that has it.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Literal

import torch

from manyeyes.children import (
    FAILED,
    child_connection,
    describe_end,
    pickle_error,
    start_child,
    telling_why,
    unpickle_error,
)
from manyeyes.errors import ProcessLostError
from manyeyes.training.batches import Batch, BatchBuilder
from manyeyes.training.features import FrozenFeatures

# What may wait ready-made for one training process; one micro-batch a worker may be more.
AHEAD_BYTES = 2 * 1024**3
_PER_WORKER = 3
_ALIGNED = 64
_BUILT = "built"
_NAMED, _NAMED_OF_STEP = 4, 32

Positions = Sequence[int]
Plan = Callable[[int], Sequence[Positions]]
"""The micro-batches of this process in a step, by the step's number."""


@dataclass(frozen=True)
class StepBatches:
    """What this process trains on in one step.

    Attributes:
        num_supervised: Tokens that the loss counts, in all of its micro-batches.
        batches: The micro-batches in order, one in memory at a time.
    """

    num_supervised: int
    batches: Iterator[Batch]


class BatchStream:
    """The micro-batches of a stage's steps, in order.

    The loss of a micro-batch is divided by the supervised tokens of the whole step, so these are counted before the
    first is trained on; that needs texts alone. Of the micro-batches only one is in memory.

    Args:
        builder: Builds them; a worker gets one that is made alike.
        plan: Which positions a step's micro-batches hold.
        steps: Of the stage.
        workers: Processes that build ahead; with none, a micro-batch is built here when it is needed.
        pinned: Whether to put them where a GPU can fetch them by itself.
        frozen: Where features are kept: makes those that were not found.

    Attributes:
        waited_s: Seconds in which training waited for data.
        positions: Of the micro-batches of the step that began last.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        plan: Plan,
        *,
        steps: int,
        workers: _Workers | None = None,
        pinned: bool = False,
        frozen: FrozenFeatures | None = None,
    ) -> None:
        self._source = workers or builder
        self._builder = builder
        self._workers = workers
        self._plan = plan
        self._steps = steps
        self._step = 0
        self._pinned = pinned
        self._frozen = frozen
        self.waited_s = 0.0
        self.positions: Sequence[Positions] = ()

    def go_to(self, step: int) -> None:
        """Begin at a step; called once, before the first ``next_step``."""
        self._step = step
        if self._workers is not None:
            self._workers.begin(_tasks(self._plan, step, self._steps))

    def next_step(self) -> StepBatches:
        """The next step's micro-batches, the first of them built.

        Raises:
            RecordError: A record cannot be used.
            SnapshotError: A shard cannot be read.
            ProcessLostError: A worker ended; names the records that it had.
        """
        with self._waiting():
            self.positions = parts = self._plan(self._step)
        self._step += 1
        if not parts:
            return StepBatches(0, iter(()))
        first = self._build(parts[0])
        with self._waiting():
            count = first.num_supervised + sum(self._source.count(part) for part in parts[1:])
        return StepBatches(count, self._iterate([first], parts[1:]))

    def name(self, positions: Positions) -> str:
        """The samples at these positions."""
        return _name(self._builder, positions, most=_NAMED_OF_STEP)

    def longest(self) -> str:
        """The longest samples of the step that began last, with what they take."""
        sizes = [(self._builder.measure(place), place) for positions in self.positions for place in positions]
        sizes.sort(key=lambda pair: (-pair[0].tokens, -pair[0].images, pair[1]))
        return ", ".join(
            f"{_name(self._builder, [place], most=1)} ({size.tokens:,} tokens, {size.images} images or tiles)"
            for size, place in sizes[:_NAMED]
        )

    def _iterate(self, built: list[Batch], parts: Sequence[Positions]) -> Iterator[Batch]:
        # The last one is let go of before the next is made.
        yield built.pop()
        for part in parts:
            yield self._build(part)

    def _build(self, positions: Positions) -> Batch:
        with self._waiting():
            batch = self._source.build(positions)
            batch = batch.pin_memory() if self._pinned else batch
        if self._frozen is None or not batch.frozen:
            return batch
        return replace(batch, frozen=(), features=self._frozen.complete(batch.frozen))

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - started


@contextmanager
def batch_stream(
    builder: BatchBuilder,
    plan: Plan,
    *,
    steps: int,
    workers: int,
    pinned: bool = False,
    frozen: FrozenFeatures | None = None,
) -> Iterator[BatchStream]:
    """A stage's micro-batches; see ``BatchStream``. The workers end with the block.

    Args:
        builder: Builds them; a worker gets one that is made alike.
        plan: Which positions a step's micro-batches hold.
        steps: Of the stage.
        workers: Processes that build ahead; 0 starts none.
        pinned: Whether to put them where a GPU can fetch them by itself.
        frozen: Where features are kept: makes those that were not found.
    """
    started = _Workers(builder) if workers else None
    try:
        if started is not None:
            started.start(workers)
        yield BatchStream(builder, plan, steps=steps, workers=started, pinned=pinned, frozen=frozen)
    finally:
        if started is not None:
            started.end()
        if frozen is not None:
            frozen.write()


def micro_batches(
    step: int, *, batch_size: int, micro_batch_size: int | None, num_samples: int, rank: int, num_ranks: int
) -> list[Positions]:
    """A ``Plan``, once its other arguments are given.

    Args:
        step: From 0.
        batch_size: Samples of a step, over all ranks.
        micro_batch_size: Samples of one forward pass of one rank; all of its share where left out.
        num_samples: In the stage; its last step takes what is left.
        rank: This process.
        num_ranks: Processes that train.
    """
    own = range(step * batch_size, min((step + 1) * batch_size, num_samples))[rank::num_ranks]
    size = micro_batch_size or batch_size
    return [own[start : start + size] for start in range(0, len(own), size)]


@dataclass(frozen=True)
class _Task:
    """One thing that a worker does: ``build`` a micro-batch, or ``count`` its supervised tokens."""

    kind: Literal["build", "count"]
    positions: Positions
    micro_batch: int


def _tasks(plan: Plan, begin: int, end: int) -> Iterator[_Task]:
    """In the order in which ``BatchStream`` asks for them."""
    number = itertools.count()
    for step in range(begin, end):
        parts = [(part, next(number)) for part in plan(step)]
        yield from (_Task("build", *part) for part in parts[:1])
        yield from (_Task("count", *part) for part in parts[1:])
        yield from (_Task("build", *part) for part in parts[1:])


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection


class _Workers:
    """Processes that build, and what they have been told to."""

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = builder
        self._tasks: Iterator[_Task] = iter(())
        self._told: deque[_Task] = deque()
        self._largest = 0
        self._workers: list[_Worker] = []

    def start(self, number: int) -> None:
        environment = {
            # A worker is one thread, and it has no business on a GPU.
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        for _ in range(number):
            self._workers.append(_Worker(*start_child(__name__, environment=environment)))
            self._send(self._workers[-1], self._builder.for_worker(number))

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()

    def begin(self, tasks: Iterator[_Task]) -> None:
        self._tasks = tasks
        self._tell()

    def build(self, positions: Positions) -> Batch:
        content, buffers = self._result("build", positions)
        batch: Batch = pickle.loads(content, buffers=buffers)
        self._largest = max(self._largest, sum(len(buffer) for buffer in buffers))
        self._tell()
        return batch

    def count(self, positions: Positions) -> int:
        number: int = pickle.loads(self._result("count", positions)[0])
        return number

    def _result(self, kind: str, positions: Positions) -> tuple[bytes, list[memoryview]]:
        self._tell()
        task = self._told.popleft()
        assert (task.kind, task.positions) == (kind, positions)
        number = task.micro_batch % len(self._workers)
        worker = self._workers[number]
        try:
            what, *content = worker.connection.recv()
            buffers = [] if what == FAILED else _receive(worker.connection, content[1])
        except (EOFError, OSError):
            worker.process.kill()  # it may have lost no more than its socket
            raise ProcessLostError(
                f"data worker {number + 1} of {len(self._workers)} {describe_end(worker.process.wait())} "
                f"at {self._name(task)}",
                "workers that live as long as the stage",
                "Where memory ran out, lower MANYEYES_DATA_WORKERS or micro_batch_size; if it ends there again, one of "
                "these records is the reason: leave it out. The same command goes on from here.",
            ) from None
        if what == FAILED:
            raise unpickle_error(*content, where=f"data worker {number + 1} of {len(self._workers)}")
        return content[0], buffers

    def _tell(self) -> None:
        """Hand out tasks, as many as fit into memory when they are done."""
        most = _PER_WORKER * len(self._workers) if self._largest else len(self._workers)
        if self._largest:
            most = max(1, min(most, AHEAD_BYTES // self._largest))
        builds = sum(task.kind == "build" for task in self._told)
        while builds < most and (task := next(self._tasks, None)) is not None:
            self._send(self._workers[task.micro_batch % len(self._workers)], (task.kind, task.positions))
            self._told.append(task)
            builds += task.kind == "build"

    def _send(self, worker: _Worker, what: object) -> None:
        with suppress(OSError):  # it is gone; its end is read where its result is needed
            worker.connection.send(what)

    def _name(self, task: _Task) -> str:
        positions = list(task.positions)
        return f"positions {positions[0]:,} to {positions[-1]:,}: {_name(self._builder, positions, most=_NAMED)}"


def _name(builder: BatchBuilder, positions: Positions, *, most: int) -> str:
    samples = [builder.sample(position) for position in positions[:most]]
    more = f" and {len(positions) - most:,} more" if len(positions) > most else ""
    return ", ".join(f'record "{sample.record.id}" of {sample.dataset}' for sample in samples) + more


# --- how a micro-batch travels -------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Tensors as arrays, whose bytes travel beside the pickle."""

    def reducer_override(self, what: Any) -> Any:
        if isinstance(what, torch.Tensor):
            return torch.from_numpy, (what.contiguous().numpy(),)
        return NotImplemented


def _dump(what: object) -> tuple[bytes, list[memoryview]]:
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(what)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each buffer begins, and where all end."""
    return list(itertools.accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))


def _ship(connection: Connection, buffers: Sequence[memoryview]) -> None:
    sizes = [len(buffer) for buffer in buffers]
    *starts, end = _offsets(sizes)
    if not end:
        return
    descriptor = _memory_file()
    try:
        os.ftruncate(descriptor, end)
        with mmap.mmap(descriptor, end) as memory:
            for start, buffer in zip(starts, buffers, strict=True):
                memory[start : start + len(buffer)] = buffer
        send_handle(connection, descriptor, os.getppid())
    finally:
        os.close(descriptor)


def _receive(connection: Connection, sizes: Sequence[int]) -> list[memoryview]:
    *starts, end = _offsets(sizes)
    if not end:
        return [memoryview(bytearray()) for _ in sizes]
    descriptor = recv_handle(connection)
    try:
        # The arrays keep it alive, and it keeps the memory.
        memory = memoryview(mmap.mmap(descriptor, end))
    finally:
        os.close(descriptor)
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("manyeyes-batch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# --- what a worker does --------------------------------------------------------------------------------------------


def build_batches(descriptor: int) -> None:
    """Build and count what comes, until the training process closes the socket or is gone.

    Args:
        descriptor: Of the socket to the process that started this one.
    """
    connection = child_connection(descriptor)
    with telling_why(connection), suppress(EOFError, BrokenPipeError, ConnectionResetError):
        torch.set_num_threads(1)
        builder: BatchBuilder = connection.recv()
        while True:
            kind, positions = connection.recv()
            try:
                payload, buffers = _dump(getattr(builder, kind)(positions))
            except Exception as error:  # noqa: BLE001 (the training process raises it where it needs the result)
                connection.send((FAILED, *pickle_error(error)))
                continue
            connection.send((_BUILT, payload, [len(buffer) for buffer in buffers]))
            _ship(connection, buffers)
    os._exit(0)  # at once: there is nothing to put in order


if __name__ == "__main__":
    build_batches(int(sys.argv[1]))
