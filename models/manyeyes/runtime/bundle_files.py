"""The files of a bundle: their names, the manifest that lists them, and whether they are as it says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyeyes.errors import BundleError
from manyeyes.runtime.bundle_contents import FORMAT_VERSION, BundleManifest, read_object, read_part
from manyeyes.storage import hash_file

VISION, EMBED, DECODER = "vision.onnx", "embed.onnx", "decoder.onnx"
TOKENIZER, PREPROCESS, CHAT, MANIFEST = "tokenizer.json", "preprocess.json", "chat.json", "manifest.json"
REQUIRED_FILES = (VISION, EMBED, DECODER, TOKENIZER, PREPROCESS, CHAT)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a bundle's ``manifest.json``.

    Raises:
        BundleError: It is missing, is of another format version, holds something else than a manifest does, lacks a
            required file, or was changed.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path} has no {MANIFEST}", "a bundle's folder is needed", "Check the path, or pull it again."
        )
    manifest = read_object(path / MANIFEST)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST} has format_version {version!r}", f"this runtime reads {FORMAT_VERSION}", "Update manyeyes."
        )
    read_part(BundleManifest, manifest, what=MANIFEST)
    files = manifest["files"]
    absent = [name for name in REQUIRED_FILES if name not in files]
    if absent:
        raise BundleError(f"{MANIFEST} lists no {', '.join(absent)}", "a whole bundle is needed", "Export it again.")
    if digest_files(files) != manifest.get("digest"):
        raise BundleError(
            f"{MANIFEST} has digest {manifest.get('digest')!r}",
            "its list of files has another one",
            "The manifest was changed: pull or export the bundle again.",
        )
    return manifest


def check_files(path: Path, files: Mapping[str, Mapping[str, Any]], *, sha256: bool = True) -> None:
    """Check that files are as a manifest says.

    Args:
        path: Their folder.
        files: ``sha256`` (hexadecimal) and ``bytes`` by name.
        sha256: Whether to read the files; otherwise only their sizes are checked.

    Raises:
        BundleError: A file is missing, has another size or another sha256; names it.
    """
    for name, expected in files.items():
        if Path(name).name != name:
            raise BundleError(f"{MANIFEST} names {name!r}", "plain file names are needed", "Do not use this bundle.")
        file = path / name
        if not file.is_file():
            raise BundleError(f"{name} is missing from {path}", f"{MANIFEST} lists it", "Pull or export it again.")
        size = file.stat().st_size
        if size != expected.get("bytes"):
            raise BundleError(
                f"{name} has {size} bytes", f"{MANIFEST} says {expected.get('bytes')}", "Pull or export it again."
            )
        if not sha256:
            continue
        digest = hash_file(file)
        if digest != expected.get("sha256"):
            raise BundleError(
                f"{name} has sha256 {digest}", f"{MANIFEST} says {expected.get('sha256')}", "Pull or export it again."
            )


def digest_files(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of a bundle: sha256 over the names and sha256s of its files, sorted by name.

    Args:
        files: ``sha256`` (hexadecimal) by name, as ``manifest.json`` lists them.
    """
    lines = "".join(f"{files[name].get('sha256')}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
