"""Fetching a snapshot's files from a DVC remote, in parallel, each checked against its md5.

Shards are large, so each is fetched when it is asked for. A mixture asks for those of its next samples ahead of them,
and who reads all shards one after the other (``in_turn``) for the next few; with ``MANYEYES_SHARDS_GB`` those that were
read longest ago are deleted, and fetched again when somebody comes back to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa

from manyeyes.data.remote import Remote, open_remote
from manyeyes.data.shards import storage_error
from manyeyes.errors import ManyEyesError, PipelineError, SnapshotError
from manyeyes.storage import file_lock, write_file

SHARDS_LIMIT = "MANYEYES_SHARDS_GB"
_FOOTER_BYTES = 64 * 1024
_PARQUET = b"PAR1"
_AHEAD = 4
_Item = TypeVar("_Item")
_MD5 = re.compile(r"[0-9a-f]{32}")
_TRANSFERS = 16
_CHUNK = 1024**2


@dataclass(frozen=True)
class RemoteFile:
    """One file of a snapshot in a remote.

    Attributes:
        relpath: Path inside the snapshot.
        md5: Of its content; its address in the remote.
    """

    relpath: str
    md5: str


def normalise_md5(md5: str) -> str:
    """Strip ``.dir`` and check the rest.

    Raises:
        SnapshotError: Not 32 hexadecimal digits.
    """
    plain = md5.strip().lower().removesuffix(".dir")
    if not _MD5.fullmatch(plain):
        raise SnapshotError(f'data md5 is "{md5}"', "32 hexadecimal digits", "Copy it from data.dvc (outs[0].md5).")
    return plain


def list_files(remote: Remote, md5: str) -> list[RemoteFile]:
    """The files of a folder, from its listing in the remote.

    Args:
        remote: Where it is.
        md5: Of the folder, without ``.dir``.

    Raises:
        SnapshotError: The remote lacks it, does not answer (``retry``), or its listing is damaged.
    """
    key = f"{object_key(md5)}.dir"
    data = remote.read(key)
    if data is None:
        if remote.read(f"{md5[:2]}/{md5[2:]}.dir") is not None:
            raise SnapshotError(
                f"remote {remote.url} holds {md5} in the layout of DVC 2",
                "the layout of DVC 3 (files/md5/...)",
                "Run: dvc cache migrate --dvc-files && dvc push, with DVC 3",
            )
        raise SnapshotError(
            f"remote {remote.url} has no snapshot {md5}",
            f"an object {key}",
            f"{remote.push_again}. Or correct data_md5.",
        )
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise _mismatch(f"{remote.url}/{key}", remote, found=found, needed=md5)
    try:
        files = [RemoteFile(relpath=entry["relpath"], md5=entry["md5"]) for entry in json.loads(data)]
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(
            f"{remote.url}/{key} is not a listing", "JSON of md5 and relpath", remote.push_again
        ) from error
    for file in files:
        parts = PurePosixPath(file.relpath).parts
        if not parts or ".." in parts or parts[0] == "/" or not _MD5.fullmatch(file.md5):
            raise SnapshotError(
                f'{remote.url}/{key} lists "{file.relpath}" ({file.md5})',
                "paths inside the folder",
                "Add the data again.",
            )
    return files


def object_key(md5: str) -> str:
    """Where a remote keeps the file of an md5."""
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def _mismatch(where: str, remote: Remote, *, found: str, needed: str) -> SnapshotError:
    return SnapshotError(
        f"{where} has md5 {found}",
        f"md5 {needed}",
        f"The remote's copy is damaged: delete it there. {remote.push_again}",
    )


def download_folder(
    md5: str, *, remote: Remote, path: Path, first: str, later: Callable[[Path], Iterable[str]]
) -> None:
    """Fetch a folder's files into ``<path>.partial``, which becomes ``path`` when it is complete.

    A file is in there under its own name only after its md5 was checked, so what is there need not be fetched again.

    Args:
        md5: Of the folder, without ``.dir``.
        remote: Where it is.
        path: Folder to make.
        first: The file that is fetched before the others, where there is one.
        later: Which files are not fetched here, from where the first one is.

    Raises:
        SnapshotError: The remote lacks a file, does not answer (``retry``), or holds one that does not match its md5.
        OSError: No space or no permission.
    """
    files = list_files(remote, md5)
    partial = path.with_name(f"{md5}.partial")

    def fetch(file: RemoteFile) -> None:
        fetch_file(file, remote=remote, folder=partial)

    for_all(fetch, [file for file in files if file.relpath == first])
    left_out = frozenset(later(partial / first))
    for_all(fetch, [file for file in files if file.relpath not in left_out])
    partial.rename(path)


def for_all(call: Callable[[_Item], object], files: Sequence[_Item]) -> None:
    """Call a function for each of some files, many side by side; the first error ends it."""
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as pool:
        futures = [pool.submit(call, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def fetch_file(file: RemoteFile, *, remote: Remote, folder: Path) -> None:
    """Fetch a file to its place in a folder, unless it is there.

    Raises:
        SnapshotError: As ``download_folder``.
        OSError: No space or no permission.
    """
    target = folder / file.relpath
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    resumed = part.is_file()
    found = _download(file, remote=remote, part=part)
    if found != file.md5 and resumed:  # what was there before may have been the wrong bytes
        part.unlink()
        found = _download(file, remote=remote, part=part)
    if found != file.md5:
        part.unlink()
        raise _mismatch(f"{file.relpath} ({remote.url}/{object_key(file.md5)})", remote, found=found, needed=file.md5)
    part.replace(target)


def _download(file: RemoteFile, *, remote: Remote, part: Path) -> str:
    """Go on with a download where ``part`` ends, and return the md5 of the whole."""
    hasher = hashlib.md5(usedforsecurity=False)
    with part.open("a+b") as out:
        out.seek(0)
        while chunk := out.read(_CHUNK):
            hasher.update(chunk)
        if hasher.hexdigest() != file.md5 or out.tell() == 0:
            for chunk in remote.stream(object_key(file.md5), offset=out.tell(), what=file.relpath):
                out.write(chunk)
                hasher.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    return hasher.hexdigest()


class RemoteShards:
    """Shards of a snapshot whose other files are on this disk; each is fetched when it is asked for.

    Several processes may ask for one shard at once: one fetches it, the others wait.

    Args:
        md5: Of the snapshot, without ``.dir``.
        url: Of its remote, which is not opened before a shard is missing.
        path: The snapshot's folder.
    """

    def __init__(self, md5: str, url: str, path: Path) -> None:
        self._md5 = md5
        self._url = url
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the remote itself."""
        return RemoteShards, (self._md5, self._url, self._path)

    @cached_property
    def _remote(self) -> Remote:
        return open_remote(self._url)

    @cached_property
    def files(self) -> Mapping[str, RemoteFile]:
        """All files of the snapshot, by their path in it."""
        return {file.relpath: file for file in list_files(self._remote, self._md5)}

    def fetch(self, relpaths: Sequence[str]) -> None:
        """Return when these shards are on this disk.

        Raises:
            SnapshotError: The remote lacks one, does not answer (``retry``), or it does not match its md5.
            StorageError: No space or no permission.
        """
        missing = [relpath for relpath in relpaths if not (self._path / relpath).is_file()]
        if missing:
            self._find(missing[0])
            for_all(self._fetch, missing)

    def fetch_end(self, relpath: str, *, size: int) -> pa.Buffer:
        """The end of a shard, with the whole of its footer, from this disk or the remote.

        It is kept, so that processes and attempts ask the remote once.

        Args:
            relpath: The shard.
            size: Its bytes.

        Raises:
            SnapshotError: The remote lacks it or does not answer (``retry``), or the shard is no Parquet file.
            StorageError: No space or no permission.
        """
        kept = self._beside("footers") / _name(relpath)
        if not kept.is_file():
            end = self._stream_end(relpath, size=size, count=_FOOTER_BYTES)
            if end[-4:] != _PARQUET:
                raise SnapshotError(
                    f"{relpath} ({self._url}) ends with {end[-4:]!r}", "a Parquet file", "Build and push it again."
                )
            count = int.from_bytes(end[-8:-4], "little") + 8
            if count > len(end):
                end = self._stream_end(relpath, size=size, count=count)
            write_file(kept, end[-count:], flush=False)
        return pa.py_buffer(kept.read_bytes())

    def _stream_end(self, relpath: str, *, size: int, count: int) -> bytes:
        key = object_key(self._find(relpath).md5)
        return b"".join(self._remote.stream(key, offset=max(0, size - count), what=relpath))

    def _find(self, relpath: str) -> RemoteFile:
        if relpath not in self.files:
            raise SnapshotError(
                f"snapshot {self._md5} in {self._url} lacks shard {relpath}",
                "every shard of its manifest",
                "Build the snapshot again and push it.",
            )
        return self.files[relpath]

    def _fetch(self, relpath: str) -> None:
        target = self._path / relpath
        try:
            with file_lock(self._beside("locks") / _name(relpath)):
                fetch_file(self._find(relpath), remote=self._remote, folder=self._path)
        except OSError as error:
            raise storage_error(error, target) from error

    def _beside(self, what: str) -> Path:
        return self._path.with_name(f"{self._md5}.{what}")


class ShardsOnDemand:
    """The shards that somebody reads, on this disk when they are needed.

    Args:
        remote: Where they come from.
        path: The snapshot's folder.
        sizes: Bytes of each shard, by its path in the snapshot.
        most_bytes: What they may take of the disk; None for as much as they need.
    """

    def __init__(self, remote: RemoteShards, path: Path, sizes: Mapping[str, int], *, most_bytes: int | None) -> None:
        self._remote = remote
        self._path = path
        self._sizes = dict(sizes)
        self._most_bytes = most_bytes
        self._ahead: deque[Path] = deque()

    def warn_of_shuffling(self) -> None:
        """Say so where shards that are read in any order do not all have room."""
        total = sum(self._sizes.values())
        if self._most_bytes is not None and total > self._most_bytes:
            warnings.warn(
                f"shards of {total / 1e9:,.1f} GB are read and {SHARDS_LIMIT} allows {self._most_bytes / 1e9:,.1f}: "
                "samples are shuffled over all shards, so each is fetched several times an epoch",
                stacklevel=2,
            )

    def ends(self) -> None:
        """Have the footers of all shards, those of missing ones from the remote and many at once."""
        for_all(self.end, [self._path / relpath for relpath in self._sizes])

    def end(self, path: Path) -> Path | pa.Buffer:
        """A shard, or as much of it as holds its footer."""
        relpath = self._relpath(path)
        return path if path.is_file() else self._remote.fetch_end(relpath, size=self._sizes[relpath])

    def fetch(self, path: Path) -> None:
        """Return when a shard is on this disk; it is then the last to be deleted.

        Raises:
            SnapshotError: As ``RemoteShards.fetch``.
            StorageError: No space or no permission.
        """
        self._remote.fetch([self._relpath(path)])
        if self._most_bytes is not None:
            os.utime(path)
            self._delete_some(path)

    def fetch_ahead(self, paths: Sequence[Path]) -> None:
        """Fetch shards while this process does something else; what fails is tried again when the shard is needed."""
        room, ahead = self._most_bytes, deque[Path]()
        for path in paths:
            # Half of what there is room for: the other half is being read.
            if room is not None and (room := room - 2 * self._sizes[self._relpath(path)]) < 0:
                break
            if not path.is_file():
                ahead.append(path)
        self._ahead.clear()
        self._ahead = ahead
        for _ in range(min(_AHEAD, len(ahead))):
            # It ends with this process, which may have no use for what comes any more.
            threading.Thread(target=self._fetch_all, args=(ahead,), daemon=True).start()

    def _fetch_all(self, paths: deque[Path]) -> None:
        with suppress(IndexError, ManyEyesError, OSError):
            while True:
                self.fetch(paths.popleft())

    def _delete_some(self, needed: Path) -> None:
        assert self._most_bytes is not None
        present = []
        for relpath, size in self._sizes.items():
            try:
                present.append(((self._path / relpath).stat().st_mtime_ns, size, self._path / relpath))
            except FileNotFoundError:
                continue
        taken = sum(size for _, size, _ in present)
        for _, size, path in sorted(present):
            if taken <= self._most_bytes:
                return
            if path != needed:
                # Who has it open goes on reading it.
                path.unlink(missing_ok=True)
                taken -= size

    def _relpath(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()


def in_turn(paths: Sequence[Path], source: ShardsOnDemand | None) -> Iterator[Path]:
    """Shards that are read one after the other; while one is looked at, the next few are fetched.

    Args:
        paths: In order.
        source: Has them; None where they are on this disk.

    Raises:
        SnapshotError: As ``RemoteShards.fetch``.
        StorageError: No space or no permission.
    """
    for number, path in enumerate(paths, start=1):
        if source is not None:
            source.fetch(path)
            source.fetch_ahead(paths[number : number + _AHEAD])
        yield path


def shards_limit() -> int | None:
    """Bytes that the shards of a data set may take, from ``MANYEYES_SHARDS_GB``; None for as many as they need.

    Raises:
        PipelineError: The variable is no number above 0.
    """
    given = os.environ.get(SHARDS_LIMIT)
    if not given:
        return None
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise PipelineError(f'{SHARDS_LIMIT} is "{given}"', "a number of gigabytes above 0", "Correct or unset it.")
    return int(limit * 1e9)


def _name(relpath: str) -> str:
    return hashlib.sha256(relpath.encode()).hexdigest()
