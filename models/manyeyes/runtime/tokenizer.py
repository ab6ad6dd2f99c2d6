"""``tokenizer.json``, read or refused."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from manyeyes.errors import ManyEyesError
from manyeyes.runtime.json_files import read_json_file


def read_tokenizer(file: Path, *, error: type[ManyEyesError]) -> Tokenizer:
    """Read a ``tokenizer.json``; it neither cuts nor pads, whatever the file says.

    Args:
        file: The file.
        error: What is raised where it cannot be read.

    Raises:
        ManyEyesError: ``error``: missing, no JSON, or no tokenizer.
    """
    values = read_json_file(file, error=error)
    if not isinstance(values, dict) or "model" not in values:
        raise error(f"{file} has no model", "a tokenizer.json of the library tokenizers", "Fetch it again.")
    try:
        return Tokenizer.from_str(json.dumps({**values, "truncation": None, "padding": None}))
    except BaseException as problem:
        # The library raises a bare Exception for what it does not understand, and a panic, which is none, for the rest.
        if isinstance(problem, (KeyboardInterrupt, SystemExit)):
            raise
        raise error(f"{file} is no tokenizer ({problem})", "a tokenizer.json", "Fetch it again.") from problem
