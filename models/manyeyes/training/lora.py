"""Low-rank adapters on a language model's linear layers, for the time of one stage.

Source: LoRA, arXiv:2106.09685. Down projections start as a linear layer of torch does, up projections at zero, as in
the published code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manyeyes.errors import RecipeError
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.language_model import decoder_of
from manyeyes.recipe import LoraSpec
from manyeyes.training.optimizer import ParameterGroups

_ADAPTERS = (".down.weight", ".up.weight")


class AdaptedLinear(nn.Module):
    """``base(x) + alpha / rank * up(down(dropout(x)))``."""

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, spec.rank, bias=False, **place)
        self.up = nn.Linear(spec.rank, base.out_features, bias=False, **place)
        self.dropout = nn.Dropout(spec.dropout)
        self.scale = spec.alpha / spec.rank

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        adapted: Tensor = self.base(inputs) + self.scale * self.up(self.down(self.dropout(inputs)))
        return adapted


def add_adapters(model: ManyEyesForConditionalGeneration, spec: LoraSpec, *, seed: int) -> None:
    """Put an adapter on every linear layer of the language model's decoder, in place. The outputs stay what they were.

    Args:
        model: Changed.
        spec: Rank, scale and dropout.
        seed: What the down projections are drawn from.

    Raises:
        RecipeError: The decoder has no linear layer.
    """
    decoder = decoder_of(model.language_model)
    generator = torch.Generator().manual_seed(seed)
    found = [
        (parent, name, child)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise RecipeError(
            f"lora with a {type(decoder).__name__}", "its decoder has no linear layer to adapt", "Leave lora out."
        )
    for parent, name, child in found:
        adapted = AdaptedLinear(child, spec)
        if not child.weight.is_meta:
            bound = 1 / math.sqrt(child.in_features)
            drawn = torch.rand(adapted.down.weight.shape, generator=generator)
            with torch.no_grad():
                adapted.down.weight.copy_((2 * drawn - 1) * bound)
                adapted.up.weight.zero_()
        setattr(parent, name, adapted)


def merge_adapters(model: ManyEyesForConditionalGeneration) -> None:
    """Add every adapter to its layer's weights and take it off; does nothing where there are none."""
    for parent in list(decoder_of(model.language_model).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AdaptedLinear):
                with torch.no_grad():
                    child.base.weight += child.scale * (child.up.weight @ child.down.weight)
                setattr(parent, name, child.base)


def adapters_alone(groups: ParameterGroups) -> ParameterGroups:
    """The same groups, with the adapters as all that there is of the language model."""
    adapters = [(name, parameter) for name, parameter in groups["language_model"] if name.endswith(_ADAPTERS)]
    return {**groups, "language_model": adapters}
