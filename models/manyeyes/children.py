"""Processes that this one starts to share its work.

They are commands of their own, so nothing that this process has open goes along; each ends as soon as this one is gone,
because its socket then ends; and an error in one of them arrives here as itself.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

FAILED = "failed"
_STDERR = 2


def start_child(module: str, *, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start ``python -m module DESCRIPTOR``; ``child_connection`` is the first thing that it calls.

    Args:
        module: Where the child's code is.
        environment: What differs from this process's.

    Returns:
        The process, and this end of the socket to it.
    """
    ours, theirs = Pipe()
    descriptor = theirs.fileno()
    # Safe path: a file of the current folder cannot take the place of a module.
    command = [sys.executable, "-P", "-m", module, str(descriptor)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        # What a library prints there is nobody's result.
        stdout=_STDERR,
        env={**os.environ, **environment},
        pass_fds=(descriptor,),
    )
    theirs.close()
    with contextlib.suppress(OSError):  # it is gone already; its end is read later
        ours.send(sys.path)
    return process, ours


def describe_end(code: int) -> str:
    """How a process ended, in words.

    Args:
        code: As ``subprocess.Popen.returncode`` has it.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    memory = " (which the kernel sends when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{memory}"


def pickle_error(error: BaseException) -> tuple[bytes | None, str]:
    """An error as it travels: bytes that make it again, None for one that cannot be; and its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 (an error's own code may do anything: its arguments need not fit its class)
        return None, text
    return pickled, text


def unpickle_error(pickled: bytes | None, text: str, *, where: str) -> BaseException:
    """The error that ``pickle_error`` was given.

    Args:
        pickled: As it travelled.
        text: Its traceback there, which becomes a note.
        where: Which process that was, for instance ``an answering process``.
    """
    error: BaseException
    if pickled is None:
        error = RuntimeError(f"{where} failed: {text.strip().splitlines()[-1]}")
    else:
        error = pickle.loads(pickled)
    error.add_note(f"In {where}:\n{text}")
    return error


def child_connection(descriptor: int) -> Connection:
    """The child's end of the socket.

    Args:
        descriptor: As the command line has it.
    """
    # Ctrl-C goes to all processes of a terminal; this one is ended by the one that started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    sys.path[:] = connection.recv()
    return connection


@contextmanager
def telling_why(connection: Connection) -> Iterator[None]:
    """Send ``(FAILED, pickled, text)`` for whatever leaves the block, then end the process."""
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            with contextlib.suppress(OSError):  # nobody is there to hear it
                connection.send((FAILED, *pickle_error(error)))
            os._exit(1)
