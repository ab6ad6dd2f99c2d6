"""A small web server on loopback that answers from a table: it also redirects, stalls and lies about lengths."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Page:
    """What the server says; ``length`` is what it says of the length, where that is not the truth."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    stall_s: float = 0.0


@dataclass
class WebServer:
    """Where it is, and what it was asked, with the agent's name."""

    url: str
    asked: list[str] = field(default_factory=list)
    agents: set[str | None] = field(default_factory=set)


class QuietHandler(BaseHTTPRequestHandler):
    """Answers once, and says nothing of it."""

    def reply(self, status: int, headers: Mapping[str, str], content: bytes, *, length: int | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client had enough

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve_on_loopback(handler: type[QuietHandler], closing: threading.Event) -> Iterator[str]:
    """The server's address; ``closing`` is set when the block ends, so that nobody waits for what it stalls."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def web_server(pages: dict[str, Page]) -> Iterator[WebServer]:
    """Serve until the block ends."""
    closing = threading.Event()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            served.agents.add(self.headers.get("User-Agent"))
            page = pages.get(self.path, Page(b"no such page", 404))
            closing.wait(page.stall_s)
            self.reply(page.status, page.headers, page.body, length=page.length)

    with serve_on_loopback(Handler, closing) as url:
        served = WebServer(url)
        yield served
