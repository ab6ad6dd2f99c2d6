"""Output files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from manyeyes.storage import storage_errors


def write_file(path: Path, content: bytes) -> None:
    """Write beside the target, flush to disk, rename.

    Raises:
        StorageError: No space, or no permission; the file is then as it was before.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
