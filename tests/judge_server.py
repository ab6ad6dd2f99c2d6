"""A small OpenAI-compatible server that answers from a script: it also fails, stalls and talks nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.web_server import QuietHandler, serve_on_loopback

Say = Callable[[dict[str, Any], int], "str | Trouble"]
"""(request body, how often this very question was asked before) to the answer's text, or trouble."""


@dataclass(frozen=True)
class Trouble:
    """What the server does instead of answering."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    stall_s: float = 0.0
    drip_s: float = 0.0
    hang_up: bool = False


@dataclass
class JudgeServer:
    """The server's address and what it was asked."""

    endpoint: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def temperatures(self) -> list[float]:
        return [body["temperature"] for body in self.bodies]


@contextmanager
def judge_server(say: Say) -> Iterator[JudgeServer]:
    """Serve until the block ends."""
    times: dict[str, int] = {}
    lock = threading.Lock()
    closing = threading.Event()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = json.dumps(body["messages"])
            with lock:
                served.bodies.append(body)
                served.keys.append(self.headers.get("Authorization"))
                before = times.get(question, 0)
                times[question] = before + 1
            if self.path != "/v1/chat/completions":
                answer: str | Trouble = Trouble(status=404, body=b"no such page")
            else:
                answer = say(body, before)
            if isinstance(answer, Trouble):
                self.make_trouble(answer)
                return
            self.reply(200, {}, json.dumps(completion(answer)).encode())

        def make_trouble(self, trouble: Trouble) -> None:
            closing.wait(trouble.stall_s)
            if trouble.hang_up:
                self.close_connection = True
                return
            if trouble.drip_s:
                self.send_response(200)
                self.end_headers()
                end = time.monotonic() + trouble.drip_s
                try:
                    while time.monotonic() < end and not closing.wait(0.02):
                        self.wfile.write(b" ")
                except OSError:
                    pass  # the client had enough
                return
            self.reply(trouble.status, trouble.headers, trouble.body)

    with serve_on_loopback(Handler, closing) as url:
        served = JudgeServer(f"{url}/v1")
        yield served


def in_turn(*answers: str | Trouble) -> Say:
    """Each answer once to each question, the last one for ever."""
    return lambda _, before: answers[min(before, len(answers) - 1)]


def completion(text: str | None, *, model: str = "judge-2024-01-01") -> dict[str, Any]:
    """A chat completion of 100 prompt tokens and 10 answered ones."""
    return {
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
