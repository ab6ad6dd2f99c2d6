"""docs/adding_a_benchmark.md, followed word for word in a copy of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.page_following import ROOT, check_style, copy_code, follow_page


@pytest.mark.slow
def test_a_reader_who_follows_the_page_has_a_benchmark_that_every_contract_sweeps(tmp_path: Path) -> None:
    copy_code(tmp_path, "models", "tests", "docs", "bench")
    printed = follow_page(ROOT / "docs" / "adding_a_benchmark.md", tmp_path)
    # Six contracts, odd lines, spaces around an answer, three hidden answers.
    assert int(re.findall(r"(\d+) passed", printed)[-1]) >= 11
    assert "| `ok-vqa`" in (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    check_style(tmp_path, "models/manyeyes/evaluation/benchmarks", "tests/benchmark_rows.py")
