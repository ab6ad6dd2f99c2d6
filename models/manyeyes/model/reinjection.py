"""Lets a language model look at the image again between its layers.

The windows of the spatial vision aggregator travel with each call, as a keyword argument that the language model hands
down to its layers; nothing is kept on a module between calls. Training and generation run the same code; steps that
carry no image positions (every step of generation after the first) carry no windows.

Source: Cambrian-1, arXiv:2406.16860, section 3.2. Its released code looks at a fixed place in the sequence, keeps the
windows on the model between calls, and skips all of this when it trains on GPUs; none of that is repeated here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from manyeyes.errors import RecipeError
from manyeyes.fusion.cross_attention import VisionSampler, VisualWindows
from manyeyes.recipe import ReinjectionSpec

VISUAL_CONTEXT = "visual_context"
"""The keyword argument that carries a ``VisualContext`` to decoder layers."""


@dataclass(frozen=True)
class VisualContext:
    """What one call of the decoder may look at.

    Attributes:
        places: ``[M]``, where visual tokens stand, counted over all rows: ``row * T + position``.
        windows: What each of them looks at.
        readers: Grows by one for each layer that has looked; a language model that drops the keyword leaves it empty.
    """

    places: Tensor
    windows: VisualWindows
    readers: list[int] = field(default_factory=list)


class Reinjection(nn.Module):
    """Cross-attention blocks that run after some of the decoder's layers.

    After layer ``start + k * stride`` block k replaces the hidden states x of visual tokens by x plus what it found in
    their windows (the formula of ``VisionSampler``). Newlines and text are left as they are.

    Source:
        Cambrian-1, arXiv:2406.16860, section 3.2; which layer's output it is follows the published code.
    """

    def __init__(
        self, hidden_size: int, *, layers: Sequence[int], channels: int, windows: Sequence[int], num_heads: int
    ) -> None:
        """Make the blocks; ``attach`` puts them to work.

        Args:
            hidden_size: Width of the language model.
            layers: Decoder layers, from 0, after which a block runs.
            channels: Width of the windows.
            windows: Per encoder, cells a side of a visual token's window.
            num_heads: Attention heads.
        """
        super().__init__()
        self.layers = tuple(layers)
        self.samplers = nn.ModuleList(
            VisionSampler(hidden_size, channels=channels, windows=windows, num_heads=num_heads) for _ in layers
        )

    def attach(self, decoder: nn.Module, *, num_layers: int) -> None:
        """Let the blocks run after the decoder's layers, in place; the decoder's keys and layers stay what they are.

        Args:
            decoder: The transformer inside a causal language model.
            num_layers: How many layers it has.

        Raises:
            RecipeError: This family of language models takes no further keywords for its layers.
        """
        stack = _layers_of(decoder, num_layers)
        for number, sampler in zip(self.layers, self.samplers, strict=True):
            stack[number].register_forward_hook(_AfterLayer(sampler, number), with_kwargs=True)


@dataclass(eq=False)
class _AfterLayer:
    # An object and no closure, so that a deep copy of a model gets hooks to its own blocks.
    sampler: nn.Module
    number: int

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        context: VisualContext | None = kwargs.get(VISUAL_CONTEXT)
        if context is None:
            return output
        context.readers.append(self.number)
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        flat = hidden_BTD.flatten(0, 1)
        looked = self.sampler(flat[context.places], context.windows)
        hidden_BTD = flat.index_put((context.places,), looked.to(flat.dtype)).view_as(hidden_BTD)
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD


def reinjected_layers(spec: ReinjectionSpec, *, num_layers: int) -> list[int]:
    """Which decoder layers are followed by a block.

    Args:
        spec: A count of None takes as many as fit.
        num_layers: Layers of the decoder.

    Raises:
        RecipeError: More than fit.
    """
    start, stride, count = spec.start, spec.stride, spec.count
    fitting = list(range(start, num_layers, stride))
    if not fitting or (count is not None and count > len(fitting)):
        raise RecipeError(
            f"model.reinjection has start {start}, stride {stride} and count {count}",
            f"the language model has {num_layers} layers, where {len(fitting)} blocks fit",
            "Lower one of them.",
        )
    return fitting[:count]


def check_read(context: VisualContext | None, reinjection: Reinjection | None, language_model: PreTrainedModel) -> None:
    """Make sure that every block has looked.

    Args:
        context: What the call carried.
        reinjection: The model's.
        language_model: The family that was called, for the message.

    Raises:
        RecipeError: The language model dropped the keyword on the way.
    """
    if context is not None and reinjection is not None and len(context.readers) < len(reinjection.layers):
        raise _refusal(type(language_model).__name__)


def _layers_of(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(stacks) != 1 or not all(_takes_keywords(module) for module in (decoder, stacks[0][0])):
        raise _refusal(type(decoder).__name__)
    return stacks[0]


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _refusal(family: str) -> RecipeError:
    return RecipeError(
        f"model.reinjection with a {family}",
        "this family hands no further keywords down to its layers",
        "Drop model.reinjection, or use a language model that does, for instance Llama, Mistral, Qwen2 or Gemma.",
    )
