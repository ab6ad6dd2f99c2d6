"""Builders: each makes one published data set into a snapshot folder.

``BUILDERS`` maps the name that ``manyeyes data build NAME OUT`` takes to a function of the folder. A builder replaces
its own sub-folder of ``OUT`` and writes ``manifest.json`` anew; what else is there stays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from manyeyes.data.builders.easy_vqa import build_easy_vqa, build_easy_vqa_sentences
from manyeyes.data.builders.manifest import add_pretrained, write_snapshot_manifest

BUILDERS: dict[str, Callable[[Path], None]] = {
    "easy-vqa": build_easy_vqa,
    "easy-vqa-sentences": build_easy_vqa_sentences,
}

__all__ = ["BUILDERS", "add_pretrained", "build_easy_vqa", "build_easy_vqa_sentences", "write_snapshot_manifest"]
