"""Files of tensors, safetensors or pickles: what they hold by their heads, and one tensor at a time.

No code in a file is ever run.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyeyes.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LoraPair:
    """A low-rank change of a matrix: ``scale * up @ down``.

    Attributes:
        file: The adapter's.
        down: Key of the ``[rank, in]`` matrix.
        up: Key of the ``[out, rank]`` matrix.
        scale: Alpha over rank.
    """

    file: Path
    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        file: Where it is.
        name: Its key in that file.
        shape: Its shape.
        dtype: Its dtype.
        lora: A change to add to it; None for none.
        below: What it is the difference from, perhaps with fewer rows; None where it is whole.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lora: LoraPair | None = None
    below: StoredTensor | None = None

    @property
    def result_dtype(self) -> torch.dtype:
        """What reading it gives: fp32 with a LoRA adapter's change, which half precision would round away in part."""
        return self.dtype if self.lora is None else torch.promote_types(self.dtype, torch.float32)


def list_tensors(file: Path) -> dict[str, StoredTensor]:
    """What a file of weights holds, without reading any tensor.

    Raises:
        CheckpointError: Missing, truncated, with code in it, or something else than tensors by name.
    """
    opened = open_tensors(file)
    if isinstance(opened, dict):
        return {key: StoredTensor(file, key, tuple(value.shape), value.dtype) for key, value in opened.items()}
    stored = {}
    for key in opened.keys():  # noqa: SIM118 - not a mapping
        part = opened.get_slice(key)
        stored[key] = StoredTensor(file, key, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    return stored


def open_tensors(file: Path) -> Any:
    """An open safetensors file, or a pickle's tensors by name, mapped into memory rather than read.

    Raises:
        CheckpointError: Missing, truncated, with code in it, or something else than tensors by name.
    """
    if file.suffix == ".safetensors":
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    try:
        tensors = _load_pickle(file)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            reason = str(error).partition("nsupported")[2].splitlines()[0]
            raise CheckpointError(
                f"{file} is a pickle with code in it (u{'nsupported' + reason})",
                "tensors by name and nothing else; nothing of it was run",
                "Get the weights as safetensors, or from someone you trust.",
            ) from error
        raise _unreadable(file, error) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file} holds {type(tensors).__name__}", "tensors by name", "Check the source.")
    return dict(tensors)


def _load_pickle(file: Path) -> Any:
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    # The format before torch 1.6 cannot be mapped.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True if zipped else None)


def _unreadable(file: Path, error: BaseException) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{file} cannot be read ({reason})", "a whole file of tensors", "Fetch it again.")
