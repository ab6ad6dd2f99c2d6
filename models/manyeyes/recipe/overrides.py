"""One value of a recipe by its dotted path."""

from __future__ import annotations

from typing import Any

from manyeyes.errors import RecipeError

# A longer index is past the end of any list.
_INDEX_DIGITS = 9


def apply_override(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set one value of a tree of mappings and lists.

    Args:
        tree: Changed in place; mappings that are missing on the way are made.
        path: Dotted; list items by index.
        value: The new value.

    Raises:
        RecipeError: The path goes below a plain value, or past the end of a list.
    """
    node: Any = tree
    keys = path.split(".")
    # Group names such as encoders.vit hold a dot: everything after "train" is one key.
    if "train" in keys[:-1]:
        at = keys.index("train")
        keys = [*keys[: at + 1], ".".join(keys[at + 1 :])]
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit()) or int(key[:_INDEX_DIGITS]) >= len(node):
                needed = f"an index from 0 to {len(node) - 1}" if node else "a list with something in it"
                raise RecipeError(
                    f'override "{path}" has "{key}" at a list of {len(node)}', needed, "Replace the list as a whole."
                )
            if last:
                node[int(key)] = value
                return
            child = node[int(key)]
        elif last:
            node[key] = value
            return
        else:
            child = node.get(key)
            if child is None:
                child = node[key] = {}
        if not isinstance(child, dict | list):
            raise RecipeError(
                f'override "{path}" goes below "{key}", which is {child!r}', "a field with fields", "Shorten the path."
            )
        node = child
