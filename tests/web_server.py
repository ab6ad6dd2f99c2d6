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


@contextmanager
def web_server(pages: dict[str, Page]) -> Iterator[WebServer]:
    """Serve until the block ends."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            served.agents.add(self.headers.get("User-Agent"))
            page = pages.get(self.path, Page(b"no such page", 404))
            closing.wait(page.stall_s)
            try:
                self.send_response(page.status)
                for name, value in page.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(page.body) if page.length is None else page.length))
                self.end_headers()
                self.wfile.write(page.body)
            except OSError:
                pass  # the client had enough

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = WebServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
