"""Asks a language model behind an OpenAI-compatible endpoint, and keeps what it answered.

The service may be away, busy, slow or refuse a question; an answer may make no sense. None of that becomes a value:
``ChatClient.ask`` returns what was read, or says why there is nothing.

Answers that could be read are cached by content (endpoint, model, temperature, messages), so that a run that was
stopped, or another one on the same questions, asks only what is new. So are those that could not be read, where the
client is told to; they are then not asked again.

A service that is busy is asked less at a time: half as much after each refusal, and one request more after each round
of answers (additive increase, multiplicative decrease, as TCP does), up to the number that the caller allows.

Money is reserved before a request and settled behind it, so that what is spent never goes above the cap: of a request
that is under way, the most counts that it can cost, one token a byte of its text and all tokens that it may answer.

Source: the request and the reply are those of OpenAI's chat completions, which vLLM, SGLang, Ollama, llama.cpp and
most providers speak.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message as Headers
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import pydantic
from pydantic import Field

from manyeyes.errors import ManyEyesError, ServiceError
from manyeyes.recipe.service import ServiceSpec
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel
from manyeyes.web.purse import Purse

_LONGEST_REPLY = 4 << 20
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        text: What was answered, without a reasoning model's thoughts; may be empty.
        model: The service's name for it; may be empty.
        prompt_tokens: As the service counts them.
        answer_tokens: As the service counts them.
        cut_off: Why it ended before its end, in the service's word; empty where it did not.
    """

    text: str
    model: str
    prompt_tokens: int
    answer_tokens: int
    cut_off: str = ""


class AskAgainError(Exception):
    """Worth another request.

    Attributes:
        wait_s: Seconds to wait, where the service says so.
        may_cost: Whether the service may have answered, and counts that.
    """

    def __init__(self, reason: str, wait_s: float | None = None, *, may_cost: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.may_cost = may_cost


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another service."""

    def redirect_request(
        self,
        req: urllib.request.Request,  # noqa: ARG002
        fp: IO[bytes],  # noqa: ARG002
        code: int,  # noqa: ARG002
        msg: str,  # noqa: ARG002
        headers: Headers,  # noqa: ARG002
        newurl: str,  # noqa: ARG002
    ) -> None:
        """None: the redirect is an answer like any other."""
        return


def read_until(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body; a service that sends a byte now and then does not hold us for ever.

    Args:
        answer: Of the service.
        deadline: By ``time.monotonic``; seconds.

    Raises:
        AskAgainError: It is later, or the body does not end.
    """
    content = b""
    while chunk := answer.read1(1 << 16):
        content += chunk
        if time.monotonic() > deadline:
            raise AskAgainError("it is too slow", may_cost=True)
        if len(content) > _LONGEST_REPLY:
            raise AskAgainError("its answer does not end", may_cost=True)
    return content


def read_reply(content: bytes) -> Reply:
    """What a body says.

    Raises:
        AskAgainError: It is no chat completion.
    """
    try:
        reply: Any = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
        ended = str(reply["choices"][0].get("finish_reason") or "stop")
        usage = reply.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        model = str(reply.get("model") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise AskAgainError(f"its answer is no chat completion: {content[:80]!r}", may_cost=True) from error
    # A refusal and a filtered answer come with no content; a reasoning model's thoughts may come with it.
    # JSON can hold half of a surrogate pair, which no file can.
    said = _THOUGHTS.sub("", str(text or "")).encode(errors="replace").decode()
    return Reply(said, model, max(0, tokens[0]), max(0, tokens[1]), "" if ended in _ENDED else ended)


def retry_after(headers: Headers) -> float | None:
    """Seconds that the service asks to wait; dates, which few send, are left to our own waits."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


T = TypeVar("T")
Q = TypeVar("Q")

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``role`` and ``content`` of each turn."""

_WARMER = 0.5
"""Added to the temperature where an answer made no sense, as MM-Vet's evaluator does: the same again would be."""

_HOTTEST = 2.0
_LONGEST_WAIT_S = 60.0
_BUSY = (408, 409, 425, 429)
_REFUSED_KEY = (401, 403)
_FAILURES_IN_A_ROW = 3
_ENDED = ("stop", "eos", "end_turn", "stop_sequence")
_AHEAD = 4
"""Questions a worker that are under way or wait to be taken; the others are not made yet."""


class ServiceUse(StrictModel):
    """What a language model behind an endpoint was asked, and what it took."""

    endpoint: str = Field(description="Address of the service, without its key.")
    model: str = Field(description="Name that was asked for.")
    served: list[str] = Field(description="Names that the service gave for itself, sorted.")
    requests: int = Field(ge=0, description="Sent, repeated ones too.")
    cached: int = Field(ge=0, description="Questions answered from the cache, without a request.")
    retried: int = Field(ge=0, description="Requests that had to be sent again: away, busy or too slow.")
    unreadable: int = Field(ge=0, description="Answers that made no sense.")
    prompt_tokens: int = Field(ge=0, description="As the service counts them; in this run.")
    answer_tokens: int = Field(ge=0, description="As the service counts them; in this run.")
    cost: float | None = Field(description="Of this run, in the currency of the prices; null without prices.")

    def in_words(self) -> str:
        """One line for people."""
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        served = f" ({', '.join(self.served)})" if self.served else ""
        return (
            f"{self.model}{served}: {self.requests:,} requests, {self.cached:,} from the cache, {self.retried:,} sent "
            f"again, {self.unreadable:,} unreadable, {self.prompt_tokens:,} + {self.answer_tokens:,} tokens{cost}"
        )


def add_uses(uses: Sequence[ServiceUse]) -> ServiceUse | None:
    """What several runs with one service took together; ``None`` without any, the first one's names."""
    if not uses:
        return None
    counts = ("requests", "cached", "retried", "unreadable", "prompt_tokens", "answer_tokens")
    costs = [use.cost for use in uses if use.cost is not None]
    return uses[0].model_copy(
        update={
            **{name: sum(getattr(use, name) for use in uses) for name in counts},
            "served": sorted({name for use in uses for name in use.served}),
            "cost": sum(costs) if costs else None,
        }
    )


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What came of asking.

    Attributes:
        value: What was read from the answer; ``None`` where there is none.
        text: The answer.
        reason: Why there is no value; empty where there is one.
        model: The service's name for itself; may be empty.
    """

    value: T | None
    text: str = ""
    reason: str = ""
    model: str = field(default="", compare=False)


class _Kept(StrictModel):
    """What was answered to one question, the last time, and what all answers to it took."""

    text: str
    model: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cut_off: str = ""
    readings: int = 1


class _RefusedError(Exception):
    """The service does not take this question."""


@dataclass
class _Counts:
    requests: int = 0
    cached: int = 0
    retried: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    failures_in_a_row: int = 0
    answered: int = 0
    refused: int = 0
    served: set[str] = field(default_factory=set)


class _Pace:
    """How many requests are under way at a time: fewer where the service is in trouble, more while answers come."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._under_way = 0
        self._lowered = 0.0
        self._free = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until another request may be sent; it is under way until the block ends."""
        with self._free:
            self._free.wait_for(lambda: self._under_way < int(self._limit))
            self._under_way += 1
        try:
            yield
        finally:
            with self._free:
                self._under_way -= 1
                self._free.notify_all()

    def raise_limit(self) -> None:
        """An answer came."""
        with self._free:
            self._limit = min(self._most, self._limit + 1 / self._limit)

    def lower_limit(self, sent: float) -> None:
        """A request that was sent at a time got none; those that were under way together lower the limit once."""
        with self._free:
            if sent > self._lowered:
                self._limit = max(1.0, self._limit / 2)
                self._lowered = time.monotonic()


class ChatClient:
    """A language model to ask; may be asked from several threads.

    Args:
        spec: Where and how.
        cache: Folder for answers; nothing is kept for ``None``.
        wait: Sleeps for N seconds; ``stop`` ends the sleep when left out.
        role: What the model is to the user, for messages.
        error: What is raised where it cannot be asked at all.
        keep_unreadable: Whether answers that cannot be read are kept too, and their questions not asked again.

    Raises:
        ManyEyesError: (from ``ask``) ``error``: the service does not answer, wants another key, knows no such model, or
            would cost more than it may.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        *,
        cache: Path | None = None,
        wait: Callable[[float], object] | None = None,
        role: str = "language model",
        error: type[ManyEyesError] = ServiceError,
        keep_unreadable: bool = False,
    ) -> None:
        self.spec = spec
        self._cache = cache
        self._stopped = threading.Event()
        self._wait = self._stopped.wait if wait is None else wait
        self._role = role
        self._error = error
        self._keep_unreadable = keep_unreadable
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._pace = _Pace(spec.concurrency)
        self._purse = Purse(spec)
        self._next_request = 0.0
        self._jitter = random.Random(0)
        self._opener = urllib.request.build_opener(NoRedirects)

    @property
    def use(self) -> ServiceUse:
        """What it took so far."""
        counts, spec = self._counts, self.spec
        return ServiceUse(
            endpoint=spec.endpoint,
            model=spec.model,
            served=sorted(counts.served),
            requests=counts.requests,
            cached=counts.cached,
            retried=counts.retried,
            unreadable=counts.unreadable,
            prompt_tokens=counts.prompt_tokens,
            answer_tokens=counts.answer_tokens,
            cost=self._purse.spent,
        )

    @property
    def spent(self) -> float | None:
        """Cost of this run and of the answers that earlier ones paid for and this one used; ``None`` without prices."""
        return self._purse.total

    def price(self, prompt_tokens: int, answer_tokens: int) -> float | None:
        """What a number of tokens costs; ``None`` without prices."""
        return self._purse.price(prompt_tokens, answer_tokens)

    def stop(self) -> None:
        """Ask nothing more: every question from now on, and those that wait, is refused."""
        self._stopped.set()

    def knows(self, messages: Messages, *, temperature: float, max_tokens: int) -> bool:
        """Whether an answer is kept, so that asking would cost nothing."""
        return self._read_kept(self._key(messages, self._first(temperature), max_tokens)) is not None

    def ask(
        self,
        messages: Messages,
        *,
        read: Callable[[str], T | None],
        temperature: float,
        max_tokens: int,
        whole: bool = False,
    ) -> Verdict[T]:
        """Ask until an answer can be read.

        Args:
            messages: The conversation.
            read: What an answer says; ``None`` where it makes no sense, and the model is asked again, warmer.
            temperature: Of the first try, unless the service's own is set.
            max_tokens: Longest answer.
            whole: Whether an answer that was cut off cannot be read.

        Raises:
            ManyEyesError: The service cannot be asked at all, or another request would cost more than is left.
        """

        def understand(reply: _Kept) -> T | None:
            return None if whole and reply.cut_off else read(reply.text)

        first = self._first(temperature)
        key = self._key(messages, first, max_tokens)
        kept = self._read_kept(key)
        if kept is not None:
            value = understand(kept)
            if value is not None or (self._keep_unreadable and kept.readings >= self.spec.readings):
                self._purse.add_earlier(kept.prompt_tokens, kept.answer_tokens)
                with self._lock:
                    self._counts.cached += 1
                    self._counts.served.add(kept.model)
                return Verdict(value, kept.text, "" if value is not None else _nonsense(kept), kept.model)
        kept = None
        for reading in range(self.spec.readings):
            warmth = max(first, min(first + reading * _WARMER, _HOTTEST))
            try:
                reply = self._request(messages, warmth, max_tokens)
            except _RefusedError as refusal:
                return Verdict(None, "" if kept is None else kept.text, str(refusal))
            kept = _Kept(
                text=reply.text,
                model=reply.model,
                prompt_tokens=reply.prompt_tokens + (kept.prompt_tokens if kept else 0),
                answer_tokens=reply.answer_tokens + (kept.answer_tokens if kept else 0),
                cut_off=reply.cut_off,
                readings=reading + 1,
            )
            value = understand(kept)
            if value is not None or self._keep_unreadable:
                self._keep(key, kept)
            if value is not None:
                return Verdict(value, kept.text, model=kept.model)
            with self._lock:
                self._counts.unreadable += 1
        assert kept is not None
        return Verdict(None, kept.text, _nonsense(kept), kept.model)

    def probe(self) -> str:
        """Ask for one token, once, to see whether the model can be asked at all.

        Returns:
            The model's name for itself; may be empty.

        Raises:
            ManyEyesError: It does not answer, or not to this key and model; ``retry`` where it may later.
        """
        messages = [{"role": "user", "content": "Answer with OK."}]
        try:
            return self._send(self._body(messages, self.spec.temperature or 0.0, 1)).model
        except (AskAgainError, _RefusedError) as error:
            raise self._error(
                f"{self.spec.endpoint} gives no answer: {error}",
                f'a {self._role} that answers as "{self.spec.model}"',
                "Check the address, which ends with its version (/v1), and the model's name.",
                retry=isinstance(error, AskAgainError),
            ) from error

    def _first(self, temperature: float) -> float:
        return temperature if self.spec.temperature is None else self.spec.temperature

    def _body(self, messages: Messages, temperature: float, max_tokens: int) -> bytes:
        body = {"model": self.spec.model, "messages": list(messages), "temperature": temperature}
        return json.dumps({**body, "max_tokens": max_tokens}).encode()

    def _request(self, messages: Messages, temperature: float, max_tokens: int) -> Reply:
        data = self._body(messages, temperature, max_tokens)
        reason = ""
        for attempt in range(self.spec.attempts):
            try:
                reply = self._send_in_turn(data, max_tokens)
            except AskAgainError as again:
                reason = str(again)
                if attempt + 1 < self.spec.attempts:
                    with self._lock:
                        self._counts.retried += 1
                        spread = self._jitter.uniform(0.5, 1.5)
                    self._wait(min(again.wait_s if again.wait_s is not None else 2**attempt * spread, _LONGEST_WAIT_S))
                continue
            with self._lock:
                self._counts.failures_in_a_row = 0
                self._counts.answered += 1
                self._counts.prompt_tokens += reply.prompt_tokens
                self._counts.answer_tokens += reply.answer_tokens
                if reply.model:
                    self._counts.served.add(reply.model)
            return reply
        with self._lock:
            self._counts.failures_in_a_row += 1
            failures = self._counts.failures_in_a_row
        if failures >= _FAILURES_IN_A_ROW:
            raise self._error(
                f"{self.spec.endpoint} gave no answer to {failures} questions in a row, {self.spec.attempts} requests "
                f"each; the last: {reason}",
                f"a {self._role} that answers",
                "Wait, or check the endpoint, then run the same command again: what was answered is not asked again.",
                retry=True,
            )
        raise _RefusedError(f"no answer after {self.spec.attempts} requests: {reason}")

    def _send_in_turn(self, data: bytes, max_tokens: int) -> Reply:
        """One request, when the rate, the service's pace and the money allow it."""
        with self._pace.turn():
            self._take_turn()
            if self._stopped.is_set():
                raise _RefusedError("stopped")
            most = self._purse.reserve(len(data), max_tokens)
            if most is None:
                raise self._error(
                    f"{self._purse.spent:.4f} is spent, and another question may cost more than what is left of "
                    f"{self.spec.max_cost:g}",
                    "a higher limit",
                    "Raise max_cost, then run the same command again: what was answered is not paid for again.",
                )
            sent = time.monotonic()
            cost: float | None = 0.0
            try:
                reply = self._send(data)
                counted = reply.prompt_tokens or reply.answer_tokens
                cost = self._purse.price(reply.prompt_tokens, reply.answer_tokens) if counted else most
            except AskAgainError as again:
                cost = most if again.may_cost else 0.0
                self._pace.lower_limit(sent)
                raise
            finally:
                self._purse.settle(most, cost)
            self._pace.raise_limit()
            return reply

    def _send(self, data: bytes) -> Reply:
        """One request.

        Raises:
            AskAgainError: Away, busy, too slow, or no chat completion.
            _RefusedError: This question is not taken.
            ManyEyesError: No question is.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(self.spec.key_from, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.spec.endpoint}/chat/completions", data=data, headers=headers)
        with self._lock:
            self._counts.requests += 1
        deadline = time.monotonic() + self.spec.timeout_s
        try:
            with self._opener.open(request, timeout=self.spec.timeout_s) as answer:
                content = read_until(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                self._say_status(error)
        except (OSError, http.client.HTTPException) as error:
            # urllib wraps some of these in URLError, which is an OSError.
            reason = getattr(error, "reason", error)
            never_sent = isinstance(reason, (ConnectionRefusedError, socket.gaierror))
            raise AskAgainError(str(reason) or type(error).__name__, may_cost=not never_sent) from error
        return read_reply(content)

    def _say_status(self, error: urllib.error.HTTPError) -> None:
        said = error.read(2000).decode(errors="replace").strip()[:300]
        if error.code in _BUSY or error.code >= 500:
            raise AskAgainError(f"it answers {error.code}", retry_after(error.headers))
        if error.code in _REFUSED_KEY:
            raise self._error(
                f"{self.spec.endpoint} answers {error.code} ({said})",
                "a key that it takes",
                f"Put the key into the environment variable {self.spec.key_from}.",
            )
        with self._lock:
            self._counts.refused += 1
            takes_none = self._counts.answered == 0 and self._counts.refused >= _FAILURES_IN_A_ROW
        request = f"{self.spec.endpoint}/chat/completions"
        if error.code == 404 or 300 <= error.code < 400 or takes_none:
            raise self._error(
                f'{request} answers {error.code} for the model "{self.spec.model}" ({said})',
                "an OpenAI-compatible endpoint that has the model",
                "Check the address, which ends with its version (/v1), and the model's name.",
            )
        raise _RefusedError(f"it answers {error.code}: {said}")

    def _take_turn(self) -> None:
        """Wait until the rate limit allows another request."""
        if self.spec.requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next_request)
            self._next_request = turn + 60 / self.spec.requests_per_minute
        if turn > now:
            self._wait(turn - now)

    def _key(self, messages: Messages, temperature: float, max_tokens: int) -> str:
        parts = {
            "endpoint": self.spec.endpoint,
            "model": self.spec.model,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "messages": [dict(message) for message in messages],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _read_kept(self, key: str) -> _Kept | None:
        if self._cache is None:
            return None
        try:
            return _Kept.model_validate_json((self._cache / key[:2] / f"{key}.json").read_bytes())
        except FileNotFoundError:
            return None
        except pydantic.ValidationError:
            # Files are written whole, so this one was touched by something else: the model is asked again.
            return None

    def _keep(self, key: str, kept: _Kept) -> None:
        if self._cache is not None:
            write_file(self._cache / key[:2] / f"{key}.json", kept.model_dump_json())


def _nonsense(kept: _Kept) -> str:
    if kept.cut_off:
        return f"the answer was cut off ({kept.cut_off})"
    return f"{kept.readings} answers made no sense, the last: {kept.text[:80]!r}"


def ask_each(ask: Callable[[Q], T], questions: Iterable[Q], client: ChatClient) -> Iterator[T]:
    """Ask questions, as many at a time as the client may; where one raises, the others are given up.

    Args:
        ask: Asks the client about one of them.
        questions: In order; taken a little ahead of the answers, so there may be any number.
        client: Is asked.

    Yields:
        What ``ask`` returned for each, in order.
    """
    workers = client.spec.concurrency
    under_way: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="ask") as pool:
        try:
            for question in questions:
                under_way.append(pool.submit(ask, question))
                if len(under_way) > _AHEAD * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BaseException:
            client.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
