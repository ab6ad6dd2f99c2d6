"""Snapshots: one DVC version of ``data/``, opened by its md5 without git and without dvc.

A DVC 3 remote keeps a folder as a JSON list of ``{"md5", "relpath"}`` at ``files/md5/<2>/<30>.dir`` and every file at
``files/md5/<2>/<30>``. ``open_snapshot`` reads that layout from a folder or from S3, checks every file's md5 once, and
keeps the folder under ``<cache>/snapshots/<md5>``; shards come when they are asked for. Files are fetched in parallel,
and a broken-off download goes on where it stopped.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import pydantic
import yaml
from pydantic import Field

from manyeyes.data.fetching import RemoteShards, ShardsOnDemand, download_folder, normalise_md5, shards_limit
from manyeyes.data.remote import open_remote
from manyeyes.data.shards import storage_error
from manyeyes.errors import SnapshotError, did_you_mean
from manyeyes.storage import content_digest, file_lock
from manyeyes.strict import StrictModel

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
        remote: Where shards come from that are not there yet; None where all are.
    """

    path: Path
    md5: str
    manifest: SnapshotManifest
    remote: RemoteShards | None = None

    def dataset(self, name: str) -> DatasetEntry:
        """What the manifest says of a data set.

        Raises:
            SnapshotError: No such data set.
        """
        return _look_up(self.manifest.datasets, name, what="data set")

    def shards(self, dataset: str) -> list[Path]:
        """The shards of a data set, in order, fetched where they are not there yet.

        Raises:
            SnapshotError: No such data set; or the remote lacks a shard, does not answer (``retry``), or holds one that
                does not match its md5.
            StorageError: No space or no permission.
        """
        paths = [shard.path for shard in self.dataset(dataset).shards]
        self.fetch(paths)
        return [self.path / path for path in paths]

    def fetch(self, relpaths: Sequence[str]) -> None:
        """Return when some shards are on this disk; they are named by their paths in the snapshot.

        Raises:
            SnapshotError: As for ``shards``.
            StorageError: No space or no permission.
        """
        if self.remote is not None:
            self.remote.fetch(relpaths)

    def shard_paths(self, dataset: str) -> list[Path]:
        """Where the shards of a data set are or will be, in order; none is fetched.

        Raises:
            SnapshotError: No such data set.
        """
        return [self.path / shard.path for shard in self.dataset(dataset).shards]

    def on_demand(self, datasets: Sequence[str]) -> ShardsOnDemand | None:
        """The shards of some data sets for who reads them one after the other; None where all are on this disk.

        Raises:
            SnapshotError: No such data set.
            PipelineError: ``MANYEYES_SHARDS_GB`` is no number.
        """
        if self.remote is None:
            return None
        sizes = {shard.path: shard.bytes for dataset in datasets for shard in self.dataset(dataset).shards}
        return ShardsOnDemand(self.remote, self.path, sizes, most_bytes=shards_limit())

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
    """Open a snapshot; what is not there yet is fetched, a shard when it is asked for.

    Several processes may open the same snapshot at once: one fetches, the others wait.

    Args:
        md5: Of the folder, with or without ``.dir``.
        remote: A folder, ``s3://bucket/prefix`` (credentials and ``AWS_ENDPOINT_URL`` from the environment), or
            ``hub:OWNER/NAME@COMMIT``.
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
                    download_folder(md5, remote=open_remote(remote), path=path, first=MANIFEST, later=_list_shards)
        except OSError as error:
            raise storage_error(error, path) from error
    manifest = read_snapshot_manifest(path, whole=False)
    return Snapshot(path=path, md5=md5, manifest=manifest, remote=RemoteShards(md5, remote, path))


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
    manifest = read_snapshot_manifest(path)
    return Snapshot(path=path, md5=hash_folder(path), manifest=manifest)


def hash_folder(path: Path) -> str:
    """The md5 that ``dvc add`` would give the folder, without ``.dir``; large files that did not change are known.

    Args:
        path: A folder; empty folders in it do not count.
    """
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        hashes = pool.map(lambda relpath: content_digest(path / relpath, "md5"), files)
        return digest_listing(list_folder(dict(zip(files, hashes, strict=True))))


def list_folder(files: Mapping[str, str]) -> bytes:
    """The listing of a folder as DVC keeps it in a remote.

    Args:
        files: md5 by path inside the folder, with forward slashes.
    """
    listing = [{"md5": files[relpath], "relpath": relpath} for relpath in sorted(files)]
    return json.dumps(listing, sort_keys=True).encode()


def digest_listing(listing: bytes) -> str:
    """The md5 of a folder, without ``.dir``, from what ``list_folder`` gave."""
    return hashlib.md5(listing, usedforsecurity=False).hexdigest()


def read_dvc_file(path: Path) -> DvcOutput:
    """Read the ``.dvc`` file of a folder.

    Raises:
        SnapshotError: No such file, not of DVC 3, or not of one folder.
    """
    if not path.is_file():
        raise SnapshotError(
            f"{path} does not exist", "the .dvc file of a snapshot", "Run it at the root of a checkout."
        )
    return parse_dvc_text(path.read_text(encoding="utf-8"), path=path)


def write_dvc_text(out: DvcOutput) -> str:
    """The text of the ``.dvc`` file of a folder, as ``dvc add`` writes it."""
    facts = {"md5": f"{out.md5}.dir", "size": out.size, "nfiles": out.nfiles, "hash": "md5", "path": out.path}
    return yaml.safe_dump({"outs": [facts]}, sort_keys=False)


def parse_dvc_text(text: str, *, path: Path) -> DvcOutput:
    """Read the text of a folder's ``.dvc`` file.

    Args:
        text: Of the file, of whichever commit.
        path: What messages call it.

    Raises:
        SnapshotError: Not of DVC 3, or not of one folder.
    """
    try:
        outs = yaml.safe_load(text)["outs"]
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
    if "://" in url or url.startswith("hub:"):
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


def _list_shards(manifest: Path) -> list[str]:
    """The shards that a manifest names; none where it is missing or no manifest, which its reader says."""
    if not manifest.is_file():
        return []
    try:
        datasets = SnapshotManifest.model_validate_json(manifest.read_bytes()).datasets
    except pydantic.ValidationError:
        return []
    return [shard.path for dataset in datasets.values() for shard in dataset.shards]


def read_snapshot_manifest(path: Path, *, whole: bool = True) -> SnapshotManifest:
    """Read the manifest of a snapshot's folder; that its shards have their sizes is checked.

    Args:
        path: The folder.
        whole: Whether every shard has to be there.

    Raises:
        SnapshotError: No manifest, or it does not fit the files.
    """
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
            if whole or (path / shard.path).is_file():
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
