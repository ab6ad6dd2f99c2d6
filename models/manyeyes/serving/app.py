"""The HTTP server: OpenAI's chat completions, health, metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import signal
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect

from manyeyes.errors import ManyEyesError
from manyeyes.runtime.engine import AnswerPiece, Chat
from manyeyes.serving.hosting import Host, Served
from manyeyes.serving.images import ImageLimits
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.protocol import (
    ChatRequest,
    CompletionReply,
    RequestError,
    as_event,
    as_request_error,
    make_chat,
    read_request,
)

LOG = logging.getLogger("manyeyes.serving")
_PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        images: Of the images of a request.
        max_body_bytes: Of a request's body.
        max_waiting: Requests that wait for the batch; more are refused with 429.
        body_s: Seconds that a body may take to arrive.
        stop_s: Seconds that running answers may still take once the server is told to stop.
        keys: API keys; none for no authentication.
    """

    images: ImageLimits = field(default_factory=ImageLimits)
    max_body_bytes: int = 20 * 2**20
    max_waiting: int = 64
    body_s: float = 30.0
    stop_s: float = 30.0
    keys: tuple[str, ...] = ()


class Service:
    """What the routes share.

    Attributes:
        host: The bundle that answers.
        limits: What is taken.
        metrics: Counts.
        stopping: Whether new requests are refused.
        active: Requests whose answers are not sent yet.
    """

    def __init__(self, host: Host, limits: Limits) -> None:
        self.host, self.limits = host, limits
        self.metrics = Metrics(host)
        self.stopping = False
        self.active = 0
        self._keys = [hashlib.sha256(key.encode()).digest() for key in limits.keys]

    def authorise(self, request: Request) -> None:
        """Check the key, in a time that does not depend on how much of it is right."""
        if not self._keys:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise RequestError(401, "no valid API key in the header Authorization: Bearer", code="invalid_api_key")

    async def read_body(self, request: Request) -> bytes:
        """The body, up to its bound in bytes and in time."""
        most = self.limits.max_body_bytes
        too_large = RequestError(413, f"body is larger than {most} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except ClientDisconnect:
            raise _Left from None
        except TimeoutError:
            raise RequestError(408, f"body did not arrive within {self.limits.body_s:.0f} s") from None
        return bytes(body)

    def check(self, asked: ChatRequest, served: Served) -> None:
        """That the model is this one, and that there is room to wait."""
        known = {self.host.name, f"{self.host.name}/{served.version}"}
        if asked.model.partition("@")[0] not in known:
            raise RequestError(404, f"no model {asked.model!r}: there is {self.host.name}", code="model_not_found")
        if served.engine.state().waiting >= self.limits.max_waiting:
            raise RequestError(429, f"{self.limits.max_waiting} requests wait already", code="queue_full")

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        started = time.perf_counter()
        if self.stopping:
            raise RequestError(503, "the server is about to stop; ask again", code="stopping")
        self.authorise(request)
        with ExitStack() as stack:
            self.active += 1
            stack.callback(self._leave)
            asked = read_request(await self.read_body(request))
            served = stack.enter_context(self.host.use())
            self.check(asked, served)
            chat = await asyncio.to_thread(make_chat, asked, self.limits.images)
            reply = CompletionReply(
                asked,
                served.engine.bundle,
                identifier=f"chatcmpl-{uuid.uuid4().hex}",
                model=asked.model,
                fingerprint=f"fp_{served.digest[:12]}",
            )
            pieces = self._watch(served, chat, started)
            if not asked.stream:
                whole = await _unless_left(request, _collect(pieces))
                return JSONResponse(reply.whole(whole))
            # What cannot be answered shows before the first token, while the status may still say so.
            first = await _unless_left(request, anext(pieces))
            return _Events(_stream(reply, first, pieces), pieces, held=stack.pop_all())

    def _leave(self) -> None:
        self.active -= 1

    async def _watch(self, served: Served, chat: Chat, started: float) -> AsyncGenerator[AnswerPiece, None]:
        """An answer's pieces, measured."""
        written, first = 0, started
        async with aclosing(served.engine.stream_async(chat)) as pieces:
            async for piece in pieces:
                if written == 0:
                    first = time.perf_counter()
                    self.metrics.first_token.observe(first - started)
                    self.metrics.tokens.labels("asked").inc(piece.prompt_tokens)
                written += 1
                yield piece
        self.metrics.tokens.labels("written").inc(written)
        if written > 1:
            self.metrics.rate.observe((written - 1) / max(time.perf_counter() - first, 1e-9))


async def _stream(
    reply: CompletionReply, first: AnswerPiece, pieces: AsyncIterator[AnswerPiece]
) -> AsyncGenerator[bytes, None]:
    seen = [first]
    yield reply.opening() + reply.event(first)
    try:
        async for piece in pieces:
            seen.append(piece)
            event = reply.event(piece)
            if event:
                yield event
    except ManyEyesError as error:
        yield as_event(as_request_error(error).body)
        return
    yield reply.closing(seen)


class _Events(StreamingResponse):
    """A stream that lets go of all it holds however it ends, and if it never began."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], pieces: AsyncGenerator[AnswerPiece, None], *, held: ExitStack
    ) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._pieces, self._held = events, pieces, held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._held:
            async with aclosing(self._pieces), aclosing(self._events):
                await super().__call__(scope, receive, send)


class _Left(Exception):  # noqa: N818
    """The client has gone."""


async def _collect(pieces: AsyncIterator[AnswerPiece]) -> list[AnswerPiece]:
    return [piece async for piece in pieces]


async def _unless_left(request: Request, work: Awaitable[Any]) -> Any:
    """The result of some work, which is given up when the client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the end
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Left
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def build_app(service: Service) -> FastAPI:
    """The routes."""
    app = FastAPI(title="ManyEyes", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refuse(_request: Request, error: RequestError) -> Response:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
        return JSONResponse(error.body, error.status, headers=headers.get(error.status))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        status = 500
        try:
            response = await service.chat(request)
            status = response.status_code
        except RequestError as error:
            status = error.status
            raise
        except ManyEyesError as error:
            told = as_request_error(error)
            status = told.status
            raise told from error
        except (_Left, asyncio.CancelledError):
            status = 499  # as nginx counts clients that went away
            return Response(status_code=status)
        finally:
            service.metrics.requests.labels(str(status)).inc()
        return response

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.authorise(request)
        host = service.host
        entry = {
            "id": host.name,
            "object": "model",
            "created": 0,
            "owned_by": "manyeyes",
            "version": host.served.version,
            "digest": host.served.digest,
            "variant": host.served.variant,
        }
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> Response:
        alive = service.host.served.engine.alive or service.stopping
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 500)

    @app.get("/ready")
    async def ready() -> Response:
        takes = service.host.served.engine.alive and not service.stopping
        return JSONResponse({"ready": takes, "version": service.host.served.version}, 200 if takes else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    return app


class Server(uvicorn.Server):
    """Told to stop, it finishes running answers within a bound, and meanwhile refuses new ones with 503.

    Args:
        service: What is served.
        address: Host name or address, and port; 0 for any that is free.
    """

    def __init__(self, service: Service, address: tuple[str, int]) -> None:
        host, port = address
        config = uvicorn.Config(
            build_app(service),
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: Sequence[Any] | None = None) -> None:
        """As uvicorn does."""
        self._loop = asyncio.get_running_loop()
        await super().serve(None if sockets is None else list(sockets))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one is not patient."""
        if self._service.stopping or self._loop is None:
            super().handle_exit(sig, frame)
            return
        LOG.info("%s: finishing %d requests, taking no more", signal.Signals(sig).name, self._service.active)
        self._service.stopping = True
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._service.limits.stop_s
        while self._service.active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._service.active:
            LOG.warning("%d requests were not finished in time", self._service.active)
        await asyncio.to_thread(self._service.host.close)
        self.should_exit = True


def run_server(
    host: Host, limits: Limits, *, address: tuple[str, int], follow_s: float | None, started: Callable[[int], None]
) -> None:
    """Serve until a signal ends it.

    Args:
        host: The bundle that answers.
        limits: What is taken.
        address: Host name or address, and port; 0 for any that is free.
        follow_s: Seconds between two looks at the alias; None for a bundle that stays.
        started: Is told the port once it listens.
    """
    server = Server(Service(host, limits), address)

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            started(int(server.servers[0].sockets[0].getsockname()[1]))
        await serving

    if follow_s is not None:
        host.follow(every_s=follow_s)
    asyncio.run(serve())
