"""Output files that are whole or not there, and reading them back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from manyeyes.errors import EvaluationError
from manyeyes.storage import storage_errors

Checked = TypeVar("Checked", bound=BaseModel)


def read_checked(path: Path, model: type[Checked], *, what: str, needed: str, do: str) -> Checked:
    """Read one of an evaluation's JSON files.

    Args:
        path: The file.
        model: What it holds.
        what: Its name in a message, with an article.
        needed: Said where there is no file.
        do: Said where there is no file.

    Raises:
        EvaluationError: Missing, or something else.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise EvaluationError(f"no file {path}", needed, do) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(
            f"{path} is not {what} ({place}: {first['msg']})",
            "what `manyeyes evaluate` writes",
            "Evaluate the model again.",
        ) from error


def write_file(path: Path, content: bytes) -> None:
    """Write beside the target, flush to disk, rename.

    Raises:
        StorageError: No space, or no permission; the file is then as it was before.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
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
