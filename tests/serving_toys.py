"""A server on this machine, and what to send to it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from manyeyes.errors import RegistryError
from manyeyes.runtime.bundle import Bundle
from manyeyes.runtime.engine import Chat, Engine
from manyeyes.serving.app import Limits, Server, Service
from manyeyes.serving.hosting import Host

NAME = "toy"


@dataclass
class LoadedSource:
    """Bundles in memory, by version."""

    version: str = "1"
    name: str = NAME
    waiting: tuple[str, ...] = ()

    def find(self) -> str:
        return self.version

    def admit(self, version: str) -> None:
        if version in self.waiting:
            raise RegistryError(f"{version} is not approved", "one that is", "Approve it.")

    def fetch(self, version: str) -> Path:
        return Path(version)

    def forget(self, kept: Sequence[str]) -> None:
        pass


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread."""

    url: str
    service: Service
    server: Server

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        )


@contextmanager
def serving(bundles: dict[str, Bundle], source: LoadedSource, limits: Limits) -> Iterator[Running]:
    """Serve the bundle of the source's version."""
    host = Host(source, lambda folder: Engine(bundles[str(folder)]))
    service = Service(host, limits)
    server = Server(service, ("127.0.0.1", 0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service, server)
    finally:
        server.should_exit = True
        thread.join()
        host.close()


def as_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def as_messages(chat: Chat) -> list[Any]:
    """A conversation as OpenAI writes it."""
    images, messages = iter(chat.images), []
    for speaker, text in chat.turns:
        count = text.count("<image>")
        content: list[Any] = [{"type": "image_url", "image_url": {"url": as_uri(next(images))}} for _ in range(count)]
        content.append({"type": "text", "text": text.replace("<image>\n", "")})
        messages.append(
            {"role": "user", "content": content} if speaker == "human" else {"role": "assistant", "content": text}
        )
    return messages


def as_options(chat: Chat) -> dict[str, Any]:
    """All else that a conversation asks for."""
    return {
        "model": NAME,
        "messages": as_messages(chat),
        "max_tokens": chat.max_new_tokens,
        "temperature": chat.sampling.temperature,
        "top_p": chat.sampling.top_p,
        "seed": chat.sampling.seed,
    }
