"""How much of a device training uses: the model's operations, the device's peak, the memory at its highest.

Model FLOPs utilisation (MFU, PaLM, arXiv:2204.02311, appendix B): the operations that the model needs for the tokens
and images of a step, whatever was computed again or on padding, beside what the devices could do in that time. Counted
are matrix products and convolutions, a multiplication and an addition as two operations, forward and backward; left out
are those of attention among the language model's tokens, as they are less than a tenth at 2,000 tokens.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from manyeyes.errors import RecipeError
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.language_model import decoder_layers
from manyeyes.training.batches import Batch
from manyeyes.training.processes import Processes

# Dense bf16 operations a second, from NVIDIA's data sheets; the first name that a device's name holds.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
# A side of the matrices whose product is timed, and how often.
_SIDE = {"cuda": 8192, "cpu": 768}
_ROUNDS = 5


@lru_cache
def device_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a device can do: by its data sheet in bf16, else measured by a matrix product.

    Args:
        device: One device.
        dtype: That products are computed in.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        if known is not None:
            return known
    side = _SIDE.get(device.type, _SIDE["cpu"])
    left = torch.ones(side, side, dtype=dtype, device=device)
    best = math.inf
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        (left @ left)[0, 0].item()  # so that a GPU is done
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def peak_of(processes: Processes, precision: Literal["fp32", "bf16"]) -> float:
    """Operations a second of all processes' devices together."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return processes.size * device_peak(processes.device, dtype)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: what tensors took on a GPU, or what this process held, at its highest."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ModelFlops:
    """Operations that a model needs for a batch, forward and backward.

    Those of a language model follow from its weights; those of encoders, fusion and projector are counted the first
    time that they run on a kind of batch.

    Args:
        model: Frozen but for what trains; whole, since parts do not tell a layer's size.
    """

    def __init__(self, model: ManyEyesForConditionalGeneration) -> None:
        try:
            layers = decoder_layers(model.language_model)
        except RecipeError:  # a decoder that is no stack
            layers = nn.ModuleList([model.language_model])
        config = model.language_model.config.get_text_config()
        self._a_token = sum(_of_weights(module, config) for module in layers.modules())
        self._a_prediction = _of_weights(model.get_output_embeddings(), config)
        self._images: dict[tuple[str, ...], float] = {}

    def of(self, batch: Batch) -> float:
        """Of a batch that was run, without padding."""
        images = _num_images(batch) * self._images.get(_kind(batch), 0.0)
        return images + batch.num_tokens * self._a_token + batch.num_supervised * self._a_prediction

    @contextmanager
    def seeing(self, batch: Batch) -> Iterator[None]:
        """Count what the block does to a batch's images, once for a kind of batch."""
        if _kind(batch) in self._images:
            yield
            return
        with _Counter() as counter:
            yield
        self._images[_kind(batch)] = counter.flops / _num_images(batch)


def _kind(batch: Batch) -> tuple[str, ...]:
    return (*sorted(batch.pixel_values), "|", *sorted(batch.features))


def _num_images(batch: Batch) -> int:
    # Tiles, where a layout cuts images: they are what encoders see.
    return next((len(own) for own in (*batch.pixel_values.values(), *batch.features.values())), 0)


def _of_weights(module: Any, config: Any) -> float:
    if isinstance(module, nn.Linear):  # whose weight may be packed
        return _forward_and_backward(module.in_features * module.out_features, module.weight)
    if isinstance(module, nn.Embedding):
        return 0.0
    found = 0.0
    for weight in module.parameters(recurse=False):
        if weight.dim() == 2:
            found += _forward_and_backward(weight.numel(), weight)
        if weight.dim() == 3:  # experts, of which a token takes some
            taken = getattr(config, "num_experts_per_tok", None) or len(weight)
            found += _forward_and_backward(weight.numel() * taken // len(weight), weight)
    return found


def _forward_and_backward(products: int, weight: Tensor) -> float:
    # Something in front of the language model, or below in it, always trains.
    return 2.0 * products * (2 + weight.requires_grad)


class _Counter(TorchFunctionMode):
    """Counts matrix products and convolutions, with those of their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _COUNTED.get(func)
        if count is not None and len(args) >= 2:
            times = 1
            if torch.is_grad_enabled():
                times += sum(isinstance(each, Tensor) and each.requires_grad for each in args[:2])
            self.flops += 2.0 * count(result, *args) * times
        return result


def _products(result: Tensor, left: Tensor, *_: Any) -> int:
    return result.numel() * left.shape[-1]


def _convolution(result: Tensor, _: Tensor, weight: Tensor, *__: Any) -> int:
    return result.numel() * weight[0].numel()


def _attention(result: Tensor, _: Tensor, keys: Tensor, *__: Any) -> int:
    return 2 * result.numel() * keys.shape[-2]


_COUNTED: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((functional.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm), _products),
    Tensor.__matmul__: _products,
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
    functional.scaled_dot_product_attention: _attention,
}
