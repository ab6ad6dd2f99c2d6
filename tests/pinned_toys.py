"""What ``resolve_data`` pins, for steps that no pipeline runs."""

from __future__ import annotations

from manyeyes.data.snapshot import Snapshot
from manyeyes.harness.inputs import Pinned
from manyeyes.recipe import Recipe


def pin(recipe: Recipe, *, data_md5: str = "d" * 32, data_remote: str = "nowhere") -> str:
    """The parameter of a step."""
    return Pinned(recipe, data_md5=data_md5, data_remote=data_remote, code_digest="c" * 64).text()


def opened(recipe: Recipe, snapshot: Snapshot) -> Pinned:
    """The same with a snapshot that no remote has, as a step reads it."""
    pinned = Pinned(recipe, data_md5=snapshot.md5, data_remote="nowhere", code_digest="c" * 64)
    pinned.__dict__["snapshot"] = snapshot
    return pinned
