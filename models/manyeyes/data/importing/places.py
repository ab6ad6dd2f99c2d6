"""Where data and images are read from: a folder, or a prefix of an S3 bucket.

A name below a place has forward slashes. Images are named by data that somebody else wrote, so no name leads out of the
place: neither ``..``, nor an absolute path, nor a link.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote

from manyeyes.data.remote import S3Remote
from manyeyes.data.source_items import ItemRefused
from manyeyes.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".ico", ".tga"}
)
# A seek forward by less is read over: a new request takes longer.
_READ_OVER_BYTES = 1024**2


class Place(Protocol):
    """A folder or a bucket's prefix, read only."""

    @property
    def url(self) -> str:
        """As ``open_place`` takes it."""

    def open(self, name: str) -> BinaryIO:
        """A file, from its start, seekable.

        Raises:
            DataError: It is not there, or cannot be read.
        """

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def stamp(self, name: str) -> str:
        """What differs when the file has changed."""

    def walk(self) -> Iterator[str]:
        """Names of all files, in a fixed order."""

    def find(self, name: str) -> bytes | None:
        """The bytes of a small file; None when there is none.

        Raises:
            ItemRefused: The name leads out of the place.
        """


def open_place(url: str) -> tuple[Place, str]:
    """Open what somebody named.

    Args:
        url: A folder, a file, or ``s3://bucket/key`` of an object or of a prefix.

    Returns:
        The place, and the name of the one file that was named in it; empty for a folder or prefix.

    Raises:
        DataError: Nothing there.
    """
    if url.startswith("s3://"):
        head, _, name = url.rstrip("/").rpartition("/")
        if head != "s3:/" and (above := S3Place(head)).has(name):
            return above, name
        place = S3Place(url.rstrip("/"))
        if next(place.walk(), None) is None:
            raise _nothing_at(url)
        return place, ""
    path = Path(url)
    if path.is_dir():
        return FolderPlace(path), ""
    if not path.is_file():
        raise _nothing_at(url)
    return FolderPlace(path.parent), path.name


def read_named_image(place: Place, name: str) -> tuple[bytes, bool]:
    """An image by the name that a data file gives it.

    Names in published files differ from those on disks in known ways: the case of the extension or another extension,
    Unicode's two forms of accents, backslashes, percent escapes. The name as written wins over these.

    Args:
        place: The images' root.
        name: As the data file has it.

    Returns:
        The bytes, and whether they were found under another spelling.

    Raises:
        ItemRefused: No such file, or a name that leads out of the place.
    """
    found = place.find(name)
    if found is not None:
        return found, False
    for spelling in _other_spellings(name):
        found = place.find(spelling)
        if found is not None:
            return found, True
    raise ItemRefused("image missing", f'no file "{name}" below the root; needed: the image')


def _other_spellings(name: str) -> Iterator[str]:
    seen = {name}
    plain = name.replace("\\", "/")
    for form in (plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain), unquote(plain)):
        stem, suffix = posixpath.splitext(form)
        for ending in (suffix, suffix.lower(), suffix.upper(), ".jpg", ".png", ".jpeg", ".gif", ".webp"):
            if stem + ending not in seen:
                seen.add(stem + ending)
                yield stem + ending


def _inside(name: str) -> str:
    """The name in its shortest form.

    Raises:
        ItemRefused: It leads out, or no file can have it.
    """
    if "\0" in name:
        raise ItemRefused("image missing", "its name has a zero byte; needed: a name that a file can have")
    found = posixpath.normpath(name)
    if posixpath.isabs(found) or found == ".." or found.startswith("../") or re.match(r"[A-Za-z]+://", name):
        raise ItemRefused("image outside of the root", f'"{name}" is not below the root; needed: a path relative to it')
    return found


class FolderPlace:
    """A folder.

    Args:
        path: It exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._resolved = str(path.resolve()) + os.sep

    @property
    def url(self) -> str:
        """Its path."""
        return str(self._path)

    def open(self, name: str) -> BinaryIO:
        """A file, from its start."""
        try:
            return (self._path / name).open("rb")
        except OSError as error:
            raise DataError(
                f"{self._path / name} cannot be read ({error.strerror})", "a file", "Check the path and permissions."
            ) from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._path / name).is_file()

    def stamp(self, name: str) -> str:
        """Size and time of the last change."""
        facts = (self._path / name).stat()
        return f"{facts.st_size} {facts.st_mtime_ns}"

    def walk(self) -> Iterator[str]:
        """Names of all files, folder by folder, sorted; hidden ones left out."""
        for root, folders, files in os.walk(self._path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for folder in folders:
                path = Path(root, folder)
                if path.is_symlink() and not f"{path.resolve()}{os.sep}".startswith(self._resolved):
                    raise DataError(
                        f"{path} is a link to a folder outside of {self._path}",
                        "folders that lie below it",
                        "Remove the link, or import that folder by itself.",
                    )
            below = Path(root).relative_to(self._path)
            yield from ((below / name).as_posix() for name in sorted(files) if not name.startswith("."))

    def find(self, name: str) -> bytes | None:
        """The bytes of a small file; None when there is none."""
        path = self._path / _inside(name)
        try:
            if not str(path.resolve()).startswith(self._resolved):
                raise ItemRefused("image outside of the root", f'"{name}" is a link that leads out of it')
            return path.read_bytes() if path.is_file() else None
        except (OSError, RuntimeError, UnicodeEncodeError) as error:  # RuntimeError: a circle of links
            if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                return None
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ItemRefused("image missing", f'"{name}" cannot be read ({why}); needed: a file') from error


class S3Place:
    """A prefix of a bucket; credentials and ``AWS_ENDPOINT_URL`` come from the environment.

    Args:
        url: ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        self._remote = S3Remote(url)

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return self._remote.url

    def open(self, name: str) -> BinaryIO:
        """An object, from its start."""
        size = self._remote.size(name)
        if size is None:
            raise _nothing_at(f"{self.url}/{name}")
        return io.BufferedReader(_S3File(self._remote, name, size), buffer_size=_READ_OVER_BYTES)

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        return self._remote.size(name) is not None

    def stamp(self, name: str) -> str:
        """Size of the object."""
        return str(self._remote.size(name))

    def walk(self) -> Iterator[str]:
        """Names of all objects, sorted; hidden ones left out."""
        return (name for name in self._remote.list_names() if not posixpath.basename(name).startswith("."))

    def find(self, name: str) -> bytes | None:
        """The bytes of a small object; None when there is none."""
        return self._remote.read(_inside(name))


class _S3File(io.RawIOBase):
    """An object as a file; what breaks off is taken up again by the remote."""

    def __init__(self, remote: S3Remote, name: str, size: int) -> None:
        self._remote, self._name, self._size = remote, name, size
        self._position = 0
        self._chunks: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        self._at = -1  # where the rest begins

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if self._position >= self._size or not target:
            return 0
        ahead = self._position - self._at
        if self._at < 0 or not 0 <= ahead <= len(self._rest) + _READ_OVER_BYTES:
            self._chunks = self._remote.stream(self._name, offset=self._position, what=self._name)
            self._rest, self._at = memoryview(b""), self._position
        while self._at + len(self._rest) <= self._position:
            self._at += len(self._rest)
            self._rest = memoryview(next(self._chunks, b""))
            if not self._rest:
                return 0
        self._rest = self._rest[self._position - self._at :]
        self._at = self._position
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._position += count
        return count


def _nothing_at(url: str) -> DataError:
    return DataError(
        f"{url} is not there", "a file, a folder, or s3:// of an object or prefix", "Check the path; see docs/data.md."
    )
