"""Opens a model for an evaluation: in this process, or in several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.answerers import AnsweredBatch, Answerer, AnswererSpec, answer_in_turn
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.evaluation.answering.processes import AnswererPool
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from manyeyes.runtime.sessions import count_cuda_devices

PROCESSES = "MANYEYES_EVALUATION_PROCESSES"


@contextmanager
def open_answerer(spec: AnswererSpec, *, processes: int | None = None) -> Iterator[Answerer]:
    """A model that is loaded with the first question, and not at all where every answer is known already.

    Args:
        spec: The model; its threads and its encoder cache's memory are shared out among the processes.
        processes: How many answer side by side; else ``MANYEYES_EVALUATION_PROCESSES``, else one a CUDA device, else 1.
            Each holds the whole model.

    Yields:
        The model. With several processes they end with the block.

    Raises:
        EvaluationError: The number of processes is none.
    """
    devices = () if spec.device == "cpu" else cuda_devices(spec.kind)
    count = count_processes(processes, devices=len(devices))
    if count == 1:
        yield LateAnswerer(spec)
        return
    cache = spec.encoder_cache
    share = replace(
        spec,
        threads=None if spec.threads is None else max(1, spec.threads // count),
        encoder_cache=None if cache is None else replace(cache, memory_bytes=cache.memory_bytes // count),
    )
    with AnswererPool(share, processes=count, devices=devices) as pool:
        yield pool


def count_processes(given: int | None, *, devices: int) -> int:
    """Processes that answer.

    Args:
        given: As asked for; else the environment says.
        devices: CUDA devices that there are.

    Raises:
        EvaluationError: Not a whole number of at least 1.
    """
    text = str(given) if given is not None else os.environ.get(PROCESSES, "")
    if not text:
        return max(1, devices)
    if not text.isdecimal() or int(text) < 1:
        name = PROCESSES if given is None else "processes"
        raise EvaluationError(f"{name} is {text!r}", "a whole number of at least 1", "Leave it out, or set it to 1.")
    return int(text)


def cuda_devices(kind: ModelKind) -> tuple[str, ...]:
    """The CUDA devices that a kind of model can use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Args:
        kind: ``torch`` or ``bundle``.
    """
    if kind == "torch":
        import torch

        count = torch.cuda.device_count()
    else:
        count = count_cuda_devices()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Only those before the first wrong name count.
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]
    return tuple(name.strip() for name in names)


class LateAnswerer:
    """Loads the model when it is first asked.

    Args:
        spec: The model.
    """

    def __init__(self, spec: AnswererSpec) -> None:
        self.name: ModelKind = spec.kind
        self._spec = spec
        self._loaded: Answerer | None = None

    @property
    def image_counts(self) -> ImageCounts:
        """Images shown since it was made, by where their visual tokens came from."""
        return ImageCounts() if self._loaded is None else self._loaded.image_counts

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order.

        Raises:
            CheckpointError: The checkpoint is missing or incomplete.
            BundleError: The bundle is incomplete or was changed.
            RecordError: An image cannot be decoded, or a question is too long.
        """
        return self._load().answer_groups(groups, max_new_tokens=max_new_tokens)

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        """Answer one batch after the other; loading is none of their seconds."""
        for index, groups in enumerate(batches):
            answerer = self._load()
            ((_, answers, seconds),) = answer_in_turn(answerer, [groups], max_new_tokens=max_new_tokens)
            yield index, answers, seconds

    def _load(self) -> Answerer:
        if self._loaded is None:
            self._loaded = self._spec.build()
        return self._loaded
