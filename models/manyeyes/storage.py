"""Writing that is all there or not there at all, and the folder of what can be had again."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manyeyes.errors import StorageError

_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


def cache_dir() -> Path:
    """What can be had again, and is kept to save time: ``MANYEYES_CACHE``, ``runs/cache`` by default."""
    return Path(os.environ.get("MANYEYES_CACHE") or "runs/cache")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "no space" and "not allowed" from the operating system into ``StorageError``.

    Args:
        path: What was being written; the message names it.

    Raises:
        StorageError: No space, no permission, or a read-only file system.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_OR_FORBIDDEN:
            raise
        raise StorageError(
            f"{path} cannot be written ({error.strerror})",
            "space and permission to write there",
            "Free some space or name another folder, then run the same command again: it continues where it stopped.",
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete; an older one of that name is replaced.

    Args:
        out: The folder's final name.

    Yields:
        A temporary folder beside ``out`` to write into.

    Raises:
        StorageError: No space or no permission. ``out`` is then as it was before.
    """
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield folder
            for file in folder.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    sync(file)
            folder.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            folder.replace(out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def is_there(path: Path) -> bool:
    """Whether a file or folder of that name exists.

    What a person typed may be no path at all, and ``Path.exists`` raises for a name that is too long.
    """
    try:
        return path.exists()
    except OSError:
        return False


def sync(path: Path) -> None:
    """Push a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
