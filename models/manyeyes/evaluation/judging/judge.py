"""The language model that judges: a ``ChatClient`` that is called so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import final

from manyeyes.errors import EvaluationError
from manyeyes.recipe.recipe import JudgeSpec
from manyeyes.web.chat_client import ChatClient


class JudgeError(EvaluationError):
    """The judge cannot be asked at all: no key, no such model, or no answer again and again."""


@final
class Judge(ChatClient):
    """A language model that judges; may be asked from several threads.

    Args:
        spec: Where and how.
        cache: Folder for answers; nothing is kept for ``None``.
        wait: Sleeps for N seconds; ``stop`` ends the sleep when left out.

    Raises:
        JudgeError: (from ``ask``) The judge does not answer, wants another key, or knows no such model.
    """

    spec: JudgeSpec

    def __init__(
        self, spec: JudgeSpec, *, cache: Path | None = None, wait: Callable[[float], object] | None = None
    ) -> None:
        super().__init__(spec, cache=cache, wait=wait, role="judge", error=JudgeError)
