"""What lies at a path, as one sha256: of a file its bytes, of a folder the names and bytes of all files in it.

Weights are many gigabytes, so a large file that did not change is not read twice: its sha256 is kept in the cache
folder under its path, device, inode, size, and the times of its last change. The kernel alone sets the time of the last
change of an inode, so exchanging a file and giving it the old one's size and time does not deceive.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from manyeyes.errors import SourceError
from manyeyes.storage import cache_dir

# Smaller files are read each time: that is as fast as looking them up.
_LARGE_BYTES = 1 << 20
# Two changes within one tick of a file system's clock look like one.
_SETTLED_S = 2.0


def content_digest(path: Path) -> str:
    """Digest of a file or folder, by content.

    Args:
        path: A file, or a folder, whose hidden files and folders do not count. Links are followed.

    Returns:
        sha256, hexadecimal: of a file the one that ``sha256sum`` gives, of a folder the one over the sorted lines
        ``<path inside> <sha256>``.

    Raises:
        SourceError: Nothing there, or something that cannot be read.
    """
    try:
        if path.is_dir():
            lines = sorted(f"{name} {_file_digest(path / name)}\n" for name in _files_in(path))
            return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
        return _file_digest(path)
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


def _file_digest(path: Path) -> str:
    before = path.stat()
    if before.st_size < _LARGE_BYTES:
        return _read(path)
    facts = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    key = hashlib.sha256(f"{path.resolve()} {facts}".encode(errors="surrogateescape")).hexdigest()
    kept = cache_dir() / "contents" / key[:2] / key
    with suppress(OSError):
        known = kept.read_text(encoding="ascii", errors="replace")
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
    digest = _read(path)
    after = path.stat()
    if settled and facts == (after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns):
        # Where nothing can be written, the file is read again next time.
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="ascii") as temporary:
                temporary.write(digest)
            Path(temporary.name).replace(kept)
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
