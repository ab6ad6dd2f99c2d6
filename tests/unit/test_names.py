"""A name says one thing: no two modules of the library define a public class or function of the same name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import manyeyes

LIBRARY = Path(manyeyes.__file__).parent
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# What every row of a table has: a module stands for the row, and each function for a column.
COLUMNS = {
    "evaluation/benchmarks": {
        "aggregate",
        "answer_letter",
        "ask",
        "grade",
        "has_options",
        "options",
        "prompt",
        "read",
    },
    "converters": {"plan", "recognises"},
}
# Where a program begins, in each of the files that can be run.
ENTRY = {"main"}


def public_names(library: Path) -> dict[str, set[str]]:
    """Files by the public classes and functions that they define, without those that a rule lets repeat."""
    found = defaultdict(set)
    for file in library.rglob("*.py"):
        place = file.relative_to(library)
        excused = ENTRY | COLUMNS.get(place.parent.as_posix(), set())
        if place.parts[0] == "steps":
            # A step bears the name of what it runs, as its component does.
            excused = excused | {file.stem}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, DEFINITIONS) or node.name.startswith("_") or node.name in excused:
                continue
            # A command bears the name of the verb, which is the library's function too.
            if place.parts[0] == "cli" and any(".command" in ast.unparse(entry) for entry in node.decorator_list):
                continue
            found[node.name].add(place.as_posix())
    return found


def test_every_public_name_is_defined_once() -> None:
    repeated = {name: sorted(files) for name, files in public_names(LIBRARY).items() if len(files) > 1}
    assert not repeated, "rename the less prominent one to what it is"


def test_a_name_that_two_files_define_is_found(tmp_path: Path) -> None:
    for name, text in {
        "a.py": "class Plan: ...\ndef _own(): ...\ndef main(): ...",
        "b.py": "def Plan(): ...\ndef _own(): ...\ndef main(): ...\nclass Other:\n    def plan(self): ...",
        "steps/evaluate.py": "def evaluate(): ...",
        "c.py": "def evaluate(): ...",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert {name: files for name, files in public_names(tmp_path).items() if len(files) > 1} == {
        "Plan": {"a.py", "b.py"}
    }


def test_what_may_repeat_does() -> None:
    for folder, names in COLUMNS.items():
        files = [file.read_text(encoding="utf-8") for file in (LIBRARY / folder).glob("*.py")]
        for name in names:
            assert sum(f"\ndef {name}(" in text for text in files) > 1, f"{name} no longer repeats"
