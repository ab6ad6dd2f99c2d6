"""Many conversations at once on one bundle: continuous batching, streaming, cancelling, and a cache of images.

::

    engine = Engine(load_bundle("bundle/"))
    for piece in engine.stream(Chat.ask("What colour is the circle?", images=[data])):
        print(piece.text, end="")
    answer = await engine.answer_async(Chat.ask("And the square?", images=[data]))
    engine.close()

One thread owns the graphs. Between two steps of the decoder it frees rows that have ended or were cancelled, and takes
in the conversation that waits longest, if it fits. A conversation is read alone (images, prefix, question) and then
written together with the others, so its answer is the one that it would get alone, up to the rounding of a sum in
another order.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from manyeyes.errors import BundleError, ManyEyesError, RecordError
from manyeyes.runtime.bundle import Bundle
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, Encoded, Turns
from manyeyes.runtime.decoding import Prefixes
from manyeyes.runtime.sampling import AnswerText, Sampling, log_probabilities, make_picker
from manyeyes.runtime.vision import ImageLike, ImageTokens, read_images

CACHE_BYTES = 2**28
"""Bytes of visual tokens and of prefixes' keys and values that an engine keeps by default."""

# Longest answers at a time, where nobody says how many tokens the batch may hold.
_ANSWERS = 8


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with a question.

    Attributes:
        turns: Speaker (``human`` or ``gpt``) and text of each turn, ``<image>`` where an image goes.
        images: Image files, in order.
        system: Replaces the bundle's system text.
        max_new_tokens: Most tokens to write; fewer where the model's length ends.
        sampling: How tokens are chosen, and when the answer ends.

    Raises:
        RecordError: ``max_new_tokens`` is below 1.
    """

    turns: Turns
    images: tuple[bytes, ...] = ()
    system: str | None = None
    max_new_tokens: int = 32
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        """Check the number of tokens."""
        if self.max_new_tokens < 1:
            raise RecordError(f"max_new_tokens is {self.max_new_tokens}", "at least 1", "Correct max_new_tokens.")

    @classmethod
    def ask(cls, question: str, *, images: ImageLike | Sequence[ImageLike] = (), **options: Any) -> Self:
        """One question, asked as ``Bundle.answer`` asks it.

        Args:
            question: Without ``<image>``.
            images: What the question is about.
            **options: Other attributes.

        Raises:
            RecordError: Something that is no image, or a question with ``<image>``.
        """
        files = read_images(images)
        return cls((("human", place_images(question, len(files))),), files, **options)


def place_images(text: str, num_images: int) -> str:
    """A turn's text with a placeholder for each of its images in front.

    Raises:
        RecordError: The text holds ``<image>`` itself.
    """
    if IMAGE_PLACEHOLDER in text:
        raise RecordError(
            f"text {text[:60]!r} holds {IMAGE_PLACEHOLDER}",
            "the placeholder is put in front for every image",
            "Leave it out.",
        )
    return f"{IMAGE_PLACEHOLDER}\n" * num_images + text


@dataclass(frozen=True)
class TokenChance:
    """A token and its log-probability.

    Attributes:
        token_id: Its id.
        logprob: Natural logarithm, before temperature and top_p.
        top: Ids and log-probabilities of the likeliest tokens at its place, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class AnswerPiece:
    """What one step adds to an answer.

    Attributes:
        text: New text; may be empty. All pieces together are the answer's text.
        token_id: The token; None for the one that ends the answer.
        chance: Its log-probability, when asked for.
        finish: Of the last piece: ``stop`` by the model or a stop text, ``length`` at the limit of tokens.
        prompt_tokens: Tokens of the conversation, images included.
        cached_tokens: How many of these came from the cache.
    """

    text: str
    token_id: int | None
    chance: TokenChance | None = None
    finish: Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class ChatAnswer:
    """A whole answer.

    Attributes:
        text: Without special tokens and surrounding white space.
        token_ids: What the model wrote, without the token that ends the answer.
        chances: Of each token, when asked for.
        finish: Why it ended.
        prompt_tokens: Tokens of the conversation, images included.
    """

    text: str
    token_ids: tuple[int, ...]
    chances: tuple[TokenChance, ...]
    finish: Finish
    prompt_tokens: int

    @classmethod
    def join(cls, pieces: Sequence[AnswerPiece]) -> Self:
        """The answer that all its pieces make."""
        last = pieces[-1]
        return cls(
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(piece.token_id for piece in pieces if piece.token_id is not None),
            chances=tuple(piece.chance for piece in pieces if piece.chance is not None),
            finish=last.finish or "length",
            prompt_tokens=last.prompt_tokens,
        )


@dataclass(frozen=True)
class EngineState:
    """What an engine does, and did since it was made.

    Attributes:
        waiting: Conversations that are not taken in yet.
        running: Answers in the batch.
        tokens: Slots of the batch that are reserved.
        max_tokens: Slots that the batch may have.
        steps: Steps of the decoder.
        written: Tokens written.
        hits: Found in the cache, by kind (``image``, ``prefix``).
        misses: Not found there, by kind.
        cache_bytes: Bytes in the cache.
    """

    waiting: int = 0
    running: int = 0
    tokens: int = 0
    max_tokens: int = 0
    steps: int = 0
    written: int = 0
    hits: Mapping[str, int] = field(default_factory=dict)
    misses: Mapping[str, int] = field(default_factory=dict)
    cache_bytes: int = 0


Deliver = Callable[[AnswerPiece | ManyEyesError], None]


class Ticket:
    """A conversation that was handed in."""

    def __init__(self, chat: Chat, deliver: Deliver) -> None:
        self.chat = chat
        self.deliver = deliver
        self.cancelled = False

    def cancel(self) -> None:
        """Free what it takes before the next step; nothing is delivered any more."""
        self.cancelled = True


@dataclass(frozen=True)
class _Prepared:
    """A conversation whose images have run."""

    ticket: Ticket
    encoded: Encoded
    images: Sequence[ImageTokens]
    digests: Sequence[bytes]
    max_new_tokens: int

    @property
    def reserved(self) -> int:
        """Tokens that its row of the cache may reach."""
        return len(self.encoded.input_ids) + self.max_new_tokens


@dataclass
class _Row:
    """One answer in the batch."""

    ticket: Ticket
    reserved: int
    length: int  # tokens in the cache
    left: int  # tokens that may still be written
    token: int
    pick: Callable[[NDArray[np.float32]], int]
    text: AnswerText
    prompt_tokens: int
    cached_tokens: int


class Engine:
    """Answers conversations as they come; make it once a bundle, and close it.

    Args:
        bundle: From ``load_bundle``.
        max_tokens: Most slots of the batch: rows, times the longest row when all have been written. By default eight of
            the longest that the model takes. A conversation waits until it fits, and none overtakes it.
        cache_bytes: Most bytes of visual tokens and of prefixes (all up to the last image) that are kept, by content.

    Raises:
        RecordError: ``max_tokens`` is below 2.
    """

    def __init__(self, bundle: Bundle, *, max_tokens: int | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        self.bundle = bundle
        self.max_tokens = _ANSWERS * bundle.max_length if max_tokens is None else max_tokens
        if self.max_tokens < 2:
            raise RecordError(f"max_tokens is {self.max_tokens}", "at least 2", "Allow more.")
        self._cache = _ByteCache(cache_bytes)
        self._waiting: deque[Ticket] = deque()
        self._head: _Prepared | None = None
        self._rows: list[_Row] = []
        self._batch: Mapping[str, ort.OrtValue] = {}
        self._steps = self._written = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="manyeyes-engine", daemon=True)
        self._thread.start()

    def submit(self, chat: Chat, deliver: Deliver) -> Ticket:
        """Hand in a conversation.

        Args:
            chat: The conversation.
            deliver: Is called from the engine's thread with each piece, or once with an error; must not block.

        Raises:
            BundleError: The engine is closed or has failed.
        """
        ticket = Ticket(chat, deliver)
        with self._changed:
            if self._closing or self._failure is not None:
                raise BundleError(
                    f"the engine has {f'failed ({self._failure})' if self._failure else 'been closed'}",
                    "one that runs",
                    "Make a new one.",
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stream(self, chat: Chat) -> Generator[AnswerPiece, None, None]:
        """Pieces of an answer as they are written; leaving the loop cancels it.

        Raises:
            ManyEyesError: The conversation cannot be answered: its images, its length, its turns.
            BundleError: The engine is closed, or a graph fails.
        """
        pieces: queue.SimpleQueue[AnswerPiece | ManyEyesError] = queue.SimpleQueue()
        ticket = self.submit(chat, pieces.put)
        try:
            while True:
                piece = _raised(pieces.get())
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ticket.cancel()

    async def stream_async(self, chat: Chat) -> AsyncGenerator[AnswerPiece, None]:
        """As ``stream``, for an event loop."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[AnswerPiece | ManyEyesError] = asyncio.Queue()

        def deliver(piece: AnswerPiece | ManyEyesError) -> None:
            with suppress(RuntimeError):  # the loop was closed, and nobody reads any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        ticket = self.submit(chat, deliver)
        try:
            while True:
                piece = _raised(await pieces.get())
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ticket.cancel()

    def answer(self, chat: Chat) -> ChatAnswer:
        """The whole answer. Raises as ``stream``."""
        return ChatAnswer.join(list(self.stream(chat)))

    async def answer_async(self, chat: Chat) -> ChatAnswer:
        """The whole answer. Raises as ``stream``."""
        return ChatAnswer.join([piece async for piece in self.stream_async(chat)])

    def state(self) -> EngineState:
        """What it does now."""
        with self._changed:
            rows = [row.reserved for row in self._rows]
            return EngineState(
                waiting=len(self._waiting) + (self._head is not None),
                running=len(rows),
                tokens=len(rows) * max(rows, default=0),
                max_tokens=self.max_tokens,
                steps=self._steps,
                written=self._written,
                hits=dict(self._cache.hits),
                misses=dict(self._cache.misses),
                cache_bytes=self._cache.size,
            )

    @property
    def alive(self) -> bool:
        """Whether conversations are taken."""
        return not self._closing and self._failure is None

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Take no more conversations, and finish those that were taken.

        Args:
            timeout_s: After this long the rest is given up with an error; None waits for all.

        Returns:
            Whether all were finished.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            if self._thread.is_alive() and self._failure is None:
                self._failure = BundleError("the engine was closed before the answer was whole", "time", "Ask again.")
        self._thread.join()
        return self._failure is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while self._wait():
                self._free()
                self._take_in()
                self._step()
        # Whatever it is, nobody may wait for an answer that never comes.
        except BaseException as error:  # noqa: BLE001
            self._failure = error
        if self._failure is not None:
            self._give_up(self._failure)

    def _wait(self) -> bool:
        """Wait for work; whether there is any, or will be."""
        with self._changed:
            while not (self._waiting or self._head or self._rows or self._closing or self._failure):
                self._changed.wait()
            return self._failure is None and bool(self._waiting or self._head or self._rows)

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            left = [*(row.ticket for row in self._rows), *self._waiting]
            left += [] if self._head is None else [self._head.ticket]
            self._waiting.clear()
            self._rows, self._batch, self._head = [], {}, None
        if not isinstance(error, ManyEyesError):
            error = BundleError(f"the engine failed ({error!r})", "a bundle that answers", "Load it again.")
        for ticket in left:
            if not ticket.cancelled:
                ticket.deliver(error)

    def _free(self) -> None:
        """Let go of what was cancelled."""
        with self._changed:
            if any(ticket.cancelled for ticket in self._waiting):
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            if self._head is not None and self._head.ticket.cancelled:
                self._head = None
        kept = [place for place, row in enumerate(self._rows) if not row.ticket.cancelled]
        if len(kept) < len(self._rows):
            self._keep(kept)

    def _keep(self, kept: Sequence[int]) -> None:
        sources, most = self._sources(), max((self._rows[place].reserved for place in kept), default=0)
        batch = self.bundle.decoder.arrange([sources[place] for place in kept], most=most) if kept else {}
        with self._changed:
            self._rows, self._batch = [self._rows[place] for place in kept], batch

    def _sources(self) -> list[tuple[Mapping[str, ort.OrtValue], int, slice]]:
        """Where the keys and values of each row are: their ends stand at one slot."""
        end = max((row.length for row in self._rows), default=0)
        return [(self._batch, place, slice(end - row.length, end)) for place, row in enumerate(self._rows)]

    def _take_in(self) -> None:
        """Read the conversation that waits longest, if there is room for it."""
        with self._changed:
            ticket = self._waiting.popleft() if self._head is None and self._waiting else None
        if ticket is not None:
            try:
                self._head = self._prepare(ticket)
            except ManyEyesError as error:
                ticket.deliver(error)
        head = self._head
        if head is None:
            return
        longest = max([head.reserved, *(row.reserved for row in self._rows)])
        if (len(self._rows) + 1) * longest > self.max_tokens:
            return
        self._head = None
        try:
            self._admit(head)
        except ManyEyesError as error:
            head.ticket.deliver(error)

    def _prepare(self, ticket: Ticket) -> _Prepared:
        chat = ticket.chat
        digests = [hashlib.sha256(image).digest() for image in chat.images]
        found = {digest: self._cache.find("image", digest) for digest in digests}
        missing = {digest: image for digest, image in zip(digests, chat.images, strict=True) if found[digest] is None}
        made = self.bundle.encode_images(list(missing.values()))
        for digest, image in zip(missing, made, strict=True):
            found[digest] = image
            self._cache.keep("image", digest, image, size=_image_size(image))
        images = [found[digest] for digest in digests]
        encoded = self.bundle.encode_chat(chat.turns, images, system=chat.system)
        length = len(encoded.input_ids)
        prepared = _Prepared(
            ticket, encoded, images, digests, min(chat.max_new_tokens, self.bundle.max_length - length)
        )
        if prepared.reserved > self.max_tokens:
            raise RecordError(
                f"{length} tokens are asked and up to {prepared.max_new_tokens} answered",
                f"{self.max_tokens} together is all that this engine has room for",
                "Ask for a shorter answer, or give it more max_tokens.",
            )
        return prepared

    def _admit(self, head: _Prepared) -> None:
        encoded, decoder, sampling = head.encoded, self.bundle.decoder, head.ticket.chat.sampling
        prefixes, cached = self._run_prefix(head)
        logits, cache = decoder.start(prefixes, encoded.input_ids[encoded.prefix_length :])
        row = _Row(
            ticket=head.ticket,
            reserved=head.reserved,
            length=len(encoded.input_ids),
            left=head.max_new_tokens,
            token=0,
            pick=make_picker(sampling),
            text=AnswerText(self.bundle.decode_text, stop=sampling.stop),
            prompt_tokens=len(encoded.input_ids),
            cached_tokens=cached,
        )
        if not self._write(row, logits):
            return
        most = max(other.reserved for other in (*self._rows, row))
        batch = decoder.arrange([*self._sources(), (cache, 0, slice(0, row.length))], most=most)
        with self._changed:
            self._rows, self._batch = [*self._rows, row], batch

    def _run_prefix(self, head: _Prepared) -> tuple[Prefixes, int]:
        """The prefix of a conversation, and how many tokens of it came from the cache."""
        encoded = head.encoded
        ids = encoded.input_ids[: encoded.prefix_length]
        if not ids:
            return self.bundle.decoder.run_prefixes([[]], [[]], [[]]), 0
        # Tokens at images are all the same id, so the images' own digests tell prefixes apart.
        key = hashlib.sha256(np.array(ids, np.int64).tobytes() + b"".join(head.digests)).digest()
        found = self._cache.find("prefix", key)
        if found is not None:
            return found, len(ids)
        prefixes = self.bundle.decoder.run_prefixes([ids], [head.images], [encoded.image_spans])
        size = sum(value.tensor_size_in_bytes() for value in prefixes.cache.values())
        self._cache.keep("prefix", key, prefixes, size=size)
        return prefixes, 0

    def _step(self) -> None:
        if not self._rows:
            return
        tokens, lengths = [row.token for row in self._rows], [row.length for row in self._rows]
        try:
            most = max(row.reserved for row in self._rows)
            logits, self._batch = self.bundle.decoder.go_on(tokens, self._batch, lengths, most)
            self._steps += 1
            kept = []
            for place, row in enumerate(self._rows):
                row.length += 1
                if self._write(row, logits[place]):
                    kept.append(place)
        except ManyEyesError as error:
            for row in self._rows:
                row.ticket.deliver(error)
            kept = []
        if len(kept) < len(self._rows):
            self._keep(kept)

    def _write(self, row: _Row, logits: NDArray[np.float32]) -> bool:
        """Choose a row's next token and deliver it; whether the answer goes on."""
        logits = np.asarray(logits, np.float32)
        token = row.pick(logits)
        piece = AnswerPiece("", None, None, "stop", row.prompt_tokens, row.cached_tokens)
        if token not in self.bundle.decoder.stop_ids:
            row.token, row.left = token, row.left - 1
            self._written += 1
            text = row.text.add(token)
            finish: Finish | None = "stop" if row.text.stopped else "length" if row.left == 0 else None
            chance = _chance(logits, token, row.ticket.chat.sampling.top_logprobs)
            piece = replace(piece, text=text, token_id=token, chance=chance, finish=finish)
        if piece.finish is not None:
            piece = replace(piece, text=piece.text + row.text.finish())
        if not row.ticket.cancelled:
            row.ticket.deliver(piece)
        return piece.finish is None


def _raised(piece: AnswerPiece | ManyEyesError) -> AnswerPiece:
    if isinstance(piece, ManyEyesError):
        raise piece
    return piece


def _chance(logits: NDArray[np.float32], token: int, top: int | None) -> TokenChance | None:
    if top is None:
        return None
    values = log_probabilities(logits)
    best = np.argsort(-values, kind="stable")[:top].tolist() if top else []
    return TokenChance(token, float(values[token]), tuple((place, float(values[place])) for place in best))


def _image_size(image: ImageTokens) -> int:
    return image.tokens.nbytes + image.looks.nbytes + sum(values.nbytes for values in image.windows.values())


class _ByteCache:
    """Keeps what was used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, bytes], tuple[Any, int]] = OrderedDict()
        self.size = 0
        self.hits = {"image": 0, "prefix": 0}
        self.misses = {"image": 0, "prefix": 0}

    def find(self, kind: str, key: bytes) -> Any:
        kept = self._kept.get((kind, key))
        (self.misses if kept is None else self.hits)[kind] += 1
        if kept is None:
            return None
        self._kept.move_to_end((kind, key))
        return kept[0]

    def keep(self, kind: str, key: bytes, value: Any, *, size: int) -> None:
        self._kept[kind, key] = (value, size)
        self.size += size
        while self.size > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self.size -= freed
