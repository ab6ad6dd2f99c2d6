"""The errors that a user of ManyEyes can cause, and what a command exits with.

::

    ManyEyesError
    ├── RecipeError            a recipe, a field of one, or an override of one
    ├── DataError              a record, a shard, a snapshot or a mixture
    │   ├── RecordError        one sample: bad turns, bad image, image and placeholder counts differ
    │   ├── SnapshotError      a snapshot that is missing, incomplete or does not match its md5
    │   └── ValidationError    the validation suite refuses the snapshot
    ├── ShapeError             tensors or grids that do not fit together
    ├── SourceError            pretrained parts that cannot be had or do not fit
    ├── CheckpointError        a checkpoint that is missing, incomplete or does not match
    ├── DrawingError           a text-to-image pipeline that is missing or does not fit
    ├── BundleError            an ONNX bundle that is missing, incomplete or does not match
    ├── EvaluationError        an unknown benchmark, or answers that cannot be scored
    ├── ServiceError           a language model behind an endpoint that refuses, or does not answer
    ├── FetchError             a page or an image of the web that may not be fetched, or cannot be
    ├── RegistryError          a model, version or alias that is not there
    │   └── RegistryUnreachableError   the MLflow server or store does not answer (worth a retry)
    ├── StorageError           no space, or no permission, where something must be written
    ├── LockedError            another process owns this run or this running checkpoint
    └── PipelineError          a pipeline or a step that failed, or that cannot be started
        ├── PreflightError     something that a run needs is missing or wrong; says all of it at once
        ├── ProcessLostError   a process of several ended before its time (worth a retry)
        └── EndpointError      a Kubeflow endpoint that refuses, or does not answer
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "INTERRUPTED",
    "NOT_PROMOTED",
    "OTHER_ERROR",
    "USER_ERROR",
    "BundleError",
    "CheckpointError",
    "DataError",
    "DrawingError",
    "EndpointError",
    "EvaluationError",
    "FetchError",
    "LockedError",
    "ManyEyesError",
    "PipelineError",
    "PreflightError",
    "ProcessLostError",
    "RecipeError",
    "RecordError",
    "RegistryError",
    "RegistryUnreachableError",
    "ServiceError",
    "ShapeError",
    "SnapshotError",
    "SourceError",
    "StorageError",
    "ValidationError",
    "did_you_mean",
]

# What a command exits with. 0: it did what it was asked.
OTHER_ERROR = 1
USER_ERROR = 2
NOT_PROMOTED = 3
INTERRUPTED = 130
"""As shells write the end by Ctrl-C: 128 and the signal's number."""


class ManyEyesError(Exception):
    """Something that the user can fix; says what was found, what was needed and what to do.

    Args:
        found: What was found, naming the field, file or value.
        needed: What was needed instead.
        do: What to do about it, with the command where there is one.
        retry: Whether the same call may succeed later without any change.
    """

    retry_by_default = False

    def __init__(self, found: str, needed: str, do: str, *, retry: bool | None = None) -> None:
        super().__init__(found, needed, do)
        self.found = found
        self.needed = needed
        self.do = do
        self.retry = self.retry_by_default if retry is None else retry

    def __str__(self) -> str:
        return f"{self.found}; {self.needed}. {self.do}"

    def __reduce__(self) -> tuple[Any, ...]:
        # As it stands: a class may be made with other arguments than the three that it keeps.
        return _restore, (type(self), self.args), self.__dict__

    def as_dict(self) -> dict[str, str | bool]:
        """The fields of ``error.json``."""
        return {
            "error": type(self).__name__,
            "found": self.found,
            "needed": self.needed,
            "do": self.do,
            "retry": self.retry,
        }


def _restore(kind: type[ManyEyesError], args: tuple[str, ...]) -> ManyEyesError:
    return kind.__new__(kind, *args)


class RecipeError(ManyEyesError):
    """A recipe, a field of one, or an override of one."""


class DataError(ManyEyesError):
    """A record, a shard, a snapshot or a mixture."""


class RecordError(DataError):
    """One sample that cannot be used."""


class SnapshotError(DataError):
    """A snapshot that is missing, incomplete or does not match its md5."""


class ValidationError(DataError):
    """The validation suite refuses the snapshot."""


class ShapeError(ManyEyesError):
    """Tensors or grids that do not fit together."""


class SourceError(ManyEyesError):
    """Pretrained parts that cannot be had or do not fit."""


class CheckpointError(ManyEyesError):
    """A checkpoint that is missing, incomplete or does not match."""


class DrawingError(ManyEyesError):
    """A text-to-image pipeline that is missing or does not fit."""


class BundleError(ManyEyesError):
    """An ONNX bundle that is missing, incomplete or does not match."""


class EvaluationError(ManyEyesError):
    """An unknown benchmark, or answers that cannot be scored."""


class ServiceError(ManyEyesError):
    """A language model behind an endpoint that refuses, or does not answer."""


class FetchError(ManyEyesError):
    """A page or an image of the web that may not be fetched, or cannot be."""


class RegistryError(ManyEyesError):
    """A model, version or alias that is not there."""


class RegistryUnreachableError(RegistryError):
    """The MLflow server or store does not answer."""

    retry_by_default = True


class StorageError(ManyEyesError):
    """No space, or no permission, where something must be written."""


class LockedError(ManyEyesError):
    """Another process owns this run or this running checkpoint."""


class PipelineError(ManyEyesError):
    """A pipeline or a step that failed, or that cannot be started."""


class ProcessLostError(PipelineError):
    """A process of several that share a step ended before its time, without an error of its own."""

    retry_by_default = True


class EndpointError(PipelineError):
    """A Kubeflow endpoint that refuses, or does not answer."""


class PreflightError(PipelineError):
    """Something that a run needs is missing or wrong.

    Args:
        problems: All of it, each as ``subject``, ``found``, ``needed`` and ``do``.
        retry: Whether waiting may fix some of it.
    """

    def __init__(self, problems: Sequence[Mapping[str, str]], *, retry: bool) -> None:
        count = f"{len(problems)} thing{'s are' if len(problems) > 1 else ' is'} wrong"
        steps = [problem["do"] for problem in problems if problem["do"]]
        super().__init__(
            f"{count}: " + "; ".join(f"{problem['subject']}: {problem['found']}" for problem in problems),
            "; ".join(problem["needed"] for problem in problems if problem["needed"]),
            steps[0] if len(steps) == 1 else " ".join(f"({place}) {step}" for place, step in enumerate(steps, start=1)),
            retry=retry,
        )
        self.problems = tuple(dict(problem) for problem in problems)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The nearest spelling as a sentence, or an empty string when none is near.

    Args:
        name: What the user wrote.
        choices: What exists.
    """
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f'Did you mean "{near[0]}"? ' if near else ""
