"""Writes the JSON files of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from manyeyes.runtime.bundle_contents import BundleManifest, read_file
from manyeyes.runtime.bundle_files import MANIFEST
from manyeyes.storage import write_file


def load_manifest(bundle: Path) -> BundleManifest:
    """Read and check a bundle's ``manifest.json``.

    Raises:
        BundleError: Missing, or not a manifest.
    """
    return read_file(BundleManifest, bundle / MANIFEST)


def write_json(model: BaseModel, file: Path) -> None:
    """Write a model as indented JSON, whole or not at all; the same model gives the same bytes.

    Args:
        model: Any pydantic model.
        file: Where; its folder exists.
    """
    content: dict[str, Any] = model.model_dump(mode="json")
    write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
