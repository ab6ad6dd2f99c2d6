"""What the caches of an evaluation may take, and how they say that something is wrong with them.

A cache saves work and decides nothing: a full disk, a broken file or a folder that may not be written costs time and
gets one warning, and the evaluation goes on.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from manyeyes.errors import EvaluationError

GIGABYTE = 1 << 30


class CacheWarning(UserWarning):
    """A cache cannot be read or written; what it would have saved is done again."""


def read_limit(variable: str, default_gb: float) -> int:
    """Most bytes that a cache may take.

    Args:
        variable: Environment variable in gigabytes (2^30 bytes); 0 switches the cache off.
        default_gb: Where it is not set.

    Raises:
        EvaluationError: Not a number of at least 0.
    """
    given = os.environ.get(variable)
    if not given:
        return int(default_gb * GIGABYTE)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise EvaluationError(
            f"{variable} is {given!r}", "gigabytes, 0 or more", f"Set it to a number, for instance {default_gb:g}."
        )
    return int(gigabytes * GIGABYTE)


class Complaint:
    """Warns once, however often something goes wrong.

    Args:
        what: Names the cache, for instance ``the cache of answers``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = False

    def say(self, problem: str, path: Path) -> None:
        """Warn, unless that was done before.

        Args:
            problem: What went wrong.
            path: Where.
        """
        if self._said:
            return
        self._said = True
        warnings.warn(
            f"{self._what}: {problem} ({path}). The evaluation goes on; what is not in the cache is done again.",
            CacheWarning,
            stacklevel=3,
        )


def list_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of change, bytes and path of every file; those that another process removes meanwhile are left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            yield facts.st_mtime, facts.st_size, path


def touch(path: Path) -> None:
    """Note that a file or folder was used now: its time of change says so, few file systems keep that of reading.

    Where only reading is allowed, nothing is noted.
    """
    with contextlib.suppress(OSError):
        os.utime(path)
