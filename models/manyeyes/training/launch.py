"""Starts a stage in several processes of this machine: one a GPU, or two on a CPU.

Two processes of one thread train a small model nearly twice as fast as one process of two threads: its operations are
too short to be cut in two. Under ``torchrun``, which has started its processes already, nothing is started here.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from manyeyes.errors import PipelineError
from manyeyes.recipe import Recipe, StageName
from manyeyes.training.loop import Progress
from manyeyes.training.stage import StageReport, run_stage

_READY = b"ready\n"
_END_S = 60.0


def launch_stage(
    recipe: Recipe,
    stage: StageName,
    *,
    processes: int,
    threads: int,
    on_progress: Callable[[Progress], None] | None = None,
    **arguments: Any,
) -> StageReport:
    """Run a stage in ``processes`` processes, this one among them.

    Args:
        recipe: As for ``run_stage``.
        stage: As for ``run_stage``.
        processes: How many; 1 starts none.
        threads: CPU threads of each.
        on_progress: As for ``run_stage``.
        arguments: The other arguments of ``run_stage``.

    Raises:
        PipelineError: A process did not start.
    """
    torch.set_num_threads(threads)
    if processes <= 1 or "WORLD_SIZE" in os.environ:
        return run_stage(recipe, stage, on_progress=on_progress, **arguments)
    job = pickle.dumps({"recipe": recipe, "stage": stage, "threads": threads, "arguments": arguments})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        place["GLOO_SOCKET_IFNAME"] = "lo"
    with _workers(job, place, count=processes - 1), _environment({**place, "RANK": "0", "LOCAL_RANK": "0"}):
        return run_stage(recipe, stage, on_progress=on_progress, **arguments)


@contextmanager
def _workers(job: bytes, place: dict[str, str], *, count: int) -> Iterator[None]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, count + 1):
            environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "manyeyes.training.launch"]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            started.append(worker)
            assert worker.stdin is not None
            with suppress(BrokenPipeError):  # it is gone, and says why in the log
                worker.stdin.write(job)
                worker.stdin.flush()
        for worker in started:
            assert worker.stdout is not None
            if worker.stdout.readline() != _READY:
                raise PipelineError(
                    f"a training process ended before it began (exit code {worker.wait()})",
                    f"{count + 1} processes",
                    "Its reason stands above in the log; MANYEYES_PROCESSES=1 starts none.",
                )
        yield
        for worker in started:
            worker.wait(timeout=_END_S)
    finally:
        for worker in started:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    # The parent writes nothing more: what comes is the end of the file, when the parent is gone.
    sys.stdin.buffer.read(1)
    os._exit(1)


def work() -> None:
    """What a started process does: its share of the stage that it reads from standard input."""
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(job["threads"])
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    run_stage(job["recipe"], job["stage"], **job["arguments"])


if __name__ == "__main__":
    work()
