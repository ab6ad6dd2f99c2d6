"""Steps of the toy pipeline: they take no time and show what the runner makes of starts, ends, failures and hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path

from manyeyes.errors import RecordError
from manyeyes.harness.base import Reporter, Step, StepResult


def words(reporter: Reporter, *, text: str, words_out: Path) -> StepResult:
    words_out.write_text("\n".join(text.split()), encoding="utf-8")
    count = len(text.split())
    return StepResult(f"{count} words", metrics={"words": count}, values={"words": text.split()})


def letters(reporter: Reporter, *, word: str, mode: str, total_out: Path) -> StepResult:
    if mode == "fail" and word == "bad":
        raise RecordError(f'word is "{word}"', "a good word", "Take another word.")
    if mode == "crash":
        raise KeyError(word)
    if mode == "die":
        os._exit(9)
    if mode == "hang":
        Path(os.environ["TOY_PIDS"], f"{os.getpid()}").touch()
        reporter.progress("hanging", done=0.5, eta_s=60)
        time.sleep(120)
    if mode == "save":
        pid = Path(os.environ["TOY_PIDS"], f"{os.getpid()}")
        pid.touch()
        try:
            time.sleep(120)
        finally:
            time.sleep(3)
            pid.with_name(f"{pid.name}-saved").touch()
    print(f"letters of {word}")
    total_out.write_text(str(len(word)), encoding="utf-8")
    return StepResult(f"{len(word)} letters", metrics={"letters": len(word)})


WORDS = Step("words", words, tracked=False)
LETTERS = Step("letters", letters, imports=("fractions",), tracked=False)
