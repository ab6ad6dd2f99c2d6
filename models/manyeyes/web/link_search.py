"""Links for a query, from a search service that answers with JSON: SearXNG, or another one by its address and path.

The service is the user's choice, as a language model's endpoint is: it may be at a private address, robots.txt is not
read for it, and a redirect is not followed, since it would take the key elsewhere. What it links to is anybody's, and
goes through ``fetcher``.

Source: https://docs.searxng.org/dev/search_api.html: ``/search?q=...&format=json`` answers
``{"results": [{"url": ...}]}``.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from manyeyes.errors import FetchError
from manyeyes.storage import parse_json, write_file
from manyeyes.web.chat_client import AskAgainError, NoRedirects, read_until, retry_after
from manyeyes.web.fetcher import agent_name

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60.0
_FIELDS = ("query", "count", "key")


class LinkSearch(Protocol):
    """Finds pages."""

    def find_links(self, query: str, count: int) -> list[str]:
        """Addresses of pages, best first, as many as ``count`` at most.

        Raises:
            FetchError: The service refuses, or does not answer.
        """


@dataclass(frozen=True)
class SearchService:
    """A search service and how it is asked.

    Attributes:
        url: Its address; ``{query}``, ``{count}`` and ``{key}`` are filled in.
        links: Where the links are in its answer: keys and places of lists with dots between; a list whose place is not
            named stands for all of its entries.
        key_from: Environment variable that holds the key; empty where none is needed.
        header: ``Name: value`` of one more header, in which ``{key}`` is filled in; empty for none.
        contact: Where an operator finds who asks.
        timeout_s: For one answer; seconds.
        interval_s: From one request to the next; seconds.
        attempts: Requests for one answer while it is busy or away.
    """

    url: str
    links: str = "results.url"
    key_from: str = ""
    header: str = ""
    contact: str = ""
    timeout_s: float = 30.0
    interval_s: float = 1.0
    attempts: int = 3

    def __post_init__(self) -> None:
        for what, text in (("search address", self.url), ("search header", self.header)):
            try:
                fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            except ValueError as error:
                raise _unusable(what, str(error)) from error
            if unknown := fields - set(_FIELDS):
                raise _unusable(what, f"it has {{{min(unknown)}}}")
            if "key" in fields and not self.key_from:
                raise _unusable(what, "it has {key}, and no environment variable is named that holds one")
        if not self.url.startswith(("http://", "https://")) or "{query}" not in self.url:
            raise _unusable("search address", "it does not begin with https:// or http://, or has no {query}")
        if self.header and ":" not in self.header:
            raise _unusable("search header", "it has no colon")


class JsonLinkSearch:
    """Asks a service, and keeps what it answered.

    Args:
        service: Is asked.
        cache: Folder that keeps links by service and query; without one nothing is kept.
        wait: Sleeps for N seconds.
    """

    def __init__(
        self, service: SearchService, *, cache: Path | None = None, wait: Callable[[float], object] = time.sleep
    ) -> None:
        self._service = service
        self._cache = cache
        self._wait = wait
        self._next_request = 0.0
        self._opener = urllib.request.build_opener(NoRedirects)

    def find_links(self, query: str, count: int) -> list[str]:
        """Addresses of pages, best first; the same ones for a query that was asked before.

        Raises:
            FetchError: The key is not taken, the answer has no links where they should be, or there is no answer;
                ``retry`` where there may be one later.
        """
        kept = self._kept_file(query, count)
        answer = kept.read_bytes() if kept is not None and kept.is_file() else self._ask(query, count)
        try:
            links = _links_at(parse_json(answer.decode()), self._service.links.split("."))
        except (ValueError, RecursionError) as error:
            raise FetchError(
                f"the search service answers {answer[:80]!r}; links are not at {self._service.links} ({error})",
                "JSON with links",
                "For SearXNG, allow its format json and ask with &format=json; for others, say where links are.",
            ) from error
        if kept is not None:
            write_file(kept, answer)
        return links[:count]

    def _kept_file(self, query: str, count: int) -> Path | None:
        # The template, not the address: that holds the key.
        asked = "\n".join((self._service.url, query, str(count)))
        digest = hashlib.sha256(asked.encode(errors="surrogatepass")).hexdigest()
        return None if self._cache is None else self._cache / digest[:2] / f"{digest}.json"

    def _ask(self, query: str, count: int) -> bytes:
        reason = ""
        for attempt in range(self._service.attempts):
            self._wait(max(0.0, self._next_request - time.monotonic()))
            self._next_request = time.monotonic() + self._service.interval_s
            try:
                return self._send(query, count)
            except AskAgainError as again:
                reason = str(again)
                if attempt + 1 < self._service.attempts:
                    self._wait(min(2.0**attempt if again.wait_s is None else again.wait_s, _LONGEST_WAIT_S))
        raise FetchError(
            f"the search service gives no answer to {query[:80]!r}: {reason}",
            "a service that answers",
            "Try later: what was found is kept.",
            retry=True,
        )

    def _send(self, query: str, count: int) -> bytes:
        service = self._service
        key = os.environ.get(service.key_from, "").strip() if service.key_from else ""
        if service.key_from and not key:
            raise FetchError(f"{service.key_from} is empty", "the search service's key", "Set it, or name another.")
        fields = {"query": quote(query, safe=""), "count": count, "key": quote(key, safe="")}
        headers = {"User-Agent": agent_name(service.contact), "Accept": "application/json"}
        name, colon, value = service.header.partition(":")
        if colon:
            headers[name.strip()] = value.strip().format(**{**fields, "key": key})
        request = urllib.request.Request(service.url.format(**fields), headers=headers)
        deadline = time.monotonic() + service.timeout_s
        try:
            with self._opener.open(request, timeout=service.timeout_s) as answer:
                return read_until(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _BUSY:
                    raise AskAgainError(f"it answers {error.code}", retry_after(error.headers)) from None
            raise FetchError(
                f"the search service answers {error.code}",
                "200 and JSON",
                "Check its address and key; SearXNG answers 403 where its settings do not list the format json.",
            ) from None
        # ValueError: what is no address or header for http.client. None of these may show the key.
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            raise AskAgainError(str(reason)) from None


def _links_at(found: Any, path: list[str]) -> list[str]:
    if not path:
        if isinstance(found, list):
            return [link for entry in found for link in _links_at(entry, [])]
        if not isinstance(found, str):
            raise ValueError(f"a link is {str(found)[:40]!r}")
        return [found]
    if isinstance(found, list) and not path[0].isdecimal():
        return [link for entry in found for link in _links_at(entry, path)]
    try:
        return _links_at(found[int(path[0])] if isinstance(found, list) else found[path[0]], path[1:])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no {path[0]}") from None


def _unusable(what: str, why: str) -> FetchError:
    return FetchError(
        f"the {what} cannot be used: {why}",
        "an address or a header in which only {query}, {count} and {key} are filled in",
        "For instance: https://searx.example/search?q={query}&format=json",
    )
