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
# A file where a folder must be, a folder where a file must be, a name that is too long, a circle of links, a mount.
_NO_PLACE = (
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EXDEV),
)
# Of a final name in a temporary one beside it: file systems take 255 bytes.
_SHOWN_CHARACTERS = 40


def cache_dir() -> Path:
    """What can be had again, and is kept to save time: ``MANYEYES_CACHE``, ``runs/cache`` by default."""
    return Path(os.environ.get("MANYEYES_CACHE") or "runs/cache")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "no space", "not allowed" and "not such a place" from the operating system into ``StorageError``.

    Args:
        path: What was being written; the message names it.

    Raises:
        StorageError: No space, no permission, a read-only file system, or a name that cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise _no_place(path, f"cannot be written ({error.strerror})") from error
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
        StorageError: No space, no permission, or a place that ``replaceable`` refuses. ``out`` is as it was before.
    """
    out = replaceable(out)
    with storage_errors(out):
        folder = folder_beside(out)
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


def replaceable(out: Path) -> Path:
    """Where a folder that is written as a whole goes: absolute, and behind links.

    Raises:
        StorageError: It is a file, lies below one, or is the working directory or a folder around it, which cannot be
            replaced by another one.
    """
    check_out(out)
    found = _behind_links(out)
    if not found.name or found in (Path.cwd(), *Path.cwd().parents):
        raise _no_place(out, "is the working directory, or a folder around it")
    return found


def folder_beside(out: Path) -> Path:
    """A new temporary folder on the file system of ``out``, which may be renamed to it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{out.name[:_SHOWN_CHARACTERS]}-", dir=out.parent))


def check_out(out: Path, *, file: bool = False) -> None:
    """That something can be written there, before hours of work go into it; makes nothing.

    Args:
        out: A folder, which need not be there yet.
        file: It is to be a file.

    Raises:
        StorageError: A file where a folder must be or the other way round, no permission, or no name for one.
    """
    with storage_errors(out):
        if out.exists() and out.is_dir() == file:
            raise _no_place(out, "is a folder" if file else "is a file")
        place = _behind_links(out)
        place = place.parent if file else place
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise _no_place(out, f"cannot be made: {place} is a file")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _behind_links(path: Path) -> Path:
    try:
        found = path.resolve()
    except RuntimeError as error:  # Python before 3.13 says so of a circle
        raise _no_place(path, "is a circle of links") from error
    if found.is_symlink():
        raise _no_place(path, "is a circle of links")
    return found


def _no_place(path: Path, why: str) -> StorageError:
    shown = str(path)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return StorageError(f"{shown} {why}", "a place that can be written to", "Name another one.")


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
