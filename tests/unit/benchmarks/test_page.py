"""docs/benchmarks.md is made from the rows."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_page_is_current() -> None:
    rendered = runpy.run_path(str(DOCS / "benchmarks.py"))["render"]()
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == rendered, "run: make docs"
