"""Several training processes that ``torchrun`` started, or just this one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


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

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes; on their device, since NCCL knows no tensor on the CPU.

        Args:
            values: Of any device; may be overwritten.
        """
        values = values.to(self.device)
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum every gradient over all processes; a missing one becomes zero.

        A batch without an image leaves encoders without a gradient. Their moments must decay all the same, or a run
        would depend on how its batches are cut.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        # One message for all of them: small models are bound by latency.
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        distributed.all_reduce(flat)
        offset = 0
        for parameter in parameters:
            count = parameter.numel()
            parameter.grad = flat[offset : offset + count].view_as(parameter).clone()
            offset += count

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def training_processes() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, by its environment variables; alone without them.

    Yields:
        This process's place; on a GPU where there is one.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        yield Processes(rank=0, size=1, device=device)
        return
    if device.type == "cuda":
        # Named, or NCCL would have to guess the device of a barrier.
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    try:
        yield Processes(rank=rank, size=size, device=device)
    finally:
        distributed.destroy_process_group()
