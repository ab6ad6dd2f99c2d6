"""Blocks and stages of encoders that train, each of which several processes gather by itself.

They are found by running an encoder without memory: what ``Encoder.run_part`` is given, in the order of the calls, is
what a family's file says its parts are. A process without an image in a micro-batch sends the same messages as one with
images: it calls every part, and computes nothing in it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from manyeyes.encoders import Encoder
from manyeyes.encoders.weights import meta_device
from manyeyes.fusion import run_encoders
from manyeyes.model import ManyEyesForConditionalGeneration, build_encoders


def encoder_parts(model: ManyEyesForConditionalGeneration) -> list[nn.Module]:
    """Parts of encoders that have something to train, in the order in which images run through them.

    Those that run more than once for an image are left out, and those in front of which nothing trains, since torch
    does not tell when their backward pass is over.

    Args:
        model: What trains requires gradients; on any device, and left as it is.
    """
    if not any(parameter.requires_grad for parameter in model.encoders.parameters()):
        return []
    with meta_device():
        encoders = build_encoders(model.config.encoders)
        pixels = [torch.empty(1, 3, size, size) for size in model.encoder_sizes.values()]
    for name, parameter in encoders.named_parameters():
        parameter.requires_grad_(model.encoders.get_parameter(name).requires_grad)
    names = {module: name for name, module in encoders.named_modules()}
    called: list[tuple[str, bool]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module in names and any(each.requires_grad for each in module.parameters()):
            known = any(isinstance(each, Tensor) and each.requires_grad for each in arguments)
            called.append((names[module], known))

    own = [encoder for encoder in encoders.values() if isinstance(encoder, Encoder)]
    with _noting(own, note), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        run_encoders(copy.deepcopy(model.fusion).to("meta"), own, pixels)
    times = Counter(name for name, _ in called)
    return [model.encoders.get_submodule(name) for name, known in called if known and times[name] == 1]


@contextmanager
def _noting(encoders: Sequence[Encoder], note: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    """Tell of the outermost modules that are called inside of ``run_part``."""
    depth = -1  # -1 outside of parts, else how many modules are running

    def run_part(part: Callable[..., Any], *inputs: Any) -> Any:
        nonlocal depth
        depth = 0
        output = part(*inputs)
        depth = -1
        return output

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal depth
        if depth == 0:
            note(module, arguments)
        depth += depth >= 0

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= depth > 0

    for encoder in encoders:
        encoder.run_part = run_part  # type: ignore[method-assign]
    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Skippable:
    """The forward pass of a module that may be called for its messages alone.

    Args:
        module: What it is of; its ``forward`` becomes this.
        nothing: Makes zero of tensors, each of which has a gradient of zero.
    """

    def __init__(self, module: nn.Module, nothing: Callable[..., Tensor]) -> None:
        self._module = module
        self._forward = module.forward
        self._nothing = nothing

    def __call__(self, *arguments: Any, skipped: bool = False, **more: Any) -> Any:
        """As the module's own, or zero for zero."""
        if not skipped:
            return self._forward(*arguments, **more)
        return self._nothing(arguments[0].device, arguments[0], *self._module.parameters())
