"""Writes safetensors one tensor at a time, so that a model is never in memory as a whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

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
