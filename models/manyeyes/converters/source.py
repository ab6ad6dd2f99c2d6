"""Published checkpoints as they lie on disk: one file or shards, safetensors or pickles, with adapters on top.

Shapes come from the heads of files; a tensor is read when it is asked for, from one shard at a time. No code in a file
is ever run.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyeyes.converters.tensor_files import LoraPair, StoredTensor, list_tensors, open_tensors
from manyeyes.errors import CheckpointError
from manyeyes.storage import read_json_file

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PROJECTOR = ("mm_projector.safetensors", "mm_projector.bin")
_OTHERS_TRAINED = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_CONFIG = "adapter_config.json"
_OPEN_FILES = 2
_OF_LANGUAGE_MODEL = re.compile(
    r"(model\.(embed_tokens|layers|norm)|transformer\.(wte|blocks|norm_f)|lm_head)\.(?!.*inv_freq)"
)


class OriginalCheckpoint:
    """A published checkpoint, read lazily.

    Attributes:
        path: Its folder.
        tokenizer_path: Folder with its tokenizer: its own, or its base's.
        adapter_keys: Keys of a LoRA adapter, and the key that each one changes.
        notes: What the report should say about how it was put together.
    """

    def __init__(self, path: Path, config: dict[str, Any], stored: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.tokenizer_path = path
        self.adapter_keys: dict[str, str] = {}
        self.notes: list[str] = []
        self._config = config
        self._stored = dict(stored)
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return dict(self._config)

    def keys(self) -> dict[str, StoredTensor]:
        """Every stored tensor, in the order of files."""
        return dict(self._stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor."""
        return {key: stored.shape for key, stored in self._stored.items()}

    def has(self, prefix: str) -> bool:
        """Whether a key starts so."""
        return any(key.startswith(prefix) for key in self._stored)

    def tensor(self, key: str) -> Tensor:
        """Read one tensor; a LoRA adapter's change is added in fp32.

        Raises:
            CheckpointError: The file cannot be read.
        """
        stored = self._stored[key]
        tensor = self._read(stored.file, stored.name)
        if stored.below is not None:
            tensor, base = tensor.clone(), self._read(stored.below.file, stored.below.name)
            tensor[: base.shape[0]] += base.to(tensor.dtype)
        if stored.lora is None:
            return tensor
        down, up = (self._read(stored.lora.file, name).float() for name in (stored.lora.down, stored.lora.up))
        return (tensor.float() + stored.lora.scale * (up @ down)).to(stored.result_dtype)

    def release(self) -> None:
        """Close every file."""
        self._open.clear()

    def _read(self, file: Path, name: str) -> Tensor:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[file] = open_tensors(file)
        opened = self._open[file]
        tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor


def open_checkpoint(path: Path, *, base: Path | None = None) -> OriginalCheckpoint:
    """Open a folder with ``config.json`` and weights.

    Weights are one file or shards with an index, ``mm_projector.bin`` beside them or alone, or a LoRA adapter with
    ``non_lora_trainables.bin``. An adapter, and a projector alone, need ``base``. Whole weights with a ``base`` are
    differences from it, as LLaVA's first releases were (``delta``).

    Args:
        path: The folder.
        base: Folder of the model that an adapter or a projector was trained on.

    Raises:
        CheckpointError: A file is missing, truncated, or holds code; an index and its files disagree.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there", "a folder with config.json and weights is needed", "Check it.")
    config = read_json(path / "config.json")
    own = _own_weights(path)
    adapter = (path / _ADAPTER_CONFIG).is_file()
    if own is not None and not adapter:
        checkpoint = OriginalCheckpoint(path, config, own)
        if base is not None:
            _add_base(checkpoint, open_checkpoint(base))
        _add_projector(checkpoint)
        return checkpoint
    if base is None and adapter:
        base = _named_base(path)
    if base is None:
        raise CheckpointError(
            f"{path} has {'only ' + _name(path, _PROJECTOR) if _name(path, _PROJECTOR) else 'no weights'}",
            f"one of {', '.join((*_WHOLE, *_INDEXES))}, or the model that it was trained on",
            "Name that model's folder: manyeyes convert SOURCE OUT --base FOLDER",
        )
    below = open_checkpoint(base)
    checkpoint = OriginalCheckpoint(path, config, below.keys())
    checkpoint.tokenizer_path = below.tokenizer_path
    checkpoint.notes = [f"on top of {base}", *below.notes]
    for names in (_PROJECTOR, _OTHERS_TRAINED):
        name = _name(path, names)
        if name:
            checkpoint._stored.update(_under_model(list_tensors(path / name)))
    if adapter:
        _add_lora(checkpoint)
    return checkpoint


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: Missing, or not a JSON object.
    """
    values = read_json_value(file)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {type(values).__name__}", "a JSON object", "Fetch it again.")
    return values


def read_json_value(file: Path) -> Any:
    """Whatever JSON a file holds.

    Raises:
        CheckpointError: Missing, or no JSON.
    """
    return read_json_file(file, error=CheckpointError)


def _own_weights(path: Path) -> dict[str, StoredTensor] | None:
    for index, whole in zip(_INDEXES, _WHOLE, strict=True):
        if (path / index).is_file():
            return _indexed(path, path / index)
        if (path / whole).is_file():
            return list_tensors(path / whole)
    return None


def _indexed(path: Path, index: Path) -> dict[str, StoredTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map", "a map of keys to files", "Fetch it again.")
    files = sorted(set(places.values()))
    absent = [name for name in files if not (path / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.name} names {', '.join(absent)}, not in {path}",
            "every file that the index names",
            "Fetch what is missing.",
        )
    # Files that no index names (older shards, say) are not looked into.
    held = {name: list_tensors(path / name) for name in files}
    lacking = [f'"{key}" in {name}' for key, name in places.items() if key not in held[name]]
    if lacking:
        raise CheckpointError(
            f"{index.name} promises {', '.join(lacking[:3])} ({len(lacking)} keys), which the files do not hold",
            "index and files that belong together",
            "Fetch them again.",
        )
    return {key: stored for name in files for key, stored in held[name].items() if places.get(key) == name}


def _add_base(checkpoint: OriginalCheckpoint, base: OriginalCheckpoint) -> None:
    # As LLaVA's apply_delta: what the base lacks (the projector) is whole already, and tables may have more rows.
    held = base.shapes()
    lacking = [key for key in checkpoint._stored if _OF_LANGUAGE_MODEL.match(key) and key not in held]
    if lacking:
        raise CheckpointError(
            f'{base.path} has no "{lacking[0]}" and {len(lacking) - 1} more keys of {checkpoint.path}',
            "with --base, the language model that whole weights are the differences from",
            "Name the model that the release says; weights that are whole need no --base.",
        )
    for key, below in base.keys().items():
        stored = checkpoint._stored.get(key)
        if stored is None:
            continue
        fits = stored.shape == below.shape or (
            key.endswith(("embed_tokens.weight", "lm_head.weight"))
            and stored.shape[1:] == below.shape[1:]
            and stored.shape[0] > below.shape[0]
        )
        if not fits:
            raise CheckpointError(
                f'"{key}" is {list(stored.shape)} in {checkpoint.path} and {list(below.shape)} in {base.path}',
                "differences from this very base",
                "Name the model that the release says; weights that are whole need no --base.",
            )
        checkpoint._stored[key] = replace(stored, below=below)
    checkpoint.notes.append(f"differences from {base.path}, added to it")


def _add_projector(checkpoint: OriginalCheckpoint) -> None:
    name = _name(checkpoint.path, _PROJECTOR)
    if not name:
        return
    beside = _under_model(list_tensors(checkpoint.path / name))
    new = {key: stored for key, stored in beside.items() if key not in checkpoint._stored}
    if new:
        # Weights without a projector: this is it.
        checkpoint._stored.update(beside)
        return
    differ = [
        key
        for key, stored in beside.items()
        if not torch.equal(checkpoint._read(stored.file, stored.name).float(), checkpoint.tensor(key).float())
    ]
    if differ:
        checkpoint.notes.append(f"{name} differs from the shards in {', '.join(differ)}; the shards count")


def _add_lora(checkpoint: OriginalCheckpoint) -> None:
    path = checkpoint.path
    settings, name = read_json(path / _ADAPTER_CONFIG), _name(path, _ADAPTER)
    if not name:
        raise CheckpointError(f"{path} has no {_ADAPTER[0]}", "the adapter's weights", "Fetch them.")
    if settings.get("alpha_pattern") or settings.get("fan_in_fan_out"):
        raise CheckpointError(
            f"{path / _ADAPTER_CONFIG} has alpha_pattern or fan_in_fan_out", "one alpha", "Merge it with peft first."
        )
    alpha = float(settings.get("lora_alpha", 8))
    tensors = list_tensors(path / name)
    for key, stored in tensors.items():
        if ".lora_A." not in key:
            if ".lora_B." not in key:
                raise CheckpointError(
                    f'{path / name} has "{key}"', "lora_A and lora_B alone", "Merge this adapter with peft first."
                )
            continue
        # base_model.model.<key of the module>.lora_A[.default].weight
        target = key.partition(".lora_A.")[0].removeprefix("base_model.").removeprefix("model.") + ".weight"
        up = key.replace(".lora_A.", ".lora_B.")
        if up not in tensors:
            raise CheckpointError(f'{path / name} lacks "{up}"', "both halves of each change", "Fetch it again.")
        checkpoint.adapter_keys |= {key: target, up: target}
        whole = checkpoint._stored.get(target)
        if whole is None:
            # LoRA's targets are suffixes, which a vision tower has too; LLaVA loads the tower anew afterwards.
            checkpoint.notes.append(f'the adapter changes "{target}", which its base does not hold: left out')
            continue
        made = (tensors[up].shape[0], stored.shape[1])
        if made != whole.shape:
            raise CheckpointError(
                f'the adapter\'s "{up}" {list(tensors[up].shape)} and "{key}" {list(stored.shape)}, '
                f'for "{target}" {list(whole.shape)}',
                "an adapter that belongs to its base",
                "Name the base that it was trained on with --base.",
            )
        rank = stored.shape[0]
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        pair = LoraPair(file=path / name, down=key, up=up, scale=scale)
        checkpoint._stored[target] = replace(whole, lora=pair)


def _named_base(path: Path) -> Path:
    named = str(read_json(path / _ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if named and Path(named).is_dir():
        return Path(named)
    raise CheckpointError(
        f'{path} is a LoRA adapter of "{named}", which is not here',
        "the model that it was trained on",
        "Name its folder: manyeyes convert SOURCE OUT --base FOLDER",
    )


def _under_model(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    # What training saved apart from the model, under any wrapper's prefix: LLaVA's loaders look for the module's name.
    renamed = {}
    for key, stored in tensors.items():
        inner = key.removeprefix("base_model.")
        while inner.startswith("model."):
            inner = inner.removeprefix("model.")
        renamed[inner if inner.startswith("lm_head.") else f"model.{inner}"] = stored
    return renamed


def _name(path: Path, names: tuple[str, ...]) -> str:
    return next((name for name in names if (path / name).is_file()), "")
