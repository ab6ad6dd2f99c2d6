"""Where a model's tensors stand in safetensors files, so that each of several processes reads no more than its part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from manyeyes.errors import SourceError


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file."""

    file: Path
    key: str

    def read(self, place: tuple[slice, ...] | None = None) -> Tensor:
        """Read it in the file's dtype.

        Args:
            place: Which part of it; all when left out.

        Raises:
            SourceError: The file is missing or damaged.
        """
        with _sensible(self.file), safe_open(self.file, "pt") as opened:
            # A copy: what is mapped into memory would count as this process's as long as it is looked at.
            stored: Tensor = opened.get_slice(self.key)[place] if place else opened.get_tensor(self.key)
            return stored.clone()


Stored = dict[Tensor, TensorPlace]
"""Tensors of a model that have no values yet, and where these are."""


def find_stored(model: PreTrainedModel, folder: Path, *, exactly: bool) -> Stored:
    """Find every tensor of a model in a Hugging Face folder.

    Args:
        model: Of any values, or on the meta device.
        folder: One file of safetensors, or several with an index.
        exactly: Whether the files may hold nothing else.

    Returns:
        Empty where the files hold other tensors than the model, or are none of safetensors: transformers may know how
        to convert them.

    Raises:
        SourceError: A file is missing or damaged.
    """
    if get_model_conversion_mapping(model, add_legacy=False):
        return {}
    found: dict[str, tuple[TensorPlace, list[int]]] = {}
    for file in _files(folder):
        with _sensible(file), safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                found[key] = TensorPlace(file, key), opened.get_slice(key).get_shape()
    state = model.state_dict(keep_vars=True)
    stored: Stored = {}
    for name, tensor in state.items():
        own, shape = found.get(name, (None, None))
        if own is not None and shape == list(tensor.shape):
            stored[tensor] = own
    whole = all(tensor in stored for tensor in state.values())
    return stored if whole and not (exactly and found.keys() - state.keys()) else {}


def _files(folder: Path) -> list[Path]:
    single, index = folder / SAFETENSORS_SINGLE_FILE, folder / SAFETENSORS_INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    with _sensible(index):
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]


@contextmanager
def _sensible(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise SourceError(
            f"{file} cannot be read ({error})", "a whole file of weights, for every process", "Fetch it again."
        ) from error
