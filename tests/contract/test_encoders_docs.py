"""docs/adding_an_encoder.md, followed word for word in a copy of the code."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from manyeyes.recipe import EncoderSpec
from tests.page_following import ROOT, blocks, follow, run

PAGE = ROOT / "docs" / "adding_an_encoder.md"


@pytest.mark.slow
def test_a_reader_who_follows_the_page_has_two_encoders_that_pass(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=ignore)
    (tmp_path / "tests" / "contract").mkdir(parents=True)
    for file in (ROOT / "tests" / "contract").glob("test_encoders_*.py"):
        shutil.copy(file, tmp_path / "tests" / "contract")
    for name in ("page_following.py", "pretended_cuda.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    selected = []
    for block in blocks(PAGE):
        if block.language == "python":
            follow(block, tmp_path)
        elif block.language == "sh":
            selected.append(block.text.split()[-1])
        else:
            assert block.language == "yaml"
    assert selected == ["dinov2-b14", "resnet18"]
    # Both commands of the page at once; the slowest contracts are left to the rows that are here to stay.
    wanted = f"({' or '.join(selected)}) and not onnx"
    output = run(
        [sys.executable, "-m", "pytest", "tests/contract", "-q", "-k", wanted, "-p", "no:cacheprovider"], tmp_path
    )
    assert int(re.findall(r"(\d+) passed", output)[-1]) >= 14
    assert "failed" not in output
    tools = [tool for tool in ("ruff",) if shutil.which(tool, path=str(Path(sys.executable).parent))]
    for tool in tools:
        run([str(Path(sys.executable).parent / tool), "check", "models/manyeyes/encoders"], tmp_path)


def test_the_recipe_of_the_page_is_a_recipe() -> None:
    import yaml

    (text,) = [block.text for block in blocks(PAGE) if block.language == "yaml"]
    (entry,) = yaml.safe_load(text)["model"]["encoders"]
    assert EncoderSpec(**entry).encoder == "resnet18-224"
