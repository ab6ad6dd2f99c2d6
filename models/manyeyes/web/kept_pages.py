"""Pages and images that were fetched once are not fetched again, nor those that can never be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

from manyeyes.errors import FetchError
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
    """Fetches what is not kept yet.

    What cannot be fetched is kept with its reason, too, and refused with it, as long as the limits are the same. Where
    another attempt may go better (``retry``: a server that does not answer), the next one that asks tries again.

    Args:
        fetcher: Asks the web.
        folder: Keeps what came, by its address, and in ``failed`` why what did not.
    """

    def __init__(self, fetcher: Fetcher, folder: Path) -> None:
        self._fetcher = fetcher
        self._folder = folder
        # What a larger size or a host that is allowed now lets through is not refused for what was before.
        self._limits_key = hashlib.sha256(repr(fetcher.limits).encode()).hexdigest()[:8]

    def fetch(self, url: str) -> Fetched:
        """As ``Fetcher.fetch``."""
        digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
        file = self._folder / digest[:2] / digest
        if file.is_file():
            head, _, content = file.read_bytes().partition(b"\n")
            return Fetched(content=content, **json.loads(head))
        failed = self._folder / "failed" / digest[:2] / f"{digest}-{self._limits_key}.json"
        if failed.is_file():
            raise FetchError(**json.loads(failed.read_bytes()))
        try:
            fetched = self._fetcher.fetch(url)
        except FetchError as error:
            if not error.retry:
                reason = {"found": error.found, "needed": error.needed, "do": error.do}
                write_file(failed, json.dumps(reason))
            raise
        head = json.dumps({"url": fetched.url, "content_type": fetched.content_type}).encode()
        write_file(file, head + b"\n" + fetched.content)
        return fetched
