"""A model for the processes of an answerer pool: answers by rule; ends, sleeps or fails where a question says so."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manyeyes.errors import CheckpointError, RecordError
from manyeyes.evaluation.answering.answerers import AnsweredBatch, answer_in_turn
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.runtime.bundle import GeneratedAnswer, Group


@dataclass(frozen=True)
class PoolSpec:
    """What the processes build.

    Attributes:
        folder: Gets one file a process, named by its id, with a line a question that it began to answer.
        pause_s: Before each batch.
        together: Waits until N processes are there, so that none answers all before the others are ready.
        broken: Refuses to be built with an error; ``killed`` ends the process instead.
    """

    folder: Path
    pause_s: float = 0.0
    together: int = 1
    broken: str = ""
    kind: ModelKind = "torch"
    threads: int | None = 1

    def build(self) -> PoolAnswerer:
        if self.broken == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.broken:
            raise CheckpointError("no checkpoint", "one", self.broken)
        (self.folder / str(os.getpid())).touch()
        while len(asked(self.folder)) < self.together:
            time.sleep(0.01)
        return PoolAnswerer(self.folder, self.pause_s)


class PoolAnswerer:
    """Answers with the question and what its images hash to.

    A question may say what happens: ``die SIGNAL [once]``, ``sleep SECONDS``, ``refuse``, ``environment NAME``.
    """

    name: ModelKind = "torch"

    def __init__(self, folder: Path, pause_s: float) -> None:
        self.folder = folder
        self.pause_s = pause_s
        self.image_counts = ImageCounts()

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        time.sleep(self.pause_s)
        self.image_counts += ImageCounts(encoded=sum(len(group.images) for group in groups))
        return [[self._answer(group, question, max_new_tokens) for question in group.questions] for group in groups]

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        return answer_in_turn(self, batches, max_new_tokens=max_new_tokens)

    def _answer(self, group: Group, question: str, max_new_tokens: int) -> GeneratedAnswer:
        with (self.folder / str(os.getpid())).open("a") as file:
            file.write(f"{question}\n")
        match question.split():
            case ["die", name, *once]:
                marker = self.folder / "died-once"
                if not once or not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.Signals[name])
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["refuse"]:
                raise RecordError("a broken image", "an image", "Leave it out.")
            case ["environment", name]:
                return GeneratedAnswer(os.environ.get(name, ""), ())
        sha256 = hashlib.sha256(b"".join(group.images)).hexdigest()[:8]
        return GeneratedAnswer(f"{sha256} {question}", (max_new_tokens,))


def asked(folder: Path) -> dict[int, list[str]]:
    """The questions that each process began to answer, by its id."""
    return {
        int(file.name): file.read_text(encoding="utf-8").splitlines()
        for file in folder.iterdir()
        if file.name.isdecimal()
    }
