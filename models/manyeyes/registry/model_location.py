"""Where a model is that somebody wants scored: a folder, an S3 prefix or the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from manyeyes.data.remote import Remote, open_remote
from manyeyes.errors import BundleError, CheckpointError, SnapshotError
from manyeyes.storage import is_there, link_or_copy, new_folder

BUNDLE_MANIFEST, CHECKPOINT_MANIFEST = "manifest.json", "checkpoint.json"
Kind = Literal["torch", "bundle"]


@dataclass(frozen=True)
class ModelLocation:
    """A model that was found.

    Attributes:
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        place: A folder's absolute path, ``s3://bucket/prefix`` or ``models:/NAME/VERSION``.
        digest: Of the checkpoint or bundle.
    """

    kind: Kind
    place: str
    digest: str


def locate_model(text: str) -> ModelLocation:
    """Find a model, and pin what may change: an alias becomes a version.

    Args:
        text: A folder, ``file://`` or ``s3://`` with a checkpoint or bundle, or NAME, NAME@ALIAS, NAME/VERSION in the
            registry; NAME alone is its champion. A folder that exists wins over a registered model of that name.

    Raises:
        CheckpointError: Neither a checkpoint nor a bundle is there.
        BundleError: Its manifest is broken.
        RegistryError: No such model, alias or version.
    """
    text = text.strip()
    path = Path(text.removeprefix("file://"))
    if not text:
        raise CheckpointError("no model is named", "a folder, s3:// or a registered model", "Name one.")
    if text.startswith("file://") or (is_there(path) and path.is_dir()):
        return _read_manifest(str(path.resolve()))
    if "://" in text:
        return _read_manifest(text.rstrip("/"))
    if text.startswith(("/", "./", "../")):
        raise CheckpointError(f'model is "{text}"', "a folder; there is none of that name", "Check the path.")
    from manyeyes.registry.references import find_version, parse_model_reference
    from manyeyes.registry.tracking import connect

    found = find_version(connect(), parse_model_reference(text))
    return ModelLocation("bundle", f"models:/{found.name}/{found.version}", str(found.tags["bundle_digest"]))


def fetch_model(location: ModelLocation, out: Path) -> None:
    """Put the model's files into a folder; hard links where that is possible.

    Args:
        location: From ``locate_model``.
        out: Folder to write; appears when it is complete.

    Raises:
        CheckpointError: A file of the checkpoint is missing, or it is another one than was located.
        BundleError: The same of a bundle.
        RegistryError: The registry has lost it.
        StorageError: No space, or no permission.
    """
    if location.place.startswith("models:/"):
        from manyeyes.registry.pull import pull

        pull(location.place, out_dir=out)
    else:
        with new_folder(out) as folder:
            for name in _file_names(location):
                _copy(location.place, name, folder / name)
    if _digest(location.kind, out) != location.digest:
        kind = CheckpointError if location.kind == "torch" else BundleError
        raise kind(
            f"{location.place} has digest {_digest(location.kind, out)[:16]}",
            f"{location.digest[:16]}, which it had when this run began",
            "Run it again, and leave the model alone meanwhile.",
        )


def _read_manifest(place: str) -> ModelLocation:
    kinds: tuple[tuple[Kind, str], ...] = (("bundle", BUNDLE_MANIFEST), ("torch", CHECKPOINT_MANIFEST))
    with _opened(place) as remote:
        for kind, name in kinds:
            manifest = remote.read(name)
            if manifest is not None:
                return ModelLocation(kind, place, str(_parse(place, name, manifest)["digest"]))
    raise CheckpointError(
        f"{place} has neither {BUNDLE_MANIFEST} nor {CHECKPOINT_MANIFEST}",
        "a checkpoint or a bundle of ManyEyes",
        "Check the path.",
    )


def _file_names(location: ModelLocation) -> Iterator[str]:
    name = BUNDLE_MANIFEST if location.kind == "bundle" else CHECKPOINT_MANIFEST
    with _opened(location.place) as remote:
        manifest = remote.read(name)
    if manifest is None:
        raise CheckpointError(f"{location.place} lost its {name}", "it was there when this run began", "Run it again.")
    yield name
    for file in _parse(location.place, name, manifest)["files"]:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{name} names {file!r}", "files below the model's folder", "Do not use this model.")
        yield file


def _parse(place: str, name: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{place}/{name} is not JSON ({error})", "digest and files", "Copy it again.") from error
    if not isinstance(found, dict) or not {"digest", "files"} <= set(found):
        raise BundleError(f"{place}/{name} is no manifest of ManyEyes", "digest and files", "Check the path.")
    return found


def _copy(place: str, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in place:
        source = Path(place) / name
        if not source.is_file():
            raise CheckpointError(
                f"{place} lacks {name}", "every file that its manifest names", "Copy it again, whole."
            )
        link_or_copy(source, target)
        return
    with _opened(place) as remote, target.open("wb") as file:
        for chunk in remote.stream(name, offset=0, what=name):
            file.write(chunk)


def _digest(kind: Kind, folder: Path) -> str:
    if kind == "torch":
        from manyeyes.model import checkpoint_digest

        return checkpoint_digest(folder)
    from manyeyes.runtime.bundle_files import check_files, digest_files, read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest["files"])
    return digest_files(manifest["files"])


@contextmanager
def _opened(place: str) -> Iterator[Remote]:
    """The place of a model; speaks of a model where the reader of snapshots speaks of data."""
    try:
        yield open_remote(place)
    except SnapshotError as error:
        raise CheckpointError(
            f"model {place}: {error.found}",
            "a folder or s3://bucket/prefix with a checkpoint or a bundle",
            "Check the path and, for S3, the credentials and AWS_ENDPOINT_URL.",
            retry=error.retry,
        ) from error
