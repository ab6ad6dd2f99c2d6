"""Texts that are worth keeping between commands: what takes torch and seconds to work out, and never changes.

A text is kept under its kind, what it was made of, the library's code and the packages that compute it. A file that is
damaged is written again; a folder that cannot be written is done without.
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
from manyeyes.harness.code_digest import code_digest
from manyeyes.storage import write_file

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
