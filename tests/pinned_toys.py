"""What ``preflight`` pins, for steps that no pipeline runs."""

from __future__ import annotations

from manyeyes.data.snapshot import Snapshot
from manyeyes.harness.inputs import Pinned, parse_pinned
from manyeyes.recipe import Recipe


def pin(recipe: Recipe, step: str, *, encoder: str = "", data_md5: str = "d" * 32, data_remote: str = "nowhere") -> str:
    """The parameter of a step."""
    pinned = Pinned(recipe, data_md5=data_md5, data_remote=data_remote, code_digest="c" * 64)
    return pinned.of(step, encoder=encoder).text()


def opened(recipe: Recipe, step: str, snapshot: Snapshot) -> Pinned:
    """The same with a snapshot that no remote has, as a step reads it."""
    pinned = parse_pinned(pin(recipe, step, data_md5=snapshot.md5))
    pinned.__dict__["snapshot"] = snapshot
    return pinned
