"""Print docs/architecture.md with its picture and tables as the code has them.

Run ``make docs`` after adding a package or an import between packages; a test compares.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "models" / "manyeyes"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- made by docs/architecture.py: begin -->", "<!-- made by docs/architecture.py: end -->"


def read_layers() -> list[list[str]]:
    """The layers of ``pyproject.toml``, highest first, each with its packages."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "layers")
    return [re.findall(r"manyeyes\.(\w+)", layer) for layer in layers]


def find_imports(rooms: list[str]) -> dict[str, set[str]]:
    """Which other rooms the modules of each room import."""
    found: dict[str, set[str]] = {}
    for room in rooms:
        folder = LIBRARY / room
        files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        modules = {
            name
            for file in files
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            for name in _imported(node)
        }
        found[room] = {name.split(".")[1] for name in modules if name.startswith("manyeyes.")} & set(rooms) - {room}
    return found


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "manyeyes" else [node.module]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def without_shortcuts(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out every arrow that a longer way replaces, so that the picture can be read."""

    def reachable(room: str) -> set[str]:
        return edges[room].union(*(reachable(below) for below in edges[room])) if edges[room] else set()

    return {
        room: {below for below in targets if not any(below in reachable(other) for other in targets - {below})}
        for room, targets in edges.items()
    }


def first_sentence(room: str) -> str:
    """What a room is, from the docstring of its package or module."""
    file = LIBRARY / room / "__init__.py" if (LIBRARY / room).is_dir() else LIBRARY / f"{room}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def render() -> str:
    """The whole page: the written parts as they are, the part between the marks anew."""
    layers = read_layers()
    rooms = [room for layer in layers for room in layer]
    lines = ["```mermaid", "flowchart TB"]
    lines += [f"  {room}" for room in rooms]
    for room, targets in without_shortcuts(find_imports(rooms)).items():
        lines += [f"  {room} --> {target}" for target in sorted(targets, key=rooms.index)]
    lines += ["```", "", "| layer | room | what it is |", "| --- | --- | --- |"]
    for place, layer in enumerate(layers, start=1):
        for room in layer:
            link = f"[{room}](../models/manyeyes/{room}/README.md)" if (LIBRARY / room).is_dir() else f"`{room}.py`"
            lines.append(f"| {place} | {link} | {first_sentence(room)} |")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    return before + "\n" + "\n".join(lines) + "\n" + after


if __name__ == "__main__":
    print(render(), end="")
