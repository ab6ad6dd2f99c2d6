"""Downloads: a folder from a DVC remote, in parallel, every file's md5 checked, going on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from manyeyes.data.remote import Remote
from manyeyes.errors import SnapshotError

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
    key = f"{_key(md5)}.dir"
    data = remote.read(key)
    if data is None:
        if remote.read(f"{md5[:2]}/{md5[2:]}.dir") is not None:
            raise SnapshotError(
                f"remote {remote.url} holds {md5} in the layout of DVC 2",
                "the layout of DVC 3 (files/md5/...)",
                "Run: dvc cache migrate --dvc-files && dvc push, with DVC 3",
            )
        raise SnapshotError(
            f"remote {remote.url} has no snapshot {md5}", f"an object {key}", "Push it: dvc push. Or correct data_md5."
        )
    _check_md5(data, md5, where=f"{remote.url}/{key}")
    try:
        files = [RemoteFile(relpath=entry["relpath"], md5=entry["md5"]) for entry in json.loads(data)]
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(
            f"{remote.url}/{key} is not a listing", "JSON of md5 and relpath", "Run: dvc push"
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


def _key(md5: str) -> str:
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def _check_md5(data: bytes, md5: str, *, where: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise _mismatch(where, found=found, needed=md5)


def _mismatch(where: str, *, found: str, needed: str) -> SnapshotError:
    return SnapshotError(
        f"{where} has md5 {found}",
        f"md5 {needed}",
        "The remote's copy is damaged: delete it there and push it again from a good copy (dvc push).",
    )


def download_folder(md5: str, *, remote: Remote, path: Path) -> None:
    """Fetch every file into ``<path>.partial``, which becomes ``path`` when it is complete.

    A file is in there under its own name only after its md5 was checked, so what is there need not be fetched again.

    Args:
        md5: Of the folder, without ``.dir``.
        remote: Where it is.
        path: Folder to make.

    Raises:
        SnapshotError: The remote lacks a file, does not answer (``retry``), or holds one that does not match its md5.
        OSError: No space or no permission.
    """
    files = list_files(remote, md5)
    partial = path.with_name(f"{md5}.partial")
    _for_all(lambda file: _fetch(file, remote=remote, folder=partial), files)
    partial.rename(path)


def _for_all(call: Callable[[RemoteFile], None], files: Sequence[RemoteFile]) -> None:
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as pool:
        futures = [pool.submit(call, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _fetch(file: RemoteFile, *, remote: Remote, folder: Path) -> None:
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
        raise _mismatch(f"{file.relpath} ({remote.url}/{_key(file.md5)})", found=found, needed=file.md5)
    part.replace(target)


def _download(file: RemoteFile, *, remote: Remote, part: Path) -> str:
    """Go on with a download where ``part`` ends, and return the md5 of the whole."""
    hasher = hashlib.md5(usedforsecurity=False)
    with part.open("a+b") as out:
        out.seek(0)
        while chunk := out.read(_CHUNK):
            hasher.update(chunk)
        if hasher.hexdigest() != file.md5 or out.tell() == 0:
            for chunk in remote.stream(_key(file.md5), offset=out.tell(), what=file.relpath):
                out.write(chunk)
                hasher.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    return hasher.hexdigest()
