"""From the bytes of a file, or a text, to a tree of plain values that a recipe can be made of.

Whatever is not UTF-8, not YAML, too large or too deep, names one key twice, or holds what JSON has no word for (dates,
sets, NaN) is refused here, by its place, so that everything behind it sees mappings, lists, texts, numbers and truth
values alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from manyeyes.errors import RecipeError

MAX_BYTES = 32_768
"""Longest recipe as canonical JSON.

Each step of a pipeline takes the recipe as one argument of its command line, where Linux allows 131,072 bytes and JSON
inside JSON doubles quotes; Kubeflow keeps it six times a step in a workflow whose status may have 1 MB, compressed.
Published recipes have 4,200 bytes at most.
"""
MAX_FILE_BYTES = 8 * MAX_BYTES
"""Longest file: comments and indentation included."""
_MAX_DEPTH = 32
_MAX_VALUES = 10_000
_MAX_INTEGER = 2**63 - 1


def read_recipe_file(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        RecipeError: No such file, not readable, too long, or not UTF-8.
    """
    try:
        if path.is_dir():
            raise RecipeError(f'recipe file is "{path}"', "a file, and this is a folder", "Name the file in it.")
        if not path.is_file():
            raise RecipeError(f'recipe file is "{path}"', "no such file", "Check the path.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RecipeError(f"{path} has {size:,} bytes", f"{MAX_FILE_BYTES:,} at most", "Name a recipe's file.")
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f'recipe file is "{path}" ({error.strerror})', "a file that can be read", "Check path and permission."
        ) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path} is UTF-16", "UTF-8", f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
    try:
        # Some editors put a byte order mark in front.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path} is not UTF-8 (byte 0x{data[error.start]:02x} in line {line})",
            "text in UTF-8",
            f"Save it as UTF-8, or convert it: iconv -f ISO-8859-1 -t UTF-8 {path.name}",
        ) from error


def read_yaml(text: str, *, where: str) -> Any:
    """Read one YAML document as plain values.

    Args:
        text: YAML, of which JSON is a part.
        where: What messages call it.

    Raises:
        RecipeError: Not YAML, or with something in it that a recipe cannot hold.
    """
    if len(text) > MAX_FILE_BYTES:
        raise RecipeError(f"{where} has {len(text):,} characters", f"{MAX_FILE_BYTES:,} at most", "Shorten it.")
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(f"{where} is not YAML ({reason})", "a YAML mapping", "Fix the line named above.") from error
    check_values(tree, where=where)
    return tree


def parse_recipe_json(text: str, *, where: str) -> Any:
    """Read JSON as plain values; arguments and errors as for ``read_yaml``."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where} is not JSON ({'nested too deep' if isinstance(error, RecursionError) else error})",
            "the text that Recipe.canonical_json wrote",
            "Pass it on unchanged.",
        ) from error
    check_values(tree, where=where)
    return tree


def check_values(tree: Any, *, where: str) -> None:
    """Refuse whatever is no plain value, is too large, or is too much.

    Raises:
        RecipeError: Names the place.
    """
    left = _MAX_VALUES

    def look(value: Any, place: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RecipeError(f"{where} has more than {_MAX_VALUES:,} values", "fewer", "Expand no alias so often.")
        if depth > _MAX_DEPTH:
            raise RecipeError(f"{where}: {place} is nested too deep", f"{_MAX_DEPTH} levels at most", "Flatten it.")
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise RecipeError(f"{where}: {place or 'recipe'} has the key {_short(key)}", "a text", "Quote it.")
                look(key, place, depth)
                look(inner, f"{place}.{key}" if place else key, depth + 1)
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                look(inner, f"{place}.{index}", depth + 1)
        else:
            problem = _wrong(value)
            if problem:
                raise RecipeError(f"{where}: {place or 'recipe'} is {_short(value)}", *problem)

    look(tree, "", 0)


def _wrong(value: Any) -> tuple[str, str] | None:
    """What is needed instead of a single value, and what to do; None where it is fine."""
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            return "text without NUL and half characters", "Leave them out."
        return None
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else ("a finite number", "Write one, or leave the field out.")
    if isinstance(value, int):
        return None if abs(value) <= _MAX_INTEGER else (f"a number up to {_MAX_INTEGER:,}", "Write a smaller one.")
    return "a text, number, truth value, list or mapping", "Quote it, if it is a text."


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key named twice, deep nesting, and merges that multiply."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH * 2:  # keys and values are nodes below each other
            raise yaml.composer.ComposerError(None, None, "nested too deep", self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in seen:
                    raise yaml.composer.ComposerError(None, None, f'the key "{key.value}" twice', key.start_mark)
                seen.add(name)
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) that multiply", node.start_mark)
