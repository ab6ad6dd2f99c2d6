"""Models that answer benchmark questions: a checkpoint in PyTorch, or an ONNX bundle.

Both run an image through the encoders once and share the prefix's keys and values between the questions on it, both
are greedy and both compute in fp32, so that their scorecards may be compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from manyeyes.evaluation.answering.encoder_cache import (
    EncoderCache,
    EncoderCacheSettings,
    FeatureSettings,
    ImageCounts,
)
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.runtime.bundle import GeneratedAnswer, Group, load_bundle
from manyeyes.runtime.sessions import CPU, CUDA

if TYPE_CHECKING:
    from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer

__all__ = ["AnsweredBatch", "Answerer", "AnswererSpec", "BundleAnswerer", "TorchAnswerer", "answer_in_turn"]

AnsweredBatch = tuple[int, list[list[GeneratedAnswer]], float]
"""Which batch, counted from 0; its answers, one list a group and one answer a question, in order; seconds of work."""


def __getattr__(name: str) -> Any:
    # A bundle is scored without torch, whose import takes seconds.
    if name == "TorchAnswerer":
        from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer

        return TorchAnswerer
    raise AttributeError(name)


class Answerer(Protocol):
    """What ``evaluate`` asks."""

    @property
    def name(self) -> ModelKind:
        """Kind of model: ``torch`` or ``bundle``."""

    @property
    def image_counts(self) -> ImageCounts:
        """Images shown since it was made, by where their visual tokens came from."""

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order."""

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        """Answer batches, each as soon as it is done, in whatever order that is.

        Batches are taken from ``batches`` only as they are needed: it may be long, and reads images as it goes.
        """


@dataclass(frozen=True)
class AnswererSpec:
    """What an answerer is made of; may be sent to another process, which makes its own.

    Attributes:
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        model: Its folder.
        threads: CPU threads; the library's own number when left out.
        device: ``cpu``, ``cuda`` or, for a checkpoint, ``cuda:1``; by default CUDA where there is a device.
        encoder_cache: Keeps visual tokens; every image is encoded anew without.
        features: Of a checkpoint, which encoders' features are kept for other models too; none without.
        variant: Of a bundle, which; as for ``load_bundle``.
    """

    kind: ModelKind
    model: Path
    threads: int | None = None
    device: str | None = None
    encoder_cache: EncoderCacheSettings | None = None
    features: FeatureSettings | None = None
    variant: str | None = None

    def build(self) -> Answerer:
        """Load the model.

        Raises:
            CheckpointError: The checkpoint is missing or incomplete.
            BundleError: The bundle is incomplete or was changed, or the device does not start.
        """
        if self.kind == "bundle":
            return BundleAnswerer(
                self.model,
                threads=self.threads,
                device=self.device,
                encoder_cache=self.encoder_cache,
                variant=self.variant,
            )
        from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer

        return TorchAnswerer(
            self.model,
            threads=self.threads,
            device=self.device,
            encoder_cache=self.encoder_cache,
            features=self.features,
        )


def answer_in_turn(
    answerer: Answerer, batches: Iterable[Sequence[Group]], *, max_new_tokens: int
) -> Iterator[AnsweredBatch]:
    """``Answerer.answer_batches`` of one process: one batch after the other.

    Args:
        answerer: Is asked.
        batches: Taken one at a time.
        max_new_tokens: Longest answer.
    """
    for index, groups in enumerate(batches):
        started = time.perf_counter()
        answers = answerer.answer_groups(groups, max_new_tokens=max_new_tokens)
        yield index, answers, time.perf_counter() - started


class BundleAnswerer:
    """Asks an ONNX bundle.

    Args:
        bundle: Its folder.
        threads: Threads a graph may use; see ``load_bundle``.
        batch_size: Most questions a run of a graph.
        device: ``cpu`` or ``cuda``; by default CUDA where there is a device.
        encoder_cache: Keeps visual tokens; every image is encoded anew without.
        variant: Which; as for ``load_bundle``.

    Raises:
        BundleError: The bundle is incomplete or was changed, or the device does not start.
    """

    name: ModelKind = "bundle"

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int | None = None,
        batch_size: int = 128,
        device: str | None = None,
        encoder_cache: EncoderCacheSettings | None = None,
        variant: str | None = None,
    ) -> None:
        providers = None if device is None else [CPU] if device == "cpu" else [CUDA, CPU]
        self._encoder_cache = None if encoder_cache is None else EncoderCache(encoder_cache)
        self.bundle = load_bundle(
            bundle, providers=providers, threads=threads, image_cache=self._encoder_cache, variant=variant
        )
        self._batch_size = batch_size

    @property
    def image_counts(self) -> ImageCounts:
        """Images shown since it was made, by where their visual tokens came from; all 0 without a cache."""
        return ImageCounts() if self._encoder_cache is None else self._encoder_cache.counts

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order.

        Raises:
            RecordError: An image cannot be decoded, or a question is too long.
        """
        return self.bundle.answer_groups(groups, max_new_tokens=max_new_tokens, batch_size=self._batch_size)

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        """Answer one batch after the other."""
        return answer_in_turn(self, batches, max_new_tokens=max_new_tokens)
