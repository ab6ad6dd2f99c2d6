"""Fetching from the web: never from inside, never without bounds, and as robots.txt allows."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from manyeyes.errors import FetchError
from manyeyes.web.fetcher import Fetcher, FetchLimits
from manyeyes.web.kept_pages import KeptFetcher
from manyeyes.web.public_hosts import is_public
from tests.web_server import Page, web_server

INSIDE = ("127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "224.0.0.1", "0.0.0.0", "fe80::1%eth0")
CARRIED = ("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::ffff:10.0.0.1")


def fetcher(**changes: object) -> Fetcher:
    limits = {"interval_s": 0.0, "attempts": 1, "private_hosts": ("127.0.0.1",), "timeout_s": 5.0, **changes}
    return Fetcher(FetchLimits(**limits), wait=lambda _seconds: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", [*INSIDE, *CARRIED])
def test_addresses_from_inside_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_web_are_public() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert is_public("64:ff9b::5db8:d822")


def test_loopback_is_refused_by_address_by_name_and_behind_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server({}) as server:
        port = server.url.rpartition(":")[2]
        redirect = {"Location": f"http://localhost:{port}/secret"}
        with web_server({"/a": Page(status=302, headers=redirect)}) as outside:
            for url in (f"http://localhost:{port}/", f"http://2130706433:{port}/", f"http://[::1]:{port}/"):
                with pytest.raises(FetchError, match="public address"):
                    fetcher().fetch(url)
            with pytest.raises(FetchError, match="localhost is at"):
                fetcher().fetch(f"{outside.url}/a")
        assert server.asked == []
    # A name of which one address of several is private.
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(FetchError, match=r"rebinding.example is at 10.0.0.1"):
        fetcher().fetch("http://rebinding.example/")


def test_a_name_is_looked_up_once_so_that_a_second_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = iter(["127.0.0.1"] * 2 + ["10.0.0.1"] * 9)
    with web_server({"/a": Page(b"here")}) as server:
        port = int(server.url.rpartition(":")[2])
        look_up = socket.getaddrinfo

        def answer(host: str, *rest: object, **more: object) -> object:
            if host != "wiki.example":
                return look_up(host, *rest, **more)  # type: ignore[arg-type]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(addresses), port))]

        monkeypatch.setattr(socket, "getaddrinfo", answer)
        # Once for robots.txt and once for the page: no more answers of loopback are there.
        got = fetcher(private_hosts=("wiki.example",)).fetch(f"http://wiki.example:{port}/a")
    assert got.content == b"here"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a.example/", "http://", "http://me:pw@a.example/", "a"])
def test_only_plain_addresses_of_http_are_fetched(url: str) -> None:
    with pytest.raises(FetchError, match="one of http or https"):
        fetcher().fetch(url)


def test_what_is_too_large_too_short_or_too_slow_is_refused() -> None:
    pages = {
        "/large": Page(b"x" * 2000),
        "/says": Page(b"x", length=10**12),
        "/short": Page(b"x" * 10, length=90),
        "/slow": Page(b"x", stall_s=9),
        "/gone": Page(status=410),
        "/packed": Page(b"x", headers={"Content-Encoding": "gzip"}),
        "/round": Page(status=301, headers={"Location": "/round"}),
        "/nowhere": Page(status=301, headers={"Location": "http://["}),
    }
    with web_server(pages) as server:
        for path, said in (
            *(
                ("/large", "larger than 1000"),
                ("/says", "larger than 1000"),
                ("/short", "10 bytes of 90|IncompleteRead"),
            ),
            *(("/gone", "answers 410"), ("/packed", "compressed"), ("/round", "answers 301"), ("/nowhere", "leads to")),
        ):
            with pytest.raises(FetchError, match=said):
                fetcher(max_bytes=1000, timeout_s=20.0).fetch(server.url + path)
        with pytest.raises(FetchError, match=r"timed out|slow"):
            fetcher(timeout_s=1.0).fetch(f"{server.url}/slow")


def test_robots_txt_is_read_once_and_obeyed() -> None:
    pages = {
        "/robots.txt": Page(b"User-agent: *\nDisallow: /private\nCrawl-delay: 7\n"),
        "/a": Page(b"1", headers={"Content-Type": "text/html; charset=utf-8"}),
        "/private": Page(b"2"),
    }
    waits: list[float] = []
    with web_server(pages) as server:
        guest = Fetcher(
            FetchLimits(interval_s=0.0, private_hosts=("127.0.0.1",), contact="me@home.example"), wait=waits.append
        )
        assert guest.fetch(f"{server.url}/a").content_type == "text/html"
        assert guest.fetch(f"{server.url}/a").content == b"1"
        with pytest.raises(FetchError, match=r"robots\.txt"):
            guest.fetch(f"{server.url}/private")
        assert server.asked == ["/robots.txt", "/a", "/a"]
        assert server.agents == {"ManyEyes/1.0 (me@home.example)"}
    assert len(waits) == 1
    assert waits[0] > 0


def test_robots_txt_that_cannot_be_had_allows_nothing() -> None:
    with (
        web_server({"/robots.txt": Page(status=500), "/a": Page(b"1")}) as server,
        pytest.raises(FetchError, match=r"robots\.txt|answers 500") as raised,
    ):
        fetcher().fetch(f"{server.url}/a")
    assert raised.value.retry
    assert server.asked == ["/robots.txt"]


@pytest.mark.parametrize(
    ("delay", "said"), [("100000", "wants 100000 seconds"), ("9" * 5000, r"robots\.txt"), ("\u00b2", r"robots\.txt")]
)
def test_robots_txt_cannot_stop_us_for_ever_or_break_us(delay: str, said: str) -> None:
    pages = {"/robots.txt": Page(f"User-agent: *\nCrawl-delay: {delay}\nDisallow: /b\n".encode()), "/a": Page(b"1")}
    with web_server(pages) as server, pytest.raises(FetchError, match=said):
        fetcher().fetch(f"{server.url}/a")


def test_a_busy_host_is_asked_again_when_it_says() -> None:
    pages = {"/a": Page(status=429, headers={"Retry-After": "7"})}
    waits: list[float] = []
    with web_server(pages) as server:
        limits = FetchLimits(interval_s=0.0, attempts=2, private_hosts=("127.0.0.1",))
        with pytest.raises(FetchError, match="answers 429"):
            Fetcher(limits, wait=waits.append).fetch(f"{server.url}/a")
    assert waits[0] == 7.0
    assert server.asked.count("/a") == 2


def test_what_cannot_be_fetched_is_kept_with_its_reason_unless_it_may_go_better(tmp_path: Path) -> None:
    pages = {"/busy": Page(status=503), "/large": Page(b"x" * 999)}
    with web_server(pages) as server:

        def reason(path: str, **limits: object) -> str:
            # Another process, which knows nothing but the folder.
            with pytest.raises(FetchError) as raised:
                KeptFetcher(fetcher(**limits), tmp_path).fetch(server.url + path)
            return f"{raised.value.retry} {raised.value}"

        first = [reason(path, max_bytes=500) for path in ("/gone", "/large", "/busy")]
        asked = len(server.asked)
        assert [reason(path, max_bytes=500) for path in ("/gone", "/large", "/busy")] == first
        assert server.asked[asked:] == ["/robots.txt", "/busy"]
        assert "404" in first[0]
        # Another limit is another question.
        assert KeptFetcher(fetcher(), tmp_path).fetch(f"{server.url}/large").content == b"x" * 999
