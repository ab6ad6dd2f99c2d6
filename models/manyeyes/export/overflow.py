"""Does fp16 hold what a model computes? It ends at 65,504, and some encoders' activations do not.

The fp16 model answers calibration questions, and every operation's result is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manyeyes.errors import BundleError
from manyeyes.export.attention import use_grouped_attention
from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor
from manyeyes.runtime.bundle import Group

LARGEST = 65_504
_MOST_GROUPS = 8


def find_overflow(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    calibration: Sequence[Group],
    *,
    graphs: Sequence[str],
) -> None:
    """Refuse fp16 where something that it computes is infinite or no number.

    Args:
        model: In fp16, in evaluation mode, on the CPU.
        processor: The model's.
        calibration: Questions about images; the first few groups are asked, one question each.
        graphs: Which are to be fp16: ``vision``, ``embed``, ``decoder``; others do not matter.

    Raises:
        BundleError: There is no question, or a result overflows; names the part of the model.
    """
    chosen = [group for group in calibration if group.questions and group.images][:_MOST_GROUPS]
    if not chosen:
        raise BundleError(
            "fp16 is asked for without an image to try it on",
            "questions about images: activations of some encoders are too large for fp16",
            "Pass calibration.",
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all() and _graph_of(name) in graphs:
            raise _too_large(_graph_of(name), f"weight {name}")
    use_grouped_attention(model.language_model)
    for group in chosen:
        batch = processor(images=list(group.images), text=group.questions[0])
        halved = {
            name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }
        with torch.no_grad(), _module_names(model) as inside, _Watch(inside) as watch:
            model(**halved)
        for place in watch.overflown:
            if _graph_of(place) in graphs:
                raise _too_large(_graph_of(place), place)


def _too_large(graph: str, place: str) -> BundleError:
    return BundleError(
        f"fp16 of the {graph} graph overflows at {place}",
        f"numbers up to {LARGEST:,}: more is infinite in fp16",
        f"Set export's precision of {graph} to fp32 or int8.",
    )


def _graph_of(place: str) -> str:
    return "decoder" if place.startswith(("language_model", "reinjection")) else "vision"


class _Watch(TorchDispatchMode):
    """Notes in which modules finite inputs gave something infinite or no number."""

    def __init__(self, inside: list[str]) -> None:
        super().__init__()
        self.inside = inside
        self.overflown: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        halves = [value for value in tree_leaves(result) if isinstance(value, Tensor) and value.dtype == torch.float16]
        # What is broken already, in whatever type, is not this module's.
        if not all(map(_is_finite, halves)) and all(map(_is_finite, tree_leaves((args, kwargs)))):
            self.overflown.append(self.inside[-1])
        return result


def _is_finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all())


@contextmanager
def _module_names(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are at work, the innermost last."""
    inside = ["the model"]
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()
