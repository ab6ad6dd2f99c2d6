"""Texts that are worth keeping between commands: what takes torch and seconds to work out, and never changes.

A text is kept under its kind, what it was made of, the library's code and the packages that compute it. A file that is
damaged is written again; a folder that cannot be written is done without.

``code_digest`` says which code that is: the image's digest on a cluster, a digest of the library's source elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from manyeyes.errors import StorageError
from manyeyes.storage import hash_file, write_file

_SUFFIXES = (".py", ".json", ".typed")


def code_digest(*, constraints: Path = Path("constraints.txt")) -> str:
    """The digest that every later step takes, so that an edited library is not answered from the cache.

    ``MANYEYES_IMAGE_DIGEST`` wins. Otherwise: sha256 over the names and contents of the package's source files and of
    ``constraints`` (where it exists). Recipes are left out: they have a digest of their own.

    Args:
        constraints: The file that pins the packages.
    """
    image = os.environ.get("MANYEYES_IMAGE_DIGEST")
    if image:
        return image.removeprefix("sha256:")
    package = Path(__file__).resolve().parents[1]
    files = sorted(
        path
        for path in package.rglob("*")
        if path.suffix in _SUFFIXES and "__pycache__" not in path.parts and path.is_file()
    )
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(package).as_posix().encode() + b"\0")
        total.update(bytes.fromhex(hash_file(path)))
    if constraints.is_file():
        total.update(b"constraints\0" + constraints.read_bytes())
    return total.hexdigest()


_PACKAGES = ("torch", "transformers", "timm")
_MOST_FILES = 200  # of a kind; a changed library leaves those of the old one behind


def keep_dir() -> Path:
    """``MANYEYES_CACHE``, or ``manyeyes`` in the user's cache folder: commands are given outside of checkouts too."""
    given = os.environ.get("MANYEYES_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyeyes"


def kept(kind: str, *made_of: str, make: Callable[[], str]) -> str:
    """A text that was made before, or that is made now and kept.

    Args:
        kind: Folder of such texts.
        made_of: Everything beside the library's code that the text depends on, for instance a recipe's digest.
        make: Makes it.

    Raises:
        PackageNotFoundError: A package that computes such texts is not installed.
    """
    versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
    key = hashlib.sha256(json.dumps([code_digest(), *versions, *made_of]).encode()).hexdigest()
    try:
        path = keep_dir() / kind / f"{key}.json"
        text = _read(path)
    except (OSError, RuntimeError):  # no home folder, or no permission to look
        return make()
    if text is None:
        text = make()
        with contextlib.suppress(OSError, StorageError):
            _write(path, text)
    return text


def _read(path: Path) -> str | None:
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        text = file["text"]
        return text if file["sha256"] == _sha256(text) else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, text: str) -> None:
    write_file(path, json.dumps({"sha256": _sha256(text), "text": text}), flush=False)
    files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-_MOST_FILES]:
        file.unlink(missing_ok=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
