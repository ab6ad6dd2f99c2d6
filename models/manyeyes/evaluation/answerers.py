"""Models that answer benchmark questions: a checkpoint in PyTorch, or an ONNX bundle.

Both run an image through the encoders once and share the prefix's keys and values between the questions on it, both
are greedy and both compute in fp32, so that their scorecards may be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.runtime.bundle import GeneratedAnswer, Group, load_bundle

if TYPE_CHECKING:
    from manyeyes.evaluation.torch_answerer import TorchAnswerer

__all__ = ["Answerer", "BundleAnswerer", "TorchAnswerer"]


def __getattr__(name: str) -> Any:
    # A bundle is scored without torch, whose import takes seconds.
    if name == "TorchAnswerer":
        from manyeyes.evaluation.torch_answerer import TorchAnswerer

        return TorchAnswerer
    raise AttributeError(name)


class Answerer(Protocol):
    """What ``evaluate`` asks."""

    @property
    def name(self) -> ModelKind:
        """Kind of model: ``torch`` or ``bundle``."""

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order."""


class BundleAnswerer:
    """Asks an ONNX bundle.

    Args:
        bundle: Its folder.
        threads: Threads a graph may use; see ``load_bundle``.
        batch_size: Most questions a run of a graph.

    Raises:
        BundleError: The bundle is incomplete or was changed.
    """

    name: ModelKind = "bundle"

    def __init__(self, bundle: Path, *, threads: int | None = None, batch_size: int = 128) -> None:
        self.bundle = load_bundle(bundle, threads=threads)
        self._batch_size = batch_size

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order.

        Raises:
            RecordError: An image cannot be decoded, or a question is too long.
        """
        return self.bundle.answer_groups(groups, max_new_tokens=max_new_tokens, batch_size=self._batch_size)
