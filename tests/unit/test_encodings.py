"""Text is UTF-8 whatever the user's locale is, and a terminal that cannot show a character stops nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyeyes.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
NOT_TEXT = {"Image", "os", "tarfile", "zipfile", "webbrowser", "_opener", "place", "urllib"}
LOCALES = {
    "latin-1": {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


def words(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def text_mode(call: ast.Call, *, place: int, default: str) -> bool:
    """Whether a call that opens something opens it as text; True where nobody can tell."""
    mode = words(call).get("mode", call.args[place] if len(call.args) > place else ast.Constant(default))
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def locale_calls(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each call that reads or writes text in the encoding of the locale."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        function, given = call.func, words(call)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        base = function.value if isinstance(function, ast.Attribute) else None
        owner = getattr(base, "id", getattr(base, "attr", ""))
        if "encoding" in given or any(keyword.arg is None for keyword in call.keywords):
            continue
        if name == "read_text" and not call.args or name == "write_text" and len(call.args) < 2:  # noqa: RUF021
            yield call.lineno, name
        elif name in ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"):
            if text_mode(call, place=0, default="w+b"):
                yield call.lineno, name
        elif name == "TextIOWrapper":
            yield call.lineno, name
        elif name == "fdopen" or (name == "open" and base is None):
            if text_mode(call, place=1, default="r"):
                yield call.lineno, name
        elif name == "open" and owner not in NOT_TEXT:
            if text_mode(call, place=1 if owner in ("io", "gzip", "lzma", "bz2", "codecs") else 0, default="r"):
                yield call.lineno, name
        elif any(
            isinstance(given.get(key), ast.Constant) and given[key].value for key in ("text", "universal_newlines")
        ):
            yield call.lineno, f"{name}(text=True)"


def test_every_text_file_and_child_names_its_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for folder in ("models", "components", "pipelines")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in locale_calls(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_text"),
    [
        ("p.read_text()", True),
        ("p.read_text(encoding='utf-8')", False),
        ("p.write_text('x')", True),
        ("open('x')", True),
        ("open('x', 'rb')", False),
        ("p.open()", True),
        ("p.open('a+')", True),
        ("p.open(mode)", True),
        ("p.open('wb')", False),
        ("Image.open(p)", False),
        ("os.open(p, 0)", False),
        ("os.fdopen(1, 'w')", True),
        ("os.fdopen(1, 'wb')", False),
        ("gzip.open(p)", True),
        ("gzip.open(p, 'rb')", False),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.Popen(c, universal_newlines=True)", True),
        ("subprocess.run(c, text=True, encoding='utf-8')", False),
        ("subprocess.run(c)", False),
    ],
)
def test_the_rule_sees_text_and_lets_bytes_pass(line: str, is_text: bool) -> None:
    assert bool(list(locale_calls(line))) == is_text


def command(*arguments: str, cwd: Path, locale: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(
        [sys.executable, "-m", "manyeyes.cli.main", *arguments],
        cwd=cwd,
        env={**inherited, **LOCALES[locale]},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("locale", LOCALES)
def test_a_recipe_is_shown_in_every_locale(locale: str, tmp_path: Path) -> None:
    text = "extends: tiny\ndescription: größer → 中 🙂\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")).description == "größer → 中 🙂"
    shown = command("recipe", "show", "mine.yaml", cwd=tmp_path, locale=locale)
    assert shown.returncode == 0, shown.stderr
    assert b"Traceback" not in shown.stderr
    wrong = command("recipe", "show", "mine.yaml", "--set", "stages.sft.größe=1", cwd=tmp_path, locale=locale)
    assert wrong.returncode == 2, wrong.stderr
    (tmp_path / "mine.yaml").write_bytes(text.encode("utf-16"))
    other = command("recipe", "show", "mine.yaml", cwd=tmp_path, locale=locale)
    assert other.returncode == 2
    assert b"is UTF-16" in other.stderr
