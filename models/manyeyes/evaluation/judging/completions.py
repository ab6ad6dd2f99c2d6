"""One answer of an OpenAI-compatible service, as it comes over the wire: too slow, endless, redirected or no answer.

Source: OpenAI's chat completions, which vLLM, SGLang, Ollama, llama.cpp and most providers speak.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.request
from dataclasses import dataclass
from email.message import Message as Headers
from typing import IO, Any

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
    """

    text: str
    model: str
    prompt_tokens: int
    answer_tokens: int


class AskAgainError(Exception):
    """Worth another request, after a wait of so many seconds where the service says so."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


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
            raise AskAgainError("it is too slow")
        if len(content) > _LONGEST_REPLY:
            raise AskAgainError("its answer does not end")
    return content


def read_reply(content: bytes) -> Reply:
    """What a body says.

    Raises:
        AskAgainError: It is no chat completion.
    """
    try:
        reply: Any = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        model = str(reply.get("model") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise AskAgainError(f"its answer is no chat completion: {content[:80]!r}") from error
    # A refusal and a filtered answer come with no content; a reasoning model's thoughts may come with it.
    return Reply(_THOUGHTS.sub("", str(text or "")), model, max(0, tokens[0]), max(0, tokens[1]))


def retry_after(headers: Headers) -> float | None:
    """Seconds that the service asks to wait; dates, which few send, are left to our own waits."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
