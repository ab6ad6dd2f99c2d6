"""Several training processes, or just this one.

An error of one ends all of them with that error: under ``torchrun`` no other process knows more of it than that its
connection is closed, or nothing at all, since NCCL waits. So errors of data are told with the next sum, and all others
through the store that the processes met in.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from manyeyes.children import pickle_error, unpickle_error
from manyeyes.errors import ProcessLostError

T = TypeVar("T")

# The others wait while rank 0 writes the result of a large model; NCCL's own ten minutes may be too few.
_LONGEST_WAIT = timedelta(hours=2)
# How long a process that fails waits for the others to hear of it: torchrun ends all as soon as one is gone.
_FAREWELL_S = 10.0
_POLL_S = 0.05
_ERROR = "error"
_BUCKET_BYTES = 64 * 2**20


class PeerError(RuntimeError):
    """Another process failed or is gone."""


@dataclass(frozen=True)
class Processes:
    """Who takes part in training.

    Attributes:
        rank: This process, from 0. Rank 0 writes, reports and holds the lock.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, build: Callable[[], T], *, count: Callable[[T], int]) -> tuple[T, float]:
        """Make this process's share of something; where one fails, all end here, also in a group that would wait.

        Args:
            build: Makes the share.
            count: What is summed over all shares.

        Returns:
            This process's share, and the sum.

        Raises:
            PeerError: Another process failed.
        """
        try:
            made = build()
        except Exception:
            with suppress(PeerError):
                self.sum(torch.tensor([0.0, 1.0]))
            raise
        total, failed = self.sum(torch.tensor([float(count(made)), 0.0])).tolist()
        if failed:
            raise PeerError("another process could not make its share")
        return made, total

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes; on their device, since NCCL knows no tensor on the CPU.

        Args:
            values: Of any device; may be overwritten.
        """
        values = values.to(self.device)
        if self.size > 1:
            with _together():
                distributed.all_reduce(values)
        return values

    def maximum(self, value: int) -> int:
        """The greatest of all processes' values."""
        values = torch.tensor([value], device=self.device)
        if self.size > 1:
            with _together():
                distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return int(values)

    def from_main(self, value: T) -> T:
        """What the main process has; small, since it is pickled."""
        values = [value]
        if self.size > 1:
            with _together():
                distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def send_from_main(self, values: Tensor) -> None:
        """Overwrite a tensor on the device with that of the main process."""
        if self.size > 1:
            with _together():
                distributed.broadcast(values, src=0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum every gradient over all processes; a missing one becomes zero, and parts are summed already.

        A batch without an image leaves encoders without a gradient. Their moments must decay all the same, or a run
        would depend on how its batches are cut.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        for some in _buckets([each for each in parameters if not isinstance(each, DTensor)]):
            flat = self.sum(torch.cat([parameter.grad.flatten() for parameter in some if parameter.grad is not None]))
            for parameter, summed in zip(some, flat.split([parameter.numel() for parameter in some]), strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(summed.view_as(parameter))

    def tell(self, what: T) -> list[T]:
        """Tell all processes something small.

        Returns:
            What each has told, by rank.
        """
        if self.size == 1:
            return [what]
        # As numbers of a sum, which every backend has, and on a GPU too.
        pickled = pickle.dumps(what)
        sizes = torch.zeros(self.size)
        sizes[self.rank] = len(pickled)
        sizes = self.sum(sizes).cpu()
        table = torch.zeros(self.size, int(sizes.max()))
        table[self.rank, : len(pickled)] = torch.tensor(list(pickled), dtype=torch.float32)
        rows = self.sum(table).cpu().to(torch.uint8)
        return [pickle.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            with _together():
                distributed.barrier()

    @contextmanager
    def computing_together(self) -> Iterator[None]:
        """Something that sends messages on its way: an error of a connection is another process's end.

        Raises:
            PeerError: Another process failed or is gone.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo says no more of what it fails with than a text.
            if self.size > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                raise PeerError(str(error)) from error
            raise


@contextmanager
def training_processes() -> Iterator[Processes]:
    """Join the other processes by the environment variables that ``torchrun`` sets; alone without them.

    Whatever leaves the block in one process leaves it in all: the error of the one that failed.

    Yields:
        This process's place; on a GPU where there is one.

    Raises:
        ProcessLostError: Another process ended without an error.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        yield Processes(rank=0, size=1, device=device)
        return
    store, _, _ = next(rendezvous("env://"))
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=_LONGEST_WAIT,
        # Named, or NCCL would have to guess the device of a barrier.
        device_id=device if device.type == "cuda" else None,
    )
    last_words = _LastWords(PrefixStore("last words", store), rank=rank, size=size)
    try:
        yield Processes(rank=rank, size=size, device=device)
    except Exception as error:
        own = not isinstance(error, PeerError)
        if own:
            last_words.tell(error)
        # Whoever waits for this process wakes up.
        distributed.destroy_process_group()
        reason = last_words.exchange(error)
        if own:
            raise
        raise reason from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError(str(error)) from error


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose gradients are one message: small models are bound by latency, large ones by memory."""
    some: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if some and held + parameter.nbytes > _BUCKET_BYTES:
            yield some
            some, held = [], 0
        some.append(parameter)
        held += parameter.nbytes
    if some:
        yield some


class _LastWords:
    """Why processes end, in the store that they met in."""

    def __init__(self, store: Store, *, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size

    def tell(self, error: Exception) -> None:
        """Say what this process fails with."""
        with suppress(RuntimeError):  # the store may be gone with its process
            self._store.compare_set(_ERROR, "", pickle.dumps((self._rank, *pickle_error(error))).hex())

    def exchange(self, error: Exception) -> BaseException:
        """What the first process to fail failed with; where that was none of them, what ``error`` comes from.

        All leave together, as far as they still come: torchrun ends the others as soon as one is gone.
        """
        deadline = time.monotonic() + _FAREWELL_S
        # The store is the first process's own where no other process starts them.
        silent, told = [0], None
        with suppress(RuntimeError):
            silent = self._meet("here", deadline)
            if self._store.check([_ERROR]):
                told = pickle.loads(bytes.fromhex(self._store.get(_ERROR).decode()))
            self._meet("told", deadline)
        if told is not None:
            rank, pickled, text = told
            return unpickle_error(pickled, text, where=f"training process {rank + 1} of {self._size}")
        if not silent:
            return error.__cause__ or error
        which = " and ".join(str(rank + 1) for rank in silent)
        return ProcessLostError(
            f"training process {which} of {self._size} ended or does not answer ({error})",
            "processes that train to the end",
            "The log says how it ended; it may have been out of memory. The same command goes on from here.",
        )

    def _meet(self, where: str, deadline: float) -> list[int]:
        """Wait for all, but not for long, since one that is gone never comes; the ranks of those that did not."""
        self._store.set(f"{where}/{self._rank}", "")
        while True:
            missing = [rank for rank in range(self._size) if not self._store.check([f"{where}/{rank}"])]
            if not missing or time.monotonic() >= deadline:
                return missing
            time.sleep(_POLL_S)
