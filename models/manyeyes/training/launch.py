"""Starts a stage in several processes of this machine: one a GPU, or two on a CPU.

Two processes of one thread train a small model nearly twice as fast as one process of two threads: its operations are
too short to be cut in two. This process only watches them, so it sees any of them end, whatever the others wait for.
Under ``torchrun``, which has started its processes already, nothing is started here.

``torch.distributed.launcher``, the elastic launch of ``torchrun``, was tried in place of this and keeps less of what
users have. It lets a process end with a killed launcher by SIGINT, which Python handles only between instructions: one
that waits in a collective stayed; here it ends, because a thread of its own sees the socket end. An error of a process
arrives as ``ChildFailedError``, not as itself. And the caller's handlers of SIGTERM and SIGINT and its environment stay
changed. The figures are in docs/figures.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from manyeyes.children import FAILED, child_connection, describe_end, start_child, telling_why, unpickle_error
from manyeyes.errors import ProcessLostError
from manyeyes.recipe import Recipe, StageName
from manyeyes.training.loop import Progress
from manyeyes.training.running import Interruption, noting_signals
from manyeyes.training.stage import StageReport, run_stage

_PROGRESS, _DONE, _END = "progress", "done", "end"
# What a process may take to end, once another one failed or all are done.
_END_S = 20.0


def launch_stage(
    recipe: Recipe,
    stage: StageName,
    *,
    processes: int,
    threads: int,
    on_progress: Callable[[Progress], None] | None = None,
    **arguments: Any,
) -> StageReport:
    """Run a stage in ``processes`` processes.

    Args:
        recipe: As for ``run_stage``.
        stage: As for ``run_stage``.
        processes: How many; 1 starts none.
        threads: CPU threads of each.
        on_progress: As for ``run_stage``.
        arguments: The other arguments of ``run_stage``.

    Raises:
        ProcessLostError: A process ended without an error. Any other error of a process is raised as it is.
        KeyboardInterrupt: Ctrl-C; the processes have saved the step that they were at, as they do at SIGTERM.
    """
    if processes <= 1 or "WORLD_SIZE" in os.environ:
        torch.set_num_threads(threads)
        return run_stage(recipe, stage, on_progress=on_progress, **arguments)
    # In this process, so that it outlives them all, and has its port before anybody else can take it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # Before numpy or torch are loaded: their thread pools read this once.
        "OMP_NUM_THREADS": str(threads),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    workers: list[_Worker] = []
    try:
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(_Worker(rank, *start_child(__name__, environment={**environment, **place})))
            with suppress(OSError):  # it is gone already; its end is read later
                workers[rank].connection.send((recipe, stage, threads, arguments))

        def save_and_end() -> None:
            for worker in workers:
                with suppress(OSError):  # it is gone already
                    worker.connection.send(_END)

        with noting_signals(save_and_end) as interruption:
            return _watch(workers, on_progress, interruption)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


def _watch(
    workers: Sequence[_Worker], on_progress: Callable[[Progress], None] | None, interruption: Interruption
) -> StageReport:
    reports: dict[int, StageReport] = {}
    running = {worker.connection: worker for worker in workers}
    lost: ProcessLostError | None = None
    while running:
        ready = wait(list(running), timeout=None if lost is None or interruption.number is not None else _END_S)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            worker = running[connection]
            name = f"training process {worker.rank + 1} of {len(workers)}"
            try:
                kind, *content = connection.recv()
            except (EOFError, OSError):
                running.pop(connection)
                if interruption.number is not None:
                    lost = lost or ProcessLostError(
                        f"{name} was told to end",
                        "processes that train to the end",
                        "The same command goes on from here.",
                    )
                    continue
                worker.process.kill()  # it may have lost no more than its socket
                raise ProcessLostError(
                    f"{name} {describe_end(worker.process.wait())}",
                    "processes that train to the end",
                    "The log has what it said. Where memory ran out, lower micro_batch_size or MANYEYES_PROCESSES; "
                    "the same command goes on from here.",
                ) from None
            if kind == _PROGRESS:
                if on_progress is not None:
                    on_progress(*content)
                continue
            running.pop(connection)
            if kind == _DONE:
                (reports[worker.rank],) = content
                continue
            assert kind == FAILED
            error = unpickle_error(*content, where=name)
            if not isinstance(error, ProcessLostError):
                raise error
            # The one that is lost says more: it is to end, or to be seen not to.
            lost = error
    if lost is not None:
        raise lost
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=_END_S)
    return reports[0]


# --- what a started process does -----------------------------------------------------------------------------------


def work(descriptor: int) -> None:
    """Train a share of the stage that comes.

    Args:
        descriptor: Of the socket to the process that started this one.
    """
    connection = child_connection(descriptor)
    with telling_why(connection):
        recipe, stage, threads, arguments = connection.recv()
        threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
        torch.set_num_threads(threads)

        def tell(progress: Progress) -> None:
            connection.send((_PROGRESS, progress))

        connection.send((_DONE, run_stage(recipe, stage, on_progress=tell, **arguments)))


def _end_with_parent(connection: Connection) -> None:
    # What comes is the word to save and end, or the end of the socket, when the parent is gone.
    with suppress(EOFError, OSError):
        while connection.recv() == _END:
            os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)


if __name__ == "__main__":
    work(int(sys.argv[1]))
