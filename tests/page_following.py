"""Follows a page of docs/ word for word: what it says to create, to put and to run, in a copy of the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The last instruction before a block says what becomes of the block.
_CREATE = re.compile(r"[Cc]reate\s+`(?P<file>[^`]+)`:$")
_PUT = re.compile(r"[Bb]elow\s+the\s+line\s+`(?P<line>[^`]+)`\s+of\s+`(?P<file>[^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block and the prose since the block before."""

    language: str
    text: str
    prose: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page that names its language, in order."""
    parts = re.split(r"^```(\w+)\n(.*?)^```$\n?", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
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
    """What a command prints in a copy of the code, which is the code that it runs."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root / "models"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, env=environment)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return result.stdout


def copy_code(root: Path, *folders: str) -> None:
    """Copy folders of the checkout, and what the tools read, to where a page is followed."""
    for folder in folders:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)


def follow_page(page: Path, root: Path) -> str:
    """Do everything that a page says, in its order; what its commands print."""
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            follow(block, root)
        elif block.language == "sh":
            printed += run(["sh", "-e", "-c", block.text], root)
    return printed


def check_style(root: Path, *folders: str) -> None:
    """ruff has nothing to say about what the page made."""
    tool = Path(sys.executable).parent / "ruff"
    if tool.exists():
        run([str(tool), "check", "--no-cache", *folders], root)
        run([str(tool), "format", "--no-cache", "--check", *folders], root)
