"""Low-rank adapters on a language model's linear layers, which last for one stage; the layers are peft's.

Down projections start as a linear layer of torch does, up projections at zero, as in the published code (LoRA,
arXiv:2106.09685). What a stage trained is kept twice: merged into the weights of its checkpoint, and alone, as a folder
that peft reads.

The layers themselves may be held in 4 bits (QLoRA, arXiv:2305.14314). Adapters then learn what to add to the rounded
weights, so these are what they are merged into.

peft is imported where a stage has adapters: with bitsandbytes it brings 840 modules, which other stages do not need.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from manyeyes.errors import RecipeError
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.language_model import decoder_of
from manyeyes.recipe import LoraSpec
from manyeyes.training.optimizer import ParameterGroups
from manyeyes.training.sharding import add_to_part

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def add_adapters(model: ManyEyesForConditionalGeneration, spec: LoraSpec, *, seed: int) -> None:
    """Put an adapter on every linear layer of the language model's decoder, in place. The outputs stay what they were.

    Args:
        model: Changed; of the decoder, the adapters alone require gradients from here on.
        spec: Rank, scale and dropout.
        seed: What the down projections are drawn from.

    Raises:
        RecipeError: The decoder has no linear layer, or is of a family whose layers peft cannot adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model

    decoder = decoder_of(model.language_model)
    linear = {name: module.weight.is_meta for name, module in decoder.named_modules() if type(module) is nn.Linear}
    if not linear:
        raise RecipeError(
            f"lora with a {type(decoder).__name__}", "its decoder has no linear layer to adapt", "Leave lora out."
        )
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(linear),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, decoder, low_cpu_mem_usage=all(linear.values()))
        except ValueError as error:
            raise RecipeError(
                f"lora with a {type(decoder).__name__}", f"peft cannot adapt it ({error})", "Leave lora out."
            ) from error


def quantize_layers(model: ManyEyesForConditionalGeneration, *, dtype: torch.dtype, device: torch.device) -> None:
    """Hold the weights of every layer that has an adapter in 4 bits, in place, one after the other.

    NF4 with blocks of 64 numbers and quantised constants, as in QLoRA.

    Args:
        model: With adapters, not yet on the device: in full it need not fit there.
        dtype: That a layer's weights have while it computes.
        device: Where they go.

    Raises:
        RecipeError: bitsandbytes is not installed, or does not work on this device.
    """
    bitsandbytes = import_bitsandbytes()
    decoder = decoder_of(model.language_model)
    for name, module in _adapted(decoder):
        layer = module.get_base_layer()
        held = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        held.weight = bitsandbytes.nn.Params4bit(layer.weight.detach().to(dtype), quant_type="nf4", module=held)
        held.bias = layer.bias
        try:
            module.base_layer = held.to(device)
        except (RuntimeError, AttributeError) as error:
            raise RecipeError(
                f"lora.quantize is nf4, and bitsandbytes {bitsandbytes.__version__} cannot do it on {device} ({error})",
                f"4 bits for {name}, a layer of {layer.out_features} x {layer.in_features}",
                "Train on an NVIDIA GPU that bitsandbytes knows, or leave quantize out.",
            ) from error


def import_bitsandbytes() -> Any:
    """The library that holds weights in 4 bits.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise RecipeError(
            f"lora.quantize is nf4, and bitsandbytes cannot be imported ({error})",
            "bitsandbytes, which holds weights in 4 bits",
            'Install it (pip install "manyeyes[qlora]"), or leave quantize out.',
        ) from error


def _dequantized(layer: nn.Module) -> nn.Linear:
    weight: Any = layer.weight
    found = import_bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    plain = nn.Linear(found.shape[1], found.shape[0], bias=False, device="meta")
    # Sharded training leaves it on the device.
    plain.weight, plain.bias = nn.Parameter(found.float().cpu(), requires_grad=False), layer.bias  # type: ignore[assignment]
    return plain


def merge_adapters(model: ManyEyesForConditionalGeneration) -> None:
    """Add every adapter to its layer's weights and take it off; does nothing where there are none.

    Where a process has parts of the weights, it has the whole of the adapters. What was held in 4 bits becomes fp32
    again, rounded as it was while the adapters trained.
    """
    decoder = decoder_of(model.language_model)
    adapted = _adapted(decoder)
    for name, module in adapted:
        if type(module.get_base_layer()) is not nn.Linear:
            module.base_layer = _dequantized(module.get_base_layer())
        weight = module.get_base_layer().weight
        if isinstance(weight, DTensor):
            add_to_part(weight, module.get_delta_weight("default"))
        else:
            module.merge()
        decoder.set_submodule(name, module.get_base_layer())
    if adapted:
        del decoder.peft_config


def adapters_alone(groups: ParameterGroups) -> ParameterGroups:
    """The same groups, with the adapters as all that there is of the language model."""
    adapters = [(name, parameter) for name, parameter in groups["language_model"] if ".lora_" in name]
    return {**groups, "language_model": adapters}


def save_adapter(model: ManyEyesForConditionalGeneration, folder: Path, *, base: tuple[str, str] | None) -> str:
    """Write the adapters alone, for ``peft.PeftModel.from_pretrained`` on the language model that they were trained on.

    Args:
        model: With adapters.
        folder: Made; ``adapter_model.safetensors`` and ``adapter_config.json``.
        base: The hub's id and revision of that language model, where it has them.

    Returns:
        sha256 of the weights, hexadecimal.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    language_model = model.language_model
    decoder, prefix = decoder_of(language_model), f"{language_model.base_model_prefix}."
    config: Any = copy.deepcopy(decoder.peft_config)["default"]  # type: ignore[operator, index]
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.base_model_name_or_path, config.revision = base or (None, None)
    # A list: peft would write a set in another order every time.
    config.target_modules = _targets(language_model, [prefix + name for name, _ in _adapted(decoder)])
    tensors = get_peft_model_state_dict(decoder, adapter_name="default")
    data = safetensors.torch.save(
        {f"base_model.model.{prefix}{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
    folder.mkdir()
    (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(data)
    config.save_pretrained(str(folder))
    return hashlib.sha256(data).hexdigest()


def adapter_modules(model: ManyEyesForConditionalGeneration) -> list[nn.Module]:
    """The modules whose own parameters are adapters'."""
    adapted = [layer for _, layer in _adapted(decoder_of(model.language_model))]
    return [inner for layer in adapted for name, inner in layer.named_modules() if "lora_" in name]


def _adapted(decoder: nn.Module) -> list[tuple[str, LoraLayer]]:
    if not hasattr(decoder, "peft_config"):  # peft notes there what it adapted
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in decoder.named_modules() if isinstance(module, LoraLayer)]


def _targets(language_model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names where those stand for these layers alone, as people write them; else whole names."""
    last = {name.rpartition(".")[2] for name in names}
    alike = {name for name, _ in language_model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if alike == set(names) else names)
