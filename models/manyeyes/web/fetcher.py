"""Fetches pages and images of the public web, as a guest who behaves.

Only http and https, at public addresses (``public_hosts``), each redirect checked like the first address; bounded in
bytes and in time; under one agent's name, as each site's ``robots.txt`` allows, and no faster than it may be asked.

Source: RFC 9309 for what ``robots.txt`` means: one that is not there allows all, one that cannot be had allows nothing.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.robotparser import RobotFileParser

from manyeyes.errors import FetchError
from manyeyes.web.public_hosts import PinnedConnection, find_public_address

AGENT = "ManyEyes"
"""What ``robots.txt`` calls us; the whole name, with the contact that the user gives, goes with each request."""

_CHUNK = 1 << 16
_ROBOTS_BYTES = 500 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60.0


def agent_name(contact: str) -> str:
    """What goes with each request: who asks, and where an operator finds them."""
    return f"{AGENT}/1.0 ({contact})" if contact else f"{AGENT}/1.0"


@dataclass(frozen=True)
class FetchLimits:
    """What is fetched, and how fast.

    Attributes:
        max_bytes: Of one answer.
        timeout_s: For one answer as a whole, redirects included; seconds.
        interval_s: From one request to a host to the next; seconds. ``robots.txt`` may ask for more.
        max_redirects: From one address to another.
        attempts: Requests for one thing from a host that is busy or away.
        private_hosts: Hosts that may be at private addresses, for instance a wiki of one's own; all others may not.
        contact: Where an operator finds who asks, for instance a mail address; part of the agent's name.
    """

    max_bytes: int = 20 * 2**20
    timeout_s: float = 30.0
    interval_s: float = 1.0
    max_redirects: int = 5
    attempts: int = 3
    private_hosts: tuple[str, ...] = ()
    contact: str = ""


@dataclass(frozen=True)
class Fetched:
    """What came.

    Attributes:
        url: Where it was in the end.
        content: Its bytes.
        content_type: As the server says, without parameters; may be empty.
    """

    url: str
    content: bytes
    content_type: str


class _BusyError(Exception):
    """Worth another request, after a wait of this many seconds where the server says so."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass
class _Host:
    """What is known of one host; its lock is held while it is asked for ``robots.txt``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    robots: RobotFileParser | None = None
    next_request: float = 0.0


class Fetcher:
    """Fetches things; may be used from several threads, which share the pace of each host.

    Args:
        limits: What, and how fast.
        wait: Sleeps for N seconds.
    """

    def __init__(self, limits: FetchLimits, *, wait: Callable[[float], object] = time.sleep) -> None:
        self.limits = limits
        self._wait = wait
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}
        self._jitter = random.Random(0)

    def fetch(self, url: str) -> Fetched:
        """Fetch one thing.

        Raises:
            FetchError: It may not be fetched, is too large or too slow, is shorter than its server says, or the server
                refuses it; ``retry`` where it may answer later.
        """
        reason = ""
        for attempt in range(self.limits.attempts):
            try:
                return self._follow(url)
            except _BusyError as busy:
                reason = str(busy)
                if attempt + 1 < self.limits.attempts:
                    wait_s = 2**attempt * self._jitter.uniform(0.5, 1.5) if busy.wait_s is None else busy.wait_s
                    self._wait(min(wait_s, _LONGEST_WAIT_S))
        raise FetchError(f"{url[:200]} cannot be fetched: {reason}", "a server that answers", "Try later.", retry=True)

    def _follow(self, url: str) -> Fetched:
        deadline = time.monotonic() + self.limits.timeout_s
        for _ in range(self.limits.max_redirects + 1):
            waited = self._ask_leave(url)
            response = self._get(url, max_bytes=self.limits.max_bytes, deadline=deadline + waited)
            deadline += waited
            if response.status not in _REDIRECTS:
                break
            url = _redirected(url, response.location)
        if response.status != 200:
            raise FetchError(f"{url[:200]} answers {response.status}", "200 and the thing itself", "Leave it out.")
        return Fetched(url, response.content, response.content_type)

    def _ask_leave(self, url: str) -> float:
        """Wait until the host may be asked for an address.

        Returns:
            Seconds that were spent with it.
        """
        started = time.monotonic()
        scheme, name, _ = _split(url)
        with self._lock:
            host = self._hosts.setdefault(f"{scheme}://{name}", _Host())
        with host.lock:
            if host.robots is None:
                host.robots = self._read_robots(url)
        if not host.robots.can_fetch(AGENT, url):
            raise FetchError(
                f"robots.txt of {name} keeps us from {url[:200]}", "a page that it allows", "Leave it out."
            )
        delay = host.robots.crawl_delay(AGENT) or 0
        if int(delay) > _LONGEST_WAIT_S:
            raise FetchError(f"{name} wants {delay} seconds between requests", "a minute at most", "Leave it out.")
        interval = max(self.limits.interval_s, float(delay))
        with self._lock:
            now = time.monotonic()
            turn = max(now, host.next_request)
            host.next_request = turn + interval
        if turn > now:
            self._wait(turn - now)
        return time.monotonic() - started

    def _read_robots(self, url: str) -> RobotFileParser:
        parts = urlsplit(url)
        place = urlunsplit((parts.scheme, parts.netloc, "/robots.txt", "", ""))
        robots = RobotFileParser(place)
        deadline = time.monotonic() + self.limits.timeout_s
        for _ in range(self.limits.max_redirects + 1):
            response = self._get(place, max_bytes=_ROBOTS_BYTES, deadline=deadline)
            if response.status not in _REDIRECTS:
                break
            place = _redirected(place, response.location)
        if response.status == 200:
            try:
                robots.parse(response.content.decode(errors="replace").splitlines())
            except ValueError:  # a delay of thousands of digits, or of digits that are no number
                robots.parse(["User-agent: *", "Disallow: /"])
        elif 400 <= response.status < 500 or response.status in _REDIRECTS:
            robots.parse([])
        else:
            raise _BusyError(f"its robots.txt answers {response.status}")
        return robots

    def _get(self, url: str, *, max_bytes: int, deadline: float) -> _Response:
        """One request, to a public address.

        Raises:
            FetchError: The address is not public or no address, the answer is too large or is not whole.
            _BusyError: Away, busy or too slow.
        """
        scheme, name, port = _split(url)
        parts = urlsplit(url)
        try:
            address = find_public_address(name, port, private_hosts=self.limits.private_hosts)
            left = deadline - time.monotonic()
            connection = PinnedConnection(name, address, secure=scheme == "https", timeout=max(left, 0.01))
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                headers = {"User-Agent": agent_name(self.limits.contact), "Accept": "*/*"}
                connection.request("GET", _quoted(target), headers=headers)
                with connection.getresponse() as response:
                    if response.status in _BUSY:
                        wait_s = _retry_after(response.getheader("Retry-After"))
                        raise _BusyError(f"it answers {response.status}", wait_s)
                    content = _read(connection, response, url=url, max_bytes=max_bytes, deadline=deadline)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _BusyError(str(error) or type(error).__name__) from error
        kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        return _Response(response.status, content, kind, response.getheader("Location") or "")


@dataclass(frozen=True)
class _Response:
    status: int
    content: bytes
    content_type: str
    location: str


def _read(
    connection: PinnedConnection, response: http.client.HTTPResponse, *, url: str, max_bytes: int, deadline: float
) -> bytes:
    """The body, no longer and no slower than it may be, and as long as it says."""
    said = response.length
    content = b""
    while (said or 0) <= max_bytes and len(content) <= max_bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _BusyError("it is too slow")
        if connection.sock is not None:
            connection.sock.settimeout(left)
        chunk = response.read1(_CHUNK)
        if not chunk:
            break
        content += chunk
    else:
        raise FetchError(f"{url[:200]} is larger than {max_bytes} bytes", "something smaller", "Leave it out.")
    if said is not None and len(content) != said and response.status == 200:
        raise FetchError(
            f"{url[:200]} ends after {len(content)} bytes of {said}", "as many as its server says", "Leave it out."
        )
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise FetchError(f"{url[:200]} comes compressed, which was not asked for", "the thing itself", "Leave it out.")
    return content


def _split(url: str) -> tuple[str, str, int]:
    """Scheme, host and port.

    Raises:
        FetchError: Not an address of http or https, or one with a user or password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise FetchError(f"the address is {url[:200]!r} ({error})", "one of http or https", "Leave it out.") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise FetchError(
            f"the address is {url[:200]!r}", "one of http or https, without user or password", "Leave it out."
        )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def _redirected(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError(
            f"{url[:200]} leads to {location[:200]!r} ({error})", "an address of http or https", "Leave it out."
        ) from error


def _quoted(target: str) -> str:
    """A path as it goes into a request; what is escaped already stays."""
    return quote(target, safe="/%?&=:+,;@!$'()*~#[]")


def _retry_after(value: str | None) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
