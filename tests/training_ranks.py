"""One of several processes that train a toy stage: ``python -m tests.training_ranks FOLDER``, as torchrun starts it.

Writes what it ended with to ``FOLDER/rank-<rank>.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from manyeyes.data.snapshot import open_folder
from manyeyes.errors import ManyEyesError, StorageError
from manyeyes.training import loop
from manyeyes.training.launch import launch_stage
from manyeyes.training.stage import StageReport
from tests.training_toys import toy_recipe


def launch_toy(folder: Path, *, processes: int, epochs: int = 1, **more: Any) -> StageReport:
    """Train one encoder on ``folder/data``."""
    return launch_stage(
        toy_recipe(epochs=epochs, schedule={"kind": "constant", "warmup_ratio": 0}),
        "prealign",
        processes=processes,
        threads=1,
        snapshot=open_folder(folder / "data"),
        code_digest="code",
        out=folder / f"out-{processes}",
        work_dir=folder / f"work-{processes}",
        encoder="left",
        **more,
    )


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(processes: int, target: Callable[[int, int, dict[str, Any]], None], kwargs: dict[str, Any]) -> None:
    """Run ``target(rank, port, kwargs)`` in so many processes that meet at the port; all must end well."""
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_toys"])
    started = [context.Process(target=target, args=(rank, port, kwargs)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
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


# In which process, and what it does where a running checkpoint is due or its loss is computed.
FAULTS = {
    "none": (0, "save_running", loop.save_running),
    "full disk": (0, "save_running", _full_disk),
    "killed": (1, "batch_loss", _die),
    "defect": (1, "batch_loss", _defect),
}


def run_rank(folder: Path, environment: dict[str, str]) -> None:
    """Be one of the processes, with what torchrun puts into its environment."""
    os.environ.update(environment)
    rank = int(os.environ["RANK"])
    faulty, place, fault = FAULTS[os.environ.get("FAULT", "none")]
    if rank != faulty:
        fault = getattr(loop, place)
    code, ended = 0, ["done", ""]
    with patch.object(loop, place, fault):
        try:
            launch_toy(folder, processes=2, epochs=200 if faulty == 0 and place == "save_running" else 1)
        except ManyEyesError as error:
            code, ended = 2, [type(error).__name__, str(error)]
        except Exception as error:  # noqa: BLE001 (told to the test)
            code, ended = 1, [type(error).__name__, str(error)]
    (folder / f"rank-{rank}.json").write_text(json.dumps(ended), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), {})
