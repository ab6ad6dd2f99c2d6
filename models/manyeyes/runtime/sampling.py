"""From logits to a token, and from tokens to the text that may be shown so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manyeyes.errors import RecordError

MOST_TOP_LOGPROBS = 20
_UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character
# Candidates for top_p that are sorted first; nearly always they hold the whole nucleus, and sorting a vocabulary of
# 150,000 takes as long as a step of a small model.
_CANDIDATES = 1024


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when an answer ends.

    Attributes:
        temperature: 0 takes the likeliest token; above 0, logits are divided by it and a token is drawn.
        top_p: Only the likeliest tokens that together have this probability are drawn from.
        seed: Makes the drawing repeatable; None draws anew each time.
        stop: Texts that end an answer; neither they nor what follows is part of it.
        top_logprobs: How many of the likeliest tokens are told of, with each token's log-probability (before
            temperature and top_p); None for no log-probabilities.

    Raises:
        RecordError: A value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, fits, needed in (
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "a number from 0 to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, up to 1"),
            ("stop", self.stop, all(self.stop), "texts that are not empty"),
            (
                "top_logprobs",
                self.top_logprobs,
                self.top_logprobs is None or 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS,
                f"a whole number from 0 to {MOST_TOP_LOGPROBS}",
            ),
        ):
            if not fits:
                raise RecordError(f"{name} is {value!r:.60}", f"{needed} is needed", f"Correct {name}.")


def make_picker(sampling: Sampling) -> Callable[[NDArray[np.float32]], int]:
    """A function from ``[V]`` logits to the next token; one for each answer, because it draws in sequence.

    An answer's draws depend on its seed alone, not on what else is in the batch.
    """
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**64)

    def pick(logits: NDArray[np.float32]) -> int:
        scaled = logits.astype(np.float64) / sampling.temperature
        chances = np.exp(scaled - scaled.max())
        chances /= chances.sum()
        tokens = np.arange(len(chances)) if sampling.top_p == 1 else _nucleus(chances, sampling.top_p)
        summed = chances[tokens].cumsum()
        place = int(np.searchsorted(summed, generator.random() * summed[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])

    return pick


def _nucleus(chances: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """The likeliest tokens that have ``top_p`` together, likeliest first."""
    for count in (min(_CANDIDATES, len(chances)), len(chances)):
        kept = np.arange(len(chances))
        if count < len(chances):
            kept = np.flatnonzero(chances >= np.partition(chances, -count)[-count])
        kept = kept[np.argsort(-chances[kept], kind="stable")]
        summed = chances[kept].cumsum()
        if summed[-1] >= top_p:
            break
    return kept[: int(np.searchsorted(summed, top_p)) + 1]


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """``[V]``, natural logarithms."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


class AnswerText:
    """The text of an answer as it grows; what was shown once is never taken back.

    White space at the end, unfinished characters and what may be the start of a stop text are held back. All that is
    shown, put together, is the stripped text of the whole answer, cut before the first stop text.

    Args:
        decode: Token ids to text.
        stop: Texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = ""
        self.stopped = False
        """Whether a stop text was written."""

    def add(self, token: int) -> str:
        """Text that can be shown now that one more token is written."""
        self._ids.append(token)
        text = self._decode(self._ids)
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._show(text[: min(found)].strip())
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return self._show(text[: len(text) - held].rstrip(_UNFINISHED).strip())

    def finish(self) -> str:
        """What was held back and belongs to the answer, once no more tokens come."""
        return "" if self.stopped or not self._ids else self._show(self._decode(self._ids).strip())

    def _show(self, text: str) -> str:
        # Some decoders rewrite the end of a text when more follows: what is out stays, and the rest waits.
        if not text.startswith(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
