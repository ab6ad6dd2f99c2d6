"""JSON that somebody else wrote: whatever is in the file, it is read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from manyeyes.errors import ManyEyesError


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: Not JSON, nested too deep to be read, a number of thousands of digits, or NaN and Infinity, which
            JSON does not have.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json_file(file: Path, *, error: type[ManyEyesError]) -> Any:
    """What a JSON file holds.

    Args:
        file: In UTF-8.
        error: What is raised where it cannot be read.

    Raises:
        ManyEyesError: ``error``: the file is missing, no text, or as ``parse_json``.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(
            f"{file} cannot be read ({problem.strerror})", "a JSON file is needed", "Check the path, or fetch it again."
        ) from problem
    except ValueError as problem:
        raise error(f"{file} cannot be read ({problem})", "JSON in UTF-8 is needed", "Fetch it again.") from problem


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
