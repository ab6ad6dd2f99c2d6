"""Reads published tensors without running any code in the file, and translates them between publishers' key layouts.

Hub repositories keep three layouts of the same vision transformer: timm's, open_clip's (timm's under ``visual.trunk.``)
and transformers'. Encoders here have timm's. A layout is recognised by a key that only it has; what stands in front of
that key (``vision_model.``, ``model.vision_tower.``) is the publisher's prefix, and keys without it are left out.

``meta_device`` builds modules at their true sizes, without memory; ``nothing_drawn`` in memory that nothing touches.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


TensorMap = dict[str, Tensor]


def strip_prefix(tensors: Mapping[str, Tensor], *, marker: str) -> TensorMap | None:
    """Keep what stands under the prefix of ``marker``, without that prefix.

    Args:
        tensors: A publisher's.
        marker: End of a key that only this layout has.

    Returns:
        None when no key ends so.
    """
    prefixes = [key.removesuffix(marker) for key in tensors if key == marker or key.endswith("." + marker)]
    if not prefixes:
        return None
    prefix = min(prefixes, key=len)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def rename(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> TensorMap:
    """Rename keys by regular expressions, the first whole match each; keys that match none are left out."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in compiled:
            match = pattern.fullmatch(key)
            if match:
                renamed[match.expand(replacement)] = tensor
                break
    return renamed


def join(
    tensors: TensorMap, parts: Sequence[str], whole: str, *, how: Callable[[list[Tensor]], Tensor] = torch.cat
) -> TensorMap:
    """Join groups of tensors into one, for instance query, key and value into ``qkv``.

    Args:
        tensors: With keys that end in each of ``parts``.
        parts: Ends of the keys of a group, in order.
        whole: The end that replaces them.
        how: Joins them; along the first dimension unless said otherwise.
    """
    joined = dict(tensors)
    for key in tensors:
        if key.endswith(parts[0]):
            stem = key.removesuffix(parts[0])
            group = [stem + part for part in parts]
            if all(member in joined for member in group):
                joined[stem + whole] = how([joined.pop(member) for member in group])
    return joined


_CLIP_RULES = [
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
    (r"post_layernorm\.(weight|bias)", r"norm.\1"),
]


def from_transformers_clip(tensors: Mapping[str, Tensor]) -> TensorMap:
    """Transformers' layout of CLIP and SigLIP to timm's; the prefix is already gone."""
    state = join_qkv(rename(tensors, _CLIP_RULES))
    for key in ("cls_token", "pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    return state


_LAYER = r"encoder\.layer\.(\d+)\."

VIT_RULES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (_LAYER + r"layernorm_before\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"attention\.attention\.([qkv])\w+\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"intermediate\.dense\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"output\.dense\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
]


def from_transformers_vit(tensors: Mapping[str, Tensor]) -> TensorMap:
    """Transformers' layout of ViT, DPT and I-JEPA to timm's; the prefix is already gone."""
    return join_qkv(rename(tensors, VIT_RULES))


def join_qkv(state: TensorMap) -> TensorMap:
    """``attn.q``, ``attn.k`` and ``attn.v`` to ``attn.qkv``."""
    for kind in ("weight", "bias"):
        state = join(state, [f"attn.{letter}.{kind}" for letter in "qkv"], f"attn.qkv.{kind}")
    return state


@contextmanager
def meta_device() -> Iterator[None]:
    """Build what follows on the meta device, and skip drawing its weights: there they have no values."""
    with torch.device("meta"), _NothingDrawn():
        yield


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Build what follows with parameters of no values, whose memory the system gives once they are written to."""
    with _NothingDrawn():
        yield


class _NothingDrawn(TorchDispatchMode):
    """Skips what fills a parameter; without memory any tensor: those kernels are Python, and take seconds."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLING and (args[0].is_meta or isinstance(args[0], nn.Parameter)):
            return args[0]
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_FILLING = {
    _aten.add_.Tensor,
    _aten.clamp_.default,
    _aten.erfinv_.default,
    _aten.fill_.Scalar,
    _aten.mul_.Tensor,
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.zero_.default,
}
