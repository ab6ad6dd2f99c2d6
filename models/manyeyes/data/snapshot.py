"""Snapshots: one DVC version of ``data/``, opened by its md5 without git and without dvc.

A DVC 3 remote keeps a folder as a JSON list of ``{"md5", "relpath"}`` at ``files/md5/<2>/<30>.dir`` and every file at
``files/md5/<2>/<30>``. ``open_snapshot`` reads that layout from a folder or from S3, checks every file's md5 once, and
keeps the folder under ``<cache>/snapshots/<md5>``. Files are fetched in parallel, and a broken-off download goes on
where it stopped.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import pydantic
import yaml
from pydantic import Field

from manyeyes.data.remote import Remote, open_remote
from manyeyes.data.shards import storage_error
from manyeyes.errors import SnapshotError, did_you_mean
from manyeyes.storage import file_lock, hash_file
from manyeyes.strict import StrictModel

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


_Entry = TypeVar("_Entry")

MANIFEST = "manifest.json"


class ShardEntry(StrictModel):
    """One Parquet shard."""

    path: str = Field(description="Relative to the snapshot, with forward slashes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the whole file, hexadecimal.")
    rows: int = Field(ge=0, description="Records in the shard.")
    bytes: int = Field(ge=0, description="Size of the file in bytes.")


class DatasetEntry(StrictModel):
    """One data set: the records of some shards."""

    shards: tuple[ShardEntry, ...] = Field(description="In order.")
    rows: int = Field(ge=0, description="Records in all shards.")
    images: int = Field(ge=0, description="Images in all records, each counted as often as it is used.")
    licence: str = Field(description="SPDX name of the licence.")
    source: str = Field(description="Where the data comes from and what was done to it.")
    layout: Literal["records", "hub"] = Field(
        default="records", description="records: conversations. hub: a benchmark's own columns, as the hub has them."
    )


class PretrainedEntry(StrictModel):
    """A pretrained part that travels with the snapshot."""

    path: str = Field(description="Folder, relative to the snapshot.")
    files: dict[str, str] = Field(description="sha256 (hexadecimal) by file name.")
    licence: str = Field(description="SPDX name of the licence.")
    how: str = Field(description="The command that made it.")


class SnapshotManifest(StrictModel):
    """``manifest.json`` of a snapshot: what is in it, and the sha256 of every file that matters."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    datasets: dict[str, DatasetEntry] = Field(description="By name, for instance easy-vqa-train.")
    pretrained: dict[str, PretrainedEntry] = Field(default={}, description="By name, for instance tiny-lm.")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on this machine's disk.

    Attributes:
        path: Its folder.
        md5: As DVC computes it for the folder, without the ``.dir`` suffix: 32 hexadecimal digits.
        manifest: What is in it.
    """

    path: Path
    md5: str
    manifest: SnapshotManifest

    def dataset(self, name: str) -> DatasetEntry:
        """What the manifest says of a data set.

        Raises:
            SnapshotError: No such data set.
        """
        return _look_up(self.manifest.datasets, name, what="data set")

    def shards(self, dataset: str) -> list[Path]:
        """The shards of a data set, in order.

        Raises:
            SnapshotError: No such data set.
        """
        return [self.path / shard.path for shard in self.dataset(dataset).shards]

    def pretrained(self, name: str) -> Path:
        """Folder of a pretrained part.

        Raises:
            SnapshotError: No such part.
        """
        return self.path / _look_up(self.manifest.pretrained, name, what="pretrained part").path


@dataclass(frozen=True)
class DvcOutput:
    """What a ``.dvc`` file says of its folder.

    Attributes:
        path: The folder, relative to the file.
        md5: Without the ``.dir`` suffix.
        size: Bytes of all files.
        nfiles: How many files.
    """

    path: str
    md5: str
    size: int
    nfiles: int


def open_snapshot(*, md5: str, remote: str, cache_dir: Path) -> Snapshot:
    """Open a snapshot, fetching what is not there yet.

    Several processes may open the same snapshot at once: one fetches, the others wait.

    Args:
        md5: Of the folder, with or without ``.dir``.
        remote: A folder, or ``s3://bucket/prefix`` (credentials and ``AWS_ENDPOINT_URL`` from the environment).
        cache_dir: The snapshot is materialised at ``<cache_dir>/snapshots/<md5>``.

    Raises:
        SnapshotError: The remote lacks it, does not answer (``retry``), or holds a file that does not match its md5.
        StorageError: No space or no permission under ``cache_dir``.
    """
    md5 = normalise_md5(md5)
    path = cache_dir / "snapshots" / md5
    if not path.is_dir():
        try:
            with file_lock(path.parent / f"{md5}.lock"):
                if not path.is_dir():
                    download_folder(md5, remote=open_remote(remote), path=path)
        except OSError as error:
            raise storage_error(error, path) from error
    return Snapshot(path=path, md5=md5, manifest=_read_manifest(path))


def open_folder(path: Path) -> Snapshot:
    """Open a folder of a snapshot's layout that DVC does not track (yet).

    Args:
        path: The folder, with its ``manifest.json``.

    Raises:
        SnapshotError: No such folder, no manifest in it, or the manifest does not fit the files.
    """
    if not path.is_dir():
        raise SnapshotError(
            f"{path} is not a folder", "a snapshot's folder", "Make one: manyeyes data build easy-vqa OUT"
        )
    manifest = _read_manifest(path)
    return Snapshot(path=path, md5=hash_folder(path), manifest=manifest)


def hash_folder(path: Path) -> str:
    """The md5 that ``dvc add`` would give the folder, without ``.dir``.

    Args:
        path: A folder; empty folders in it do not count.
    """
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        hashes = pool.map(lambda relpath: hash_file(path / relpath, "md5"), files)
        listing = [{"md5": md5, "relpath": relpath} for relpath, md5 in zip(files, hashes, strict=True)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def read_dvc_file(path: Path) -> DvcOutput:
    """Read the ``.dvc`` file of a folder.

    Raises:
        SnapshotError: No such file, not of DVC 3, or not of one folder.
    """
    if not path.is_file():
        raise SnapshotError(
            f"{path} does not exist", "the .dvc file of a snapshot", "Run it at the root of a checkout."
        )
    try:
        outs = yaml.safe_load(path.read_text(encoding="utf-8"))["outs"]
        (out,) = outs
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError(
            f"{path} is not a .dvc file of one output", "outs: with one entry", "See: dvc add"
        ) from error
    if "md5" not in out:
        raise SnapshotError(
            f"{path} has no md5 (a cloud-versioned remote, or files that were never added)",
            "outs[0].md5",
            "Use a remote without version_aware and worktree, then: dvc add and dvc push",
        )
    if out.get("hash") != "md5":
        raise SnapshotError(
            f"{path} was written by DVC 2 (it has no hash: md5)",
            "a .dvc file of DVC 3",
            f"Run: dvc add {out.get('path', 'data')} && dvc push, with DVC 3",
        )
    if not str(out["md5"]).endswith(".dir"):
        raise SnapshotError(f"{path} tracks the file {out.get('path')}", "a folder", "Track the folder: dvc add data")
    return DvcOutput(
        path=str(out["path"]), md5=normalise_md5(out["md5"]), size=int(out["size"]), nfiles=int(out["nfiles"])
    )


def read_default_remote(repository: Path) -> str:
    """The url of the checkout's default DVC remote.

    Args:
        repository: Root of the checkout; ``.dvc/config`` and, over it, ``.dvc/config.local`` are read.

    Returns:
        ``s3://bucket/prefix``, or a folder: relative to the working directory when it lies inside, else absolute.

    Raises:
        SnapshotError: No config, no default remote, or one that keeps file names (version_aware, worktree).
    """
    folder = repository / ".dvc"
    parser = configparser.ConfigParser(interpolation=None)
    if not parser.read([folder / "config", folder / "config.local"]):
        raise SnapshotError(
            f"{folder / 'config'} does not exist", "a DVC repository", "Run it at the root of a checkout."
        )
    name = parser.get("core", "remote", fallback=None)
    if name is None:
        raise SnapshotError(
            f"{folder / 'config'} names no default remote", "core.remote", "Run: dvc remote default NAME"
        )
    section = f"'remote \"{name}\"'"
    url = parser.get(section, "url", fallback=None)
    if url is None:
        raise SnapshotError(
            f'{folder / "config"} has no url for remote "{name}"', "a url", f"Run: dvc remote add {name} URL"
        )
    for option in ("version_aware", "worktree"):
        if parser.getboolean(section, option, fallback=False):
            raise SnapshotError(
                f'remote "{name}" has {option} = true, it keeps file names instead of md5s',
                "a remote in DVC 3's plain layout",
                f"Run: dvc remote modify {name} {option} false && dvc push",
            )
    if "://" in url:
        return url
    path = (folder / url).resolve()
    here = Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _look_up(table: dict[str, _Entry], name: str, *, what: str) -> _Entry:
    if name not in table:
        raise SnapshotError(
            f'{what} is "{name}"',
            f"the snapshot has {', '.join(sorted(table)) or 'none'}",
            f"{did_you_mean(name, table)}Name one of them, or add it to the snapshot.",
        )
    return table[name]


def _read_manifest(path: Path) -> SnapshotManifest:
    file = path / MANIFEST
    if not file.is_file():
        raise SnapshotError(f"{path} has no {MANIFEST}", "a snapshot", "Make one: manyeyes data build easy-vqa OUT")
    try:
        manifest = SnapshotManifest.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SnapshotError(f"{file}: {place}: {first['msg']}", "a snapshot's manifest", "Build it again.") from error
    for dataset in manifest.datasets.values():
        for shard in dataset.shards:
            _check_size(path / shard.path, shard.bytes)
    return manifest


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise SnapshotError(
            f"shard {path} {'is missing' if found is None else f'has {found} bytes'}",
            f"{expected} bytes, as the manifest says" + (": it is truncated" if found and found < expected else ""),
            "Delete the snapshot's folder and run again to fetch it anew, or build it again.",
        )
