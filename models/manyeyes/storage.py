"""Writing that is all there or not there at all, and the folder of what can be had again.

``content_digest`` gives what lies at a path as one sha256: of a file its bytes, of a folder the names and bytes of all
files in it.

Weights are many gigabytes, so a large file that did not change is not read twice: its sha256 is kept in the cache
folder under its path, device, inode, size, and the times of its last change. The kernel alone sets the time of the last
change of an inode, so exchanging a file and giving it the old one's size and time does not deceive.

JSON that somebody else wrote is read or refused, whatever is in the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

from manyeyes.errors import LockedError, ManyEyesError, SourceError, StorageError

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


@contextmanager
def new_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A file that appears under its name only when it is complete; an older one of that name is replaced.

    Args:
        path: The file's final name; its folder is made when missing.
        flush: Whether it is on the disk before it has its name. Not for what is noticed and made again when a power
            failure cuts it.

    Yields:
        An empty temporary file beside ``path`` to write into.

    Raises:
        StorageError: No space, no permission, or no place for a file. ``path`` is as it was before.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:_SHOWN_CHARACTERS]}-", dir=path.parent)
        os.close(descriptor)
        file = Path(name)
        try:
            yield file
            file.chmod(0o644)
            if flush:
                sync(file)
            file.replace(path)
        except BaseException:
            file.unlink(missing_ok=True)
            raise


def write_file(path: Path, content: str | bytes, *, flush: bool = True) -> None:
    """Write a file that is whole or as it was before; ``new_file`` says the rest. A text is written as UTF-8."""
    with new_file(path, flush=flush) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


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


@contextmanager
def file_lock(path: Path, *, taken: Callable[[str], LockedError] | None = None) -> Iterator[None]:
    """Own a file among processes; the system lets go when this process ends, however it ends.

    Args:
        path: The lock file, which stays; its folder is made when missing.
        taken: Makes the refusal from the owner's process id, which the file then holds. None to wait instead.

    Raises:
        LockedError: Another process owns it, and ``taken`` was given.
        StorageError: No space or no permission.
    """
    import fcntl  # Windows has none, and bundles run there

    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if taken is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            assert taken is not None
            raise taken(os.pread(descriptor, 32, 0).decode().strip() or "unknown") from error
        if taken is not None:
            with storage_errors(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def wait_for_release(path: Path) -> None:
    """Block until no process owns the lock file."""
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where that cannot be; for files that nobody edits in place.

    Args:
        source: The file, or a link to it.
        target: Replaced when it is there.
    """
    source, target = Path(source).resolve(), Path(target)
    if target.exists() and target.samefile(source):
        return
    # Never written into: it may be a second name of something else.
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


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


# Smaller files are read each time: that is as fast as looking them up.
_LARGE_BYTES = 1 << 20
# Two changes within one tick of a file system's clock look like one.
_SETTLED_S = 2.0


def content_digest(path: Path, algorithm: Literal["md5", "sha256"] = "sha256") -> str:
    """Digest of a file or folder, by content; a large file that did not change is not read again.

    Args:
        path: A file, or a folder, whose hidden files and folders do not count. Links are followed.
        algorithm: Of a file's digest.

    Returns:
        Hexadecimal: of a file that of its bytes, of a folder the sha256 over the sorted lines
        ``<path inside> <sha256>``.

    Raises:
        SourceError: Nothing there, or something that cannot be read.
    """
    try:
        if path.is_dir():
            lines = sorted(f"{name} {_file_digest(path / name, algorithm)}\n" for name in _files_in(path))
            return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
        return _file_digest(path, algorithm)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path} cannot be read ({error.strerror})",
            "a file or folder whose content can be compared",
            "Check the path and the permission to read it.",
        ) from error


def _files_in(folder: Path) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(root).stat()
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()  # a link to a folder above
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root) / name for name in files if not name.startswith("."))
        yield from (path.relative_to(folder).as_posix() for path in paths if path.is_file())


def _raise(error: OSError) -> None:
    raise error


def _file_digest(path: Path, algorithm: Literal["md5", "sha256"]) -> str:
    before = path.stat()
    if before.st_size < _LARGE_BYTES:
        return hash_file(path, algorithm)
    facts: tuple[object, ...] = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    name = "" if algorithm == "sha256" else f"{algorithm} "
    key = hashlib.sha256(f"{name}{path.resolve()} {facts}".encode(errors="surrogateescape")).hexdigest()
    kept = cache_dir() / "contents" / key[:2] / key
    with suppress(OSError):
        known = kept.read_text(encoding="ascii", errors="replace")
        if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", known):
            return known
    settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
    digest = hash_file(path, algorithm)
    after = path.stat()
    if settled and facts == (after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns):
        # Where nothing can be written, the file is read again next time.
        with suppress(OSError, StorageError):
            write_file(kept, digest, flush=False)
    return digest


def hash_file(path: Path, algorithm: Literal["md5", "sha256"] = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, which are read each time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: Not JSON, nested too deep to be read, a number of thousands of digits, or NaN and Infinity, which
            JSON does not have.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json_file(file: Path, *, error: type[ManyEyesError]) -> Any:
    """What a JSON file holds.

    Args:
        file: In UTF-8.
        error: What is raised where it cannot be read.

    Raises:
        ManyEyesError: ``error``: the file is missing, no text, or as ``parse_json``.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(
            f"{file} cannot be read ({problem.strerror})", "a JSON file is needed", "Check the path, or fetch it again."
        ) from problem
    except ValueError as problem:
        raise error(f"{file} cannot be read ({problem})", "JSON in UTF-8 is needed", "Fetch it again.") from problem


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
