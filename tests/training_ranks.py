"""One of several processes that train a toy stage: ``python -m tests.training_ranks FOLDER``, as torchrun starts it.

Writes what it ended with to ``FOLDER/rank-<rank>.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from manyeyes.data.snapshot import open_folder
from manyeyes.errors import ManyEyesError, StorageError
from manyeyes.harness.base import LocalArtifact, Reporter, Step, StepResult, run_step
from manyeyes.storage import write_file
from manyeyes.training import loop, running
from manyeyes.training.launch import launch_stage
from manyeyes.training.stage import StageReport
from tests.ports import free_port
from tests.training_toys import toy_recipe


def launch_toy(folder: Path, *, processes: int, epochs: int = 1, every_s: float = 0.1, **more: Any) -> StageReport:
    """Train one encoder on ``folder/data``."""
    places = {"out": folder / f"out-{processes}", "work_dir": folder / f"work-{processes}"}
    return launch_stage(
        toy_recipe(epochs=epochs, checkpoint_every_s=every_s, schedule={"kind": "constant", "warmup_ratio": 0}),
        "prealign",
        processes=processes,
        threads=1,
        snapshot=open_folder(folder / "data"),
        code_digest="code",
        encoder="left",
        **{**places, **more},
    )


def run_long(folder: Path, processes: int) -> None:
    """Be a step that trains long without saving by itself; ``folder/at`` says at which optimizer step it is."""
    at = folder / "at"
    # What is started in a shell's background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def tell(progress: loop.Progress) -> None:
        write_file(at, str(progress.step), flush=False)

    def train(_: Reporter, *, out: Path) -> StepResult:
        launch_toy(folder, processes=processes, epochs=2000, every_s=1e6, out=out, on_progress=tell)
        return StepResult("done")

    with patch.object(loop, "PROGRESS_EVERY_S", 0):
        step = Step("sft", train, outputs=("out",), tracked=False)
        run_step(
            step, report=LocalArtifact(str(folder / "report")), outputs={"out": LocalArtifact(str(folder / "result"))}
        )


def run_ranks(processes: int, target: Callable[[int, int, dict[str, Any]], None], kwargs: dict[str, Any]) -> None:
    """Run ``target(rank, port, kwargs)`` in so many processes that meet at the port; all must end well.

    One that fails before they meet would be waited for by the others without end: they end with it.
    """
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_toys"])
    started = [context.Process(target=target, args=(rank, port, kwargs)) for rank in range(processes)]
    for process in started:
        process.start()
    running = {process.sentinel: process for process in started}
    while running and all(process.exitcode in (None, 0) for process in started):
        for sentinel in wait(list(running)):
            running.pop(int(sentinel)).join()
    for process in running.values():
        process.kill()
        process.join()
    assert [process.exitcode for process in started] == [0] * processes


def run_two(target: Callable[[int, int, dict[str, Any]], None], kwargs: dict[str, Any]) -> None:
    """``run_ranks`` with two."""
    run_ranks(2, target, kwargs)


def _full_disk(*_: Any, **__: Any) -> None:
    raise StorageError("0 MB free", "8 MB are needed", "Free some space.")


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _defect(*_: Any, **__: Any) -> None:
    raise KeyError("a defect")


_batch_loss = loop.batch_loss


def _slow(*arguments: Any, **more: Any) -> Any:
    time.sleep(2.0)
    return _batch_loss(*arguments, **more)


# In which process, and what it does where a running checkpoint is written or its loss is computed.
FAULTS: dict[str, tuple[int, Any, str, Callable[..., None]]] = {
    "full disk": (0, running, "_check_space", _full_disk),
    "full disk of the second": (1, running, "_write_safetensors", _full_disk),
    "killed": (1, loop, "batch_loss", _die),
    "slow": (1, loop, "batch_loss", _slow),
    "defect": (1, loop, "batch_loss", _defect),
}


def run_rank(folder: Path, environment: dict[str, str]) -> None:
    """Be one of the processes, with what torchrun puts into its environment."""
    os.environ.update(environment)
    rank = int(os.environ["RANK"])
    code, ended = 0, ["done", ""]
    with ExitStack() as faults:
        faulty, module, place, fault = FAULTS.get(os.environ.get("FAULT", ""), (-1, loop, "", _die))
        if rank == faulty:
            faults.enter_context(patch.object(module, place, fault))
        try:
            seen: list[loop.Progress] = []
            launch_toy(folder, processes=2, epochs=200 if module is running else 1, on_progress=seen.append)
            ended = ["done", seen[-1].slow if seen else ""]
        except ManyEyesError as error:
            code, ended = 2, [type(error).__name__, str(error)]
        except Exception as error:  # noqa: BLE001 (told to the test)
            code, ended = 1, [type(error).__name__, str(error)]
    (folder / f"rank-{rank}.json").write_text(json.dumps(ended), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), {})
