"""A new snapshot in a DVC remote: what another one has and what a folder adds, without the shards of the former.

Files are kept under their md5, so those that the remote has are left alone. The listing of the folder comes last: until
then nobody sees the new snapshot, and who was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from manyeyes.data.fetching import for_all, object_key
from manyeyes.data.remote import WritableRemote
from manyeyes.data.snapshot import (
    MANIFEST,
    DvcOutput,
    Snapshot,
    SnapshotManifest,
    digest_listing,
    list_folder,
    read_snapshot_manifest,
)
from manyeyes.errors import SnapshotError
from manyeyes.storage import hash_file, write_file


@dataclass(frozen=True)
class Addition:
    """A snapshot that has what another one has, and what is in a folder.

    Attributes:
        base: The other one.
        folder: Its files take the place of those of the same name, its folders that of whole folders.
        manifest: Of the new snapshot.
        files: md5 of all its files by path.
    """

    base: Snapshot
    folder: Path
    manifest: SnapshotManifest
    files: Mapping[str, str]

    def listing(self) -> bytes:
        """As DVC keeps it in a remote."""
        return list_folder(self.files)

    def dvc_output(self) -> DvcOutput:
        """What the ``.dvc`` file of the new snapshot says."""
        sizes = {shard.path: shard.bytes for entry in self.manifest.datasets.values() for shard in entry.shards}
        size = sum(sizes.get(relpath) or self._path(relpath).stat().st_size for relpath in self.files)
        return DvcOutput(path="data", md5=digest_listing(self.listing()), size=size, nfiles=len(self.files))

    def push(self, remote: WritableRemote, *, progress: Callable[[str, float], None]) -> None:
        """Put every file into a remote that it has not.

        Args:
            remote: Where to.
            progress: Called with a sentence and the share that is done.

        Raises:
            SnapshotError: The remote, or that of the other snapshot, refuses or does not answer (``retry``).
            StorageError: No space or no permission.
        """
        done = 0

        def push(relpath: str) -> None:
            nonlocal done
            key = object_key(self.files[relpath])
            if remote.size(key) is None:
                if not self._path(relpath).is_file():
                    self.base.fetch([relpath])
                remote.write(key, self._path(relpath))
            done += 1
            progress(f"pushing {relpath}", done / len(self.files))

        for_all(push, sorted(self.files))

    def _path(self, relpath: str) -> Path:
        own = self.folder / relpath
        return own if own.is_file() else self.base.path / relpath


def add_to_snapshot(base: Snapshot, folder: Path) -> Addition:
    """What a snapshot and a folder are together; the folder's manifest becomes that of both.

    Args:
        base: From a remote; its shards need not be on this disk.
        folder: With the layout and the manifest of a snapshot.

    Raises:
        SnapshotError: The base's remote does not answer (``retry``), or the folder is no snapshot.
        StorageError: No space or no permission.
    """
    assert base.remote is not None
    own = read_snapshot_manifest(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    taken = {name.partition("/")[0] for name in names}
    kept = {name: file.md5 for name, file in base.remote.files.items() if name.partition("/")[0] not in taken}
    others = {
        name: entry for name, entry in base.manifest.datasets.items() if all(s.path in kept for s in entry.shards)
    }
    manifest = SnapshotManifest(
        datasets=dict(sorted({**others, **own.datasets}.items())),
        pretrained=dict(sorted({**base.manifest.pretrained, **own.pretrained}.items())),
    )
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return Addition(base, folder, manifest, {**kept, **{name: hash_file(folder / name, "md5") for name in names}})


def push_listing(listing: bytes, remote: WritableRemote) -> str:
    """Make a snapshot visible whose files a remote has.

    Args:
        listing: As ``Addition.listing`` gives it.
        remote: Has the files.

    Returns:
        The snapshot's md5, without ``.dir``.

    Raises:
        SnapshotError: The remote lacks a file, refuses or does not answer (``retry``).
        StorageError: No space or no permission.
    """
    lacking: list[str] = []

    def look(entry: Mapping[str, str]) -> None:
        if remote.size(object_key(entry["md5"])) is None:
            lacking.append(entry["relpath"])

    for_all(look, json.loads(listing))
    if lacking:
        raise SnapshotError(
            f"{remote.url} lacks {len(lacking)} files of the new snapshot, for instance {min(lacking)}",
            "all of them, as they were pushed",
            "Something deleted them since (dvc gc?): run the pipeline without its cache.",
        )
    md5 = digest_listing(listing)
    remote.write(f"{object_key(md5)}.dir", listing)
    return md5
