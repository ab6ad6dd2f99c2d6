"""Keys and values in the decoder's graph: joined to those before, or written into a buffer that has room for them.

``past`` is ``[batch_size, heads, past, width]`` and ``attention_mask`` ``[batch_size, total]``. Where the mask is
longer than the past, as runtimes that know nothing of this expect, past and new are joined: ``total`` is past + query.
Where it is as long, the past is a buffer, and the new keys and values belong where the mask's last ones are. Whoever
binds ``present`` to the memory of ``past`` has them written there and nothing copied. What the buffer holds behind them
must be finite; the mask hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import BOOL, FLOAT, INT64, opset18, script
from onnxscript.values import Opset
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_DOMAIN = Opset("manyeyes", 1)


@torch.library.custom_op("manyeyes::new_slots", mutates_args=())
def _new_slots(mask: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first slot of new tokens (a number), theirs ``[query, 1]``, and whether the past has room for them.

    Args:
        mask: ``[batch_size, total]``, integers.
        past: Keys of one layer, ``[batch_size, heads, past, width]``.
        new: Embeddings of the new tokens, ``[batch_size, query, D]``.
    """
    has_room = mask.shape[1] == past.shape[2]
    last = (mask * torch.arange(1, mask.shape[1] + 1)).max()
    first = last - new.shape[1] if has_room else torch.tensor(past.shape[2])
    return first, first + torch.arange(new.shape[1])[:, None], torch.tensor(has_room)


@_new_slots.register_fake
def _(mask: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return mask.new_empty(()), mask.new_empty((new.shape[1], 1)), mask.new_empty((), dtype=torch.bool)


@torch.library.custom_op("manyeyes::append", mutates_args=())
def _append(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    has_room: Tensor,
    mask: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Keys and values with the new ones among them, ``[batch_size, heads, total, width]``.

    Args:
        keys: ``[batch_size, heads, past, width]``, as ``values``.
        values: Theirs.
        new_keys: ``[batch_size, heads, query, width]``, as ``new_values``.
        new_values: Theirs.
        key_slots: The slot of each new key, ``[batch_size, heads, query, width]``.
        value_slots: Of each new value.
        has_room: Whether the past has room for them.
        mask: ``[batch_size, total]``.
    """
    if has_room:
        return keys.scatter(2, key_slots, new_keys), values.scatter(2, value_slots, new_values)
    return torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)


@_append.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,  # noqa: ARG001
    new_values: Tensor,  # noqa: ARG001
    key_slots: Tensor,  # noqa: ARG001
    value_slots: Tensor,  # noqa: ARG001
    has_room: Tensor,  # noqa: ARG001
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    total = mask.shape[1]
    return (
        keys.new_empty((*keys.shape[:2], total, keys.shape[3])),
        values.new_empty((*values.shape[:2], total, values.shape[3])),
    )


@script(_DOMAIN, default_opset=opset18)
def _onnx_new_slots(mask: INT64, past: FLOAT, new: FLOAT) -> tuple[INT64, INT64, BOOL]:
    one = opset18.Constant(value_int=1)
    total = opset18.Squeeze(opset18.Shape(mask, start=1, end=2))
    length = opset18.Squeeze(opset18.Shape(past, start=2, end=3))
    query = opset18.Squeeze(opset18.Shape(new, start=1, end=2))
    has_room = opset18.Equal(total, length)
    places = opset18.Range(one, opset18.Add(total, one), one)
    last = opset18.ReduceMax(opset18.Mul(mask, places), keepdims=0)
    first = opset18.Where(has_room, opset18.Sub(last, query), length)
    slots = opset18.Unsqueeze(opset18.Range(first, opset18.Add(first, query), one), opset18.Constant(value_ints=[1]))
    return first, slots, has_room


@script(_DOMAIN, default_opset=opset18)
def _onnx_append(
    keys: FLOAT,
    values: FLOAT,
    new_keys: FLOAT,
    new_values: FLOAT,
    key_slots: INT64,
    value_slots: INT64,
    has_room: BOOL,
    mask: INT64,  # noqa: ARG001
) -> tuple[FLOAT, FLOAT]:
    if has_room:
        all_keys = opset18.ScatterElements(keys, key_slots, new_keys, axis=2)
        all_values = opset18.ScatterElements(values, value_slots, new_values, axis=2)
    else:
        all_keys = opset18.Concat(keys, new_keys, axis=2)
        all_values = opset18.Concat(values, new_values, axis=2)
    return all_keys, all_values


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.manyeyes.new_slots.default: _onnx_new_slots,
    torch.ops.manyeyes.append.default: _onnx_append,
}
"""What torch's exporter writes for the operators of this module."""


class _Layer(DynamicLayer):
    def __init__(self, past: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(*past)
        self.keys, self.values = past
        self._first, self._slots, self._has_room = slots
        self._mask = mask

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        dtype = key_states.dtype
        new = key_states.float(), value_states.float()
        slots = [self._slots.expand(each.shape) for each in new]
        self.keys, self.values = _append(self.keys, self.values, *new, *slots, self._has_room, self._mask)
        return self.keys.to(dtype), self.values.to(dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self._mask.shape[1], 0

    def get_seq_length(self) -> int:
        # As transformers' own static layers: a tensor, by which the causal mask is moved.
        return self._first  # type: ignore[return-value]


def read_past(past: Sequence[tuple[Tensor, Tensor]], mask: Tensor, new: Tensor) -> Cache:
    """A cache of transformers that takes new keys and values as the graph is to.

    Args:
        past: Keys and values of each layer, fp32, ``[batch_size, heads, past, width]``.
        mask: ``[batch_size, total]``.
        new: Embeddings of the new tokens, ``[batch_size, query, D]``.
    """
    slots = _new_slots(mask, past[0][0], new)
    return Cache(layers=[_Layer(layer, slots, mask) for layer in past])
