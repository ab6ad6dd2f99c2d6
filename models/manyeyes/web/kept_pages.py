"""Pages and images that were fetched once are not fetched again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

from manyeyes.storage import write_file
from manyeyes.web.fetcher import Fetched, Fetcher


class FetchesPages(Protocol):
    """Gets things of the web."""

    def fetch(self, url: str) -> Fetched:
        """One thing.

        Raises:
            FetchError: It may not be fetched, or cannot be.
        """


class KeptFetcher:
    """Fetches what is not kept yet; what could not be fetched is tried again by the next one that asks.

    Args:
        fetcher: Asks the web.
        folder: Keeps what came, by its address.
    """

    def __init__(self, fetcher: Fetcher, folder: Path) -> None:
        self._fetcher = fetcher
        self._folder = folder

    def fetch(self, url: str) -> Fetched:
        """As ``Fetcher.fetch``."""
        digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
        file = self._folder / digest[:2] / digest
        if file.is_file():
            head, _, content = file.read_bytes().partition(b"\n")
            return Fetched(content=content, **json.loads(head))
        fetched = self._fetcher.fetch(url)
        head = json.dumps({"url": fetched.url, "content_type": fetched.content_type}).encode()
        write_file(file, head + b"\n" + fetched.content)
        return fetched
