"""Low-rank adapters on a language model's linear layers, for the time of one stage; the layers are peft's.

Source: LoRA, arXiv:2106.09685. Down projections start as a linear layer of torch does, up projections at zero, as in
the published code.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from manyeyes.errors import RecipeError
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.language_model import decoder_of
from manyeyes.recipe import LoraSpec
from manyeyes.training.optimizer import ParameterGroups


def add_adapters(model: ManyEyesForConditionalGeneration, spec: LoraSpec, *, seed: int) -> None:
    """Put an adapter on every linear layer of the language model's decoder, in place. The outputs stay what they were.

    Args:
        model: Changed; of the decoder, the adapters alone require gradients from here on.
        spec: Rank, scale and dropout.
        seed: What the down projections are drawn from.

    Raises:
        RecipeError: The decoder has no linear layer, or is of a family whose layers peft cannot adapt.
    """
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


def merge_adapters(model: ManyEyesForConditionalGeneration) -> None:
    """Add every adapter to its layer's weights and take it off; does nothing where there are none."""
    decoder = decoder_of(model.language_model)
    adapted = [(name, module) for name, module in decoder.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        module.merge()
        decoder.set_submodule(name, module.get_base_layer())
    if adapted:
        del decoder.peft_config


def adapters_alone(groups: ParameterGroups) -> ParameterGroups:
    """The same groups, with the adapters as all that there is of the language model."""
    adapters = [(name, parameter) for name, parameter in groups["language_model"] if ".lora_" in name]
    return {**groups, "language_model": adapters}
