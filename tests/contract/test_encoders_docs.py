"""docs/adding_an_encoder.md, followed word for word in a copy of the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from manyeyes.recipe import EncoderSpec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_an_encoder.md"

# The last instruction before a block says what becomes of the block.
_CREATE = re.compile(r"[Cc]reate\s+`(?P<file>[^`]+)`:$")
_PUT = re.compile(r"[Bb]elow\s+the\s+line\s+`(?P<line>[^`]+)`\s+of\s+`(?P<file>[^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block and the prose since the block before."""

    language: str
    text: str
    prose: str


def blocks() -> list[Block]:
    parts = re.split(r"^```(\w+)\n(.*?)^```$\n?", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [
        Block(language, text, prose.strip())
        for prose, language, text in zip(parts[0::3], parts[1::3], parts[2::3], strict=False)
    ]


def follow(block: Block, root: Path) -> None:
    """Do with a Python block what the page says."""
    create = _CREATE.search(block.prose)
    put = None if create else next(reversed([*_PUT.finditer(block.prose)]), None)
    assert block.prose.endswith(":"), f"the page does not introduce this:\n{block.text}"
    assert create or put, f"the page does not say where this goes:\n{block.text}"
    if create:
        file = root / create["file"]
        assert not file.exists(), f"{file} is there already"
        file.write_text(block.text, encoding="utf-8")
    elif put:
        file = root / put["file"]
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        assert lines.count(put["line"] + "\n") == 1, f'{put["file"]} must have the line "{put["line"]}" once'
        lines.insert(lines.index(put["line"] + "\n") + 1, block.text)
        file.write_text("".join(lines), encoding="utf-8")


def run(command: list[str], root: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root / "models"), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, env=environment)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_a_reader_who_follows_the_page_has_two_encoders_that_pass(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=ignore)
    (tmp_path / "tests" / "contract").mkdir(parents=True)
    for file in (ROOT / "tests" / "contract").glob("test_encoders_*.py"):
        shutil.copy(file, tmp_path / "tests" / "contract")
    shutil.copy(ROOT / "tests" / "pretended_cuda.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    selected = []
    for block in blocks():
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

    (text,) = [block.text for block in blocks() if block.language == "yaml"]
    (entry,) = yaml.safe_load(text)["model"]["encoders"]
    assert EncoderSpec(**entry).encoder == "resnet18-224"
