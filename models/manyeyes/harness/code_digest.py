"""Which code made an artifact: the image's digest on a cluster, a digest of the library's source elsewhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from manyeyes.storage import hash_file

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
