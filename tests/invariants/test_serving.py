"""A server answers OpenAI's own client as the bundle answers, whoever else asks and whatever bundle takes over."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from manyeyes.errors import BundleError, RecordError
from manyeyes.runtime.bundle import Bundle
from manyeyes.runtime.engine import Chat, Engine
from manyeyes.runtime.sampling import Sampling
from manyeyes.serving.app import Limits
from manyeyes.serving.images import ImageLimits, collect_images
from manyeyes.web import public_hosts
from tests.export_toys import Toy, picture
from tests.invariants.test_runtime_engine import QUESTIONS, long_chats, make_chats
from tests.serving_toys import NAME, LoadedSource, Running, as_messages, as_options, as_uri, serving

ROOT = Path(__file__).parents[2]
LIMITS = Limits(images=ImageLimits(max_images=3, max_pixels=100_000), max_body_bytes=200_000)


@pytest.fixture(scope="module")
def running(loaded_bundle: Bundle) -> Iterator[Running]:
    with serving({"1": loaded_bundle}, LoadedSource(), LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def alone(loaded_bundle: Bundle) -> Iterator[Engine]:
    with Engine(loaded_bundle) as engine:
        yield engine


def test_many_clients_get_what_each_would_get_alone(running: Running, alone: Engine) -> None:
    chats = make_chats(16, seed=5)
    client = running.client()

    def ask(place: int) -> tuple[str, str, int, int]:
        options = as_options(chats[place])
        if place % 2:
            whole = client.chat.completions.create(**options)
            assert whole.usage is not None
            choice = whole.choices[0]
            return (
                choice.message.content or "",
                choice.finish_reason,
                whole.usage.prompt_tokens,
                whole.usage.completion_tokens,
            )
        text, finish, usage = "", "", None
        for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        assert usage is not None
        return text, finish, usage.prompt_tokens, usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(len(chats))))
    expected = [alone.answer(chat) for chat in chats]
    assert found == [(answer.text, answer.finish, answer.prompt_tokens, len(answer.token_ids)) for answer in expected]


def test_stop_logprobs_and_a_system_text_are_honoured(running: Running, alone: Engine) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=11, top_logprobs=2)
    chat = Chat.ask(QUESTIONS[0], images=picture(2), max_new_tokens=16, sampling=sampling)
    whole = alone.answer(chat)
    options = {**as_options(chat), "logprobs": True, "top_logprobs": 2}
    found = running.client().chat.completions.create(**options).choices[0]
    assert found.logprobs is not None
    assert found.logprobs.content is not None
    assert [token.logprob for token in found.logprobs.content] == pytest.approx(
        [chance.logprob for chance in whole.chances], abs=1e-4
    )
    assert [len(token.top_logprobs) for token in found.logprobs.content] == [2] * len(whole.token_ids)
    cut = running.client().chat.completions.create(**options, stop=[whole.text[3:5]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (
        whole.text[: whole.text.index(whole.text[3:5])].strip(),
        "stop",
    )
    spoken = [{"role": "system", "content": "Be brief."}, *as_messages(chat)]
    answer = running.client().chat.completions.create(**{**options, "messages": spoken}).choices[0].message.content
    assert answer == alone.answer(replace(chat, system="Be brief.")).text


def post(running: Running, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{running.url}/v1/chat/completions", content=content, timeout=60, **options)


def bomb() -> bytes:
    """A small PNG of many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (4000, 4000)).save(buffer, "PNG")
    return buffer.getvalue()


def body(*parts: Any, **changes: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "red?"}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **changes}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"{", 400, "body"),
        (b"\xff", 400, "body"),
        ({"model": NAME, "messages": []}, 400, "messages"),
        ({"model": NAME, "messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
        (body(n=2), 400, "n:"),
        (body(tools=[{"type": "function"}]), 400, "tools"),
        (body(temperature=-1), 400, "temperature"),
        (body(max_tokens=0), 400, "max_tokens"),
        (body(stop=["a"] * 5), 400, "stop"),
        (body(model="other"), 404, "no model 'other'"),
        (body(image(as_uri(b"no image"))), 400, "image"),
        (body(image(as_uri(picture(0)[:100]))), 400, "image"),
        (body(image("data:image/png;base64,@@")), 400, "base64"),
        (body(image("data:image/png,abc")), 400, "base64"),
        (body(image(as_uri(bomb()))), 400, "16000000|4000 x 4000"),
        (body(*[image(as_uri(picture(0)))] * 4), 400, "4 images"),
        (body(image("https://example.com/a.png")), 400, "data URI"),
        (body(image("file:///etc/passwd")), 400, "data URI"),
        (body({"type": "text", "text": "an <image>"}), 400, "<image>"),
        ({"model": NAME, "messages": [{"role": "assistant", "content": "a"}]}, 400, "turn 0"),
        (body(user="x" * 200_000), 413, "larger than"),
    ],
)
def test_what_cannot_be_answered_gets_openais_error(running: Running, sent: Any, status: int, message: str) -> None:
    for stream in (False, True):
        answer = post(running, {**sent, "stream": stream} if isinstance(sent, dict) else sent)
        error = answer.json()["error"]
        assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
        assert any(part in error["message"] for part in message.split("|")), error
    assert running.service.active == 0


def test_body_without_a_length_is_bounded_too(running: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(400):
            yield b"x" * 1000

    with suppress(httpx.TransportError):  # the server may close the connection while the rest is sent
        assert httpx.post(f"{running.url}/v1/chat/completions", content=parts(), timeout=60).status_code == 413
    assert post(running, body()).status_code == 200


def test_client_that_goes_away_frees_its_row(running: Running, alone: Engine) -> None:
    engine = running.service.host.served.engine
    step = engine.bundle.decoder.go_on
    chat = long_chats(alone, 1)[0]

    def slowly(*given: Any) -> Any:
        time.sleep(0.05)
        return step(*given)

    engine.bundle.decoder.go_on = slowly  # type: ignore[method-assign]
    try:
        for stream in (True, False):
            before = engine.state().written
            options = {**as_options(chat), "max_tokens": 60, "stream": stream}
            asking = httpx.stream("POST", f"{running.url}/v1/chat/completions", json=options, timeout=0.3)
            with suppress(httpx.ReadTimeout), asking as answer:
                next(answer.iter_lines())
            deadline = time.monotonic() + 30
            while running.service.active or engine.state().running:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert engine.state().written - before < 16
    finally:
        engine.bundle.decoder.go_on = step  # type: ignore[method-assign]


def test_models_health_metrics_and_page(running: Running) -> None:
    running.client().chat.completions.create(**body(image(as_uri(picture(0)))))  # type: ignore[call-overload]
    assert [model.id for model in running.client().models.list()] == [NAME]
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/ready").json() == {"ready": True, "version": "1"}
    metrics = httpx.get(f"{running.url}/metrics").text
    for line in (
        'manyeyes_requests_total{status="200"}',
        "manyeyes_first_token_seconds_count",
        "manyeyes_tokens_per_second_bucket",
        'manyeyes_cache_misses_total{kind="image"}',
        "manyeyes_waiting 0.0",
        'manyeyes_model{digest="',
    ):
        assert line in metrics
    page = httpx.get(f"{running.url}/")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_keys_are_asked_for_and_a_full_queue_says_so(loaded_bundle: Bundle) -> None:
    limits = Limits(keys=("first", "second"), max_waiting=0)
    with serving({"1": loaded_bundle}, LoadedSource(), limits) as running:
        for key in ("wrong", "firs", "first,second"):
            assert post(running, body(), headers={"Authorization": f"Bearer {key}"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            running.client().models.list()
        assert running.client(api_key="second").models.list().data[0].id == NAME
        with pytest.raises(openai.RateLimitError, match="wait already"):
            running.client(api_key="first").chat.completions.create(**body())  # type: ignore[call-overload]


def test_new_version_takes_over_without_a_lost_answer_and_a_bad_one_is_refused(
    toy_bundle: Toy, loaded_bundle: Bundle, alone: Engine
) -> None:
    class Broken:
        """Loads and cannot answer."""

        max_length = 96
        manifest = loaded_bundle.manifest
        decoder = loaded_bundle.decoder

        def encode_images(self, _images: Any) -> Any:
            raise BundleError("vision.onnx fails", "a graph that runs", "Export it again.")

    bundles: dict[str, Any] = {"1": loaded_bundle, "2": Broken(), "3": loaded_bundle}
    source = LoadedSource()
    chats = make_chats(24, seed=8)
    expected = [alone.answer(chat).text for chat in chats]
    with serving(bundles, source, Limits()) as running:
        first, host, client = running.service.host.served, running.service.host, running.client()
        with ThreadPoolExecutor(4) as pool:
            asking = [
                pool.submit(lambda chat: client.chat.completions.create(**as_options(chat)), chat) for chat in chats
            ]
            for version in ("2", "3"):
                source.version = version
                host.look()
        answers = [future.result().choices[0].message.content for future in asking]
        assert answers == expected
        assert (host.served.version, host.changes, host.refusals) == ("3", 1, 1)
        assert not first.engine.alive
        source.version = "2"
        host.look()
        host.look()
        assert (host.served.version, host.refusals) == ("3", 2), "a version that was refused is not tried again"
        source.version, source.waiting = "1", ("1",)
        host.look()
        host.look()
        assert (host.served.version, host.refusals) == ("3", 3), "counted once"
        source.waiting = ()
        host.look()
        assert host.served.version == "1", "approved since"
        assert client.chat.completions.create(**as_options(chats[0])).choices[0].message.content == expected[0]


@pytest.fixture
def image_server() -> Iterator[int]:
    """A port that hands out one picture."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        content = picture(0)
        answers = {
            b"/a.png": b"HTTP/1.0 200 OK\r\n\r\n" + content,
            b"/large": b"HTTP/1.0 200 OK\r\n\r\n" + content * 100,
            b"/moved": b"HTTP/1.0 302 Found\r\nLocation: /a.png\r\n\r\n",
        }
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            with connection:
                asked = connection.recv(4096)
                connection.sendall(answers[asked.split()[1]])

    threading.Thread(target=serve, daemon=True).start()
    yield listening.getsockname()[1]
    listening.close()


def test_images_are_fetched_from_allowed_hosts_at_public_addresses_alone(
    image_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"http://localhost:{image_server}"
    limits = ImageLimits(max_bytes=5000, allowed_hosts=("localhost",))
    with pytest.raises(RecordError, match="public address"):
        collect_images([f"{base}/a.png"], limits)
    for address in ("10.0.0.1", "169.254.169.254", "::1", "fd00::1", "224.0.0.1", "0.0.0.0"):
        assert not public_hosts.is_public(address), address
    assert public_hosts.is_public("93.184.216.34")
    monkeypatch.setattr(public_hosts, "is_public", lambda address: "." in address)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", image_server))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert collect_images([f"{base}/a.png"], limits) == (picture(0),)
    for path, message in (("large", "too large"), ("moved", "answers 302")):
        with pytest.raises(RecordError, match=message):
            collect_images([f"{base}/{path}"], limits)
    with pytest.raises(RecordError, match="from localhost"):
        collect_images([f"http://localhost.example:{image_server}/a.png"], limits)


def test_command_serves_a_folder_without_torch_and_ends_gracefully(toy_bundle: Toy, alone: Engine) -> None:
    command = [sys.executable, "-c", "from manyeyes.cli.main import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "models")}
    process = subprocess.Popen(
        [*command, "serve", str(toy_bundle.bundle), "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition(" answers at ")
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        chat = long_chats(alone, 1)[0]
        options = {**as_options(chat), "model": name, "stream": True}
        text = ""
        with httpx.Client(timeout=60) as client, httpx.Client(timeout=60) as other:
            assert other.get(f"{url}/ready").status_code == 200
            with client.stream("POST", f"{url}/v1/chat/completions", json=options) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        assert text == alone.answer(chat).text
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_server_that_stops_refuses_new_requests_and_finishes_running_ones(
    loaded_bundle: Bundle, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, started = threading.Event(), threading.Event()
    step = loaded_bundle.decoder.go_on
    chat = long_chats(alone, 1)[0]
    expected = alone.answer(chat).text

    def wait(*given: Any) -> Any:
        started.set()
        assert gate.wait(60)
        return step(*given)

    with serving({"1": loaded_bundle}, LoadedSource(), Limits()) as running:
        monkeypatch.setattr(loaded_bundle.decoder, "go_on", wait)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(lambda: running.client().chat.completions.create(**as_options(chat)))
            assert started.wait(60)
            running.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.InternalServerError) as refused:
                running.client().chat.completions.create(**as_options(chat))
            assert refused.value.status_code == 503
            assert httpx.get(f"{running.url}/ready").status_code == 503
            gate.set()
            assert asked.result().choices[0].message.content == expected
