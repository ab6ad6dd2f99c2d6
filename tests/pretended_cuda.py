"""A CUDA device that is none: what runs on it runs on the CPU, and fails where it would fail on a GPU.

A tensor on it holds its numbers on the CPU and says that it is on ``cuda:0``. An operation on tensors of both devices
is refused, and so is a collective on the CPU's, as in a process group that only NCCL serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from manyeyes.training import throughput

CUDA = torch.device("cuda", 0)
# What torch is asked for in place of CUDA, which it would look for.
_STAND_IN = torch.device("meta", 1)
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._foreach_copy_.default}
# Places in a tensor may lie on the CPU, as on a GPU.
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class DevicesMeetError(RuntimeError):
    """What a GPU refuses: tensors of two devices in one operation."""


class OnCuda(Tensor):
    """A tensor on the device."""

    kept: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnCuda:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=_STAND_IN,
        )
        made.kept = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def tolist(self) -> Any:
        return self.kept.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.kept})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    if func.namespace == "c10d":
        # Where to wait for each other is the group's own matter.
        if len(there) < len(tensors) and func is not torch.ops.c10d.barrier.default:
            raise RuntimeError("No backend type associated with device type cpu")
        return func(*_off(args), **_off(kwargs))
    if func not in _COPIES:
        indexed = func in _INDEXED and isinstance(args[0], OnCuda)
        joined = tree_leaves((args[0], args[2:]) if indexed else (args, kwargs))
        # A number on the CPU may come along, as on a GPU.
        devices = {leaf.device for leaf in joined if isinstance(leaf, Tensor) and (leaf.ndim or leaf.device == CUDA)}
        if len(devices) > 1:
            shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
            raise DevicesMeetError(f"{func} of {shapes}")
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = kwargs["device"] == _STAND_IN
        kwargs = {**kwargs, "device": torch.device("cpu")} if goes_there else kwargs
    elif func is _aten.copy_.default:
        goes_there = isinstance(args[0], OnCuda)
    result = func(*_off(args), **_off(kwargs))
    if not goes_there:
        return result
    # What works in place gives back what it was given.
    owners = {id(tensor.kept): tensor for tensor in there}
    return tree_map_only(Tensor, lambda tensor: owners[id(tensor)] if id(tensor) in owners else OnCuda(tensor), result)


def _off(tree: Any) -> Any:
    return tree_map_only(OnCuda, lambda tensor: tensor.kept, tree)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Asks for the stand-in where the code says CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:  # a driver's business
            return args[0]
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs).to(_STAND_IN)
        if func is torch.device or getattr(func, "__name__", "") == "manual_seed":
            return func(*args, **kwargs)
        args = tuple(_STAND_IN if _is_cuda(arg) else arg for arg in args)
        return func(*args, **{name: _STAND_IN if _is_cuda(value) else value for name, value in kwargs.items()})


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _no_grad(mode: bool) -> Any:
    return torch.set_grad_enabled(not mode and torch.is_grad_enabled())


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Within the block there is the device ``cuda``."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    # As on a GPU, a module that moves keeps its parameter objects, which an optimizer may hold already.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        # Inference mode passes over what a tensor subclass does.
        with (
            patch.object(torch._C, "_InferenceMode", _no_grad),
            patch.object(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9)),
            patch.object(throughput, "device_peak", lambda *_: 1e12),
            _Names(),
            _Factories(),
        ):
            yield CUDA
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
