"""The command line, called in this process."""

from __future__ import annotations

import sys

import pytest

from manyeyes.cli.main import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of ``manyeyes`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["manyeyes", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
