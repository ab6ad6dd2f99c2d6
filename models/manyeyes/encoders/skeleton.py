"""Modules built at their true sizes, without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Build what follows on the meta device, and skip drawing its weights: there they have no values."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchDispatchMode):
    """Skips what fills a tensor without memory: those kernels are Python there, and take seconds for large models."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLING and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_FILLING = {
    _aten.add_.Tensor,
    _aten.clamp_.default,
    _aten.erfinv_.default,
    _aten.fill_.Scalar,
    _aten.mul_.Tensor,
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.zero_.default,
}
