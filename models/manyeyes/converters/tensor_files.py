"""Files of tensors, safetensors or pickles: what they hold by their heads, and one tensor at a time.

No code in a file is ever run. Safetensors are written one tensor at a time, so that a model is never in memory as a
whole.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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


WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


def write_tensors(
    folder: Path,
    planned: Mapping[str, Planned],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[str], None] | None = None,
) -> None:
    """Write tensors in their order, as one file or as shards with an index, as transformers reads them.

    Args:
        folder: Where to.
        planned: Shape and dtype of each.
        read: Gives a tensor by its key; called once for each, in order.
        max_shard_bytes: A file is closed before it grows beyond this.
        on_progress: Called with each key before it is read.
    """
    shards = _shards(planned, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / WHOLE, shards[0], planned, read, on_progress)
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        _write_file(folder / name, keys, planned, read, on_progress)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in planned.values())},
        "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(planned: Mapping[str, Planned], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in planned.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += tensor.nbytes
    return shards


def _write_file(
    file: Path,
    keys: Sequence[str],
    planned: Mapping[str, Planned],
    read: Callable[[str], Tensor],
    on_progress: Callable[[str], None] | None,
) -> None:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in keys:
        tensor = planned[key]
        end = start + tensor.nbytes
        head[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(head).encode()
    # The data start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for key in keys:
            if on_progress is not None:
                on_progress(key)
            _write_tensor(stream, read(key).to(planned[key].dtype), key, planned[key].shape)


def _write_tensor(stream: BinaryIO, tensor: Tensor, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(tensor.shape) == shape, key
    stream.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
