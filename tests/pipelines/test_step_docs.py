"""docs/adding_a_step.md, followed word for word in a copy of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.page_following import ROOT, check_style, copy_code, follow_page


@pytest.mark.slow
def test_a_reader_who_follows_the_page_has_a_step_in_a_pipeline_and_on_the_command_line(tmp_path: Path) -> None:
    copy_code(tmp_path, "models", "components", "pipelines", "tests")
    printed = follow_page(ROOT / "docs" / "adding_a_step.md", tmp_path)
    assert "measure_model: 3 bytes" in printed
    assert json.loads((tmp_path / "measured" / "sizes").read_text(encoding="utf-8")) == {".json": 3}
    assert "3" in (tmp_path / "measured" / "report.html").read_text(encoding="utf-8")
    assert " passed" in printed
    compiled = tmp_path / "pipelines" / "compiled" / "evaluate.yaml"
    spec = next(yaml.load_all(compiled.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    groups = [part["dag"]["tasks"] for part in spec["components"].values() if "dag" in part]
    assert [tasks for tasks in groups if "measure-model" in tasks]
    check_style(tmp_path, "models/manyeyes/steps", "models/manyeyes/cli", "components", "pipelines")
