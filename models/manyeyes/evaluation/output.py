"""Reading back the files that an evaluation writes."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from manyeyes.errors import EvaluationError

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
