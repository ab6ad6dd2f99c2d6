"""A step ends with the runner that started it, however that went."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

# How long a step may take to end in order, once its runner is gone.
_GRACE_S = 5.0


def die_with_runner(*, exit_code: int) -> None:
    """End this process as soon as the runner that started it is gone, even after kill -9.

    The step's parent is a shell, so the parent's pid says nothing. The runner holds an exclusive lock on the file
    ``MANYEYES_RUN_LOCK`` as long as it lives; the kernel frees it in any case, and the thread that waits for it then
    wakes up.

    Args:
        exit_code: Of a process that does not end in order.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    lock = os.environ.get("MANYEYES_RUN_LOCK")
    if lock:
        end = partial(_end, exit_code)
        threading.Thread(target=wait_for_runner_death, args=(Path(lock), end), daemon=True).start()


def wait_for_runner_death(lock: Path, then: Callable[[], None]) -> None:
    """Block until the process that holds ``lock`` is gone, then call ``then``."""
    descriptor = os.open(lock, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    then()


def _end(exit_code: int) -> None:
    sys.stderr.write("the runner is gone: this step ends\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(exit_code)


def _exit_on_signal(_number: int, _frame: FrameType | None) -> NoReturn:
    # As Ctrl-C: MLflow's run of the step then ends as KILLED and not as FAILED.
    raise KeyboardInterrupt
