"""What a process may write to its terminal or log, whatever the user's locale is."""

from __future__ import annotations

import io
import sys

UTF8_CHILD = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
"""Environment of a child process whose output goes to a file of ours."""


def replace_unknown_characters() -> None:
    r"""Write a character that the output cannot show as ``\u2192``, instead of stopping the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
