"""Fetch a version's bundle: checked, then moved into place at once."""

from __future__ import annotations

import shutil
from pathlib import Path

from manyeyes.errors import BundleError, RegistryError
from manyeyes.registry.references import BUNDLE_PATH, ModelReference, download, find_version, parse_model_reference
from manyeyes.registry.tracking import connect
from manyeyes.runtime.bundle_files import MANIFEST, check_files, digest_files, read_manifest
from manyeyes.storage import folder_beside, replaceable, storage_errors


def pull(name: str, alias_or_version: str | int | None = None, out_dir: Path | None = None) -> Path:
    """Fetch a bundle from the registry.

    Every file is checked against the manifest, and the manifest's digest against the registry, before anything
    appears at ``out_dir``. A bundle that is there already is replaced; anything else is left alone.

    Args:
        name: Of the registered model, or a whole reference such as ``NAME@ALIAS``.
        alias_or_version: ``champion``, ``previous``, 3, ...; the champion when left out.
        out_dir: Where the bundle goes; ``<name>`` in the working directory when left out.

    Returns:
        The bundle's folder.

    Raises:
        RegistryError: No such model, alias or version, or ``out_dir`` is not a bundle's folder.
        RegistryUnreachableError: The registry does not answer.
        BundleError: A file is missing or is not what was registered.
        StorageError: No space, no permission, or no place for a folder: a file, or the working directory.
    """
    reference = parse_model_reference(name, alias_or_version)
    given = Path(reference.name) if out_dir is None else out_dir
    out_dir = replaceable(given)
    tracking = connect()
    version = find_version(tracking, reference)
    expected = version.tags.get("bundle_digest")
    if out_dir.exists():
        if _is_intact(out_dir, expected):
            return given
        _check_replaceable(out_dir)
    with storage_errors(out_dir):
        scratch = folder_beside(out_dir)
        try:
            bundle = download(tracking, version, BUNDLE_PATH, scratch)
            _check(bundle, expected, reference)
            if out_dir.exists():
                out_dir.rename(scratch / "replaced")
            bundle.rename(out_dir)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return given


def _is_intact(folder: Path, expected: str | None) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest["files"])
    except BundleError:
        return False
    return bool(manifest.get("digest") == expected)


def _check_replaceable(out_dir: Path) -> None:
    if not out_dir.is_dir() or (any(out_dir.iterdir()) and not (out_dir / MANIFEST).is_file()):
        raise RegistryError(
            f"{out_dir} is there and is no bundle", "a new folder, an empty one or a bundle's", "Name another folder."
        )


def _check(bundle: Path, expected: str | None, reference: ModelReference) -> None:
    manifest = read_manifest(bundle)
    check_files(bundle, manifest["files"])
    digest = digest_files(manifest["files"])
    if digest != expected:
        raise BundleError(
            f"the bundle of {reference} has digest {digest}",
            f"{expected} was registered",
            "The artifact store was changed: restore it, or register the bundle again.",
        )
