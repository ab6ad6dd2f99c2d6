"""Reads published tensors without running any code in the file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from manyeyes.errors import SourceError


def read_tensors(path: Path, *, files: Sequence[str] = ("model.safetensors",), entry: str = "") -> dict[str, Tensor]:
    """Read tensors onto the CPU, in the file's order.

    Args:
        path: A ``.safetensors`` file, a pickle of tensors (``.pth``, ``.pt``, ``.bin``; read without running any code
            in it), or a folder.
        files: Names to look for in a folder; the first that is there is read.
        entry: Where a pickle keeps the tensors beside other things; empty when it holds nothing else.

    Raises:
        SourceError: Missing, truncated, or something else than a mapping of names to tensors.
    """
    names = dict.fromkeys([*files, "model.safetensors"])
    file = next((path / name for name in names if (path / name).is_file()), path / files[0]) if path.is_dir() else path
    if not file.is_file():
        raise SourceError(f"{file} is not there", "a file of weights is needed", "Check the source.")
    try:
        if file.suffix == ".safetensors":
            stored: dict[str, Tensor] = load_file(file)
            return stored
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SourceError(f"{file} cannot be read ({error})", "a whole file of tensors", "Fetch it again.") from error
    if entry and isinstance(tensors, dict) and isinstance(tensors.get(entry), dict):
        tensors = tensors[entry]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise SourceError(
            f"{file} holds {type(tensors).__name__}", "a mapping of names to tensors", "Check the source."
        )
    return dict(tensors)


def read_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Read tensors that a publisher spreads over several files.

    Args:
        folder: Holds the files.
        parts: What to put before the keys of each file, and its path in the folder.

    Raises:
        SourceError: A file is missing, truncated, or something else than tensors.
    """
    return {
        prefix + key: tensor for prefix, file in parts.items() for key, tensor in read_tensors(folder / file).items()
    }
