"""A DVC remote that lies in a data set repository of the Hugging Face hub.

``hf upload OWNER/NAME infra/dvc-remote . --repo-type dataset`` puts one there. Objects come from the hub's resolve
addresses, which send large files on to a store; ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are understood.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from manyeyes.errors import SnapshotError

if TYPE_CHECKING:
    import urllib3

_CHUNK = 1024**2
_ATTEMPTS = 4  # of an object that breaks off
_REQUESTS = 5  # of one that the hub is too busy for
_BUSY = (429, 500, 502, 503, 504)
_CONNECT_S, _READ_S = 10.0, 60.0


class HubRemote:
    """A remote in a data set repository at a revision, which should be a commit: branches move.

    Args:
        url: ``hub:OWNER/NAME@REVISION``.

    Raises:
        SnapshotError: Not such an address, or the hub may not be asked.
    """

    def __init__(self, url: str) -> None:
        match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)@([\w./-]+)", url)
        if match is None:
            raise SnapshotError(
                f'data remote is "{url}"', "hub:OWNER/NAME@COMMIT", "Copy the commit from the data set's history."
            )
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise SnapshotError(
                f"{url} may not be asked: HF_HUB_OFFLINE is set", "the hub", "Unset it, or use a remote in a folder."
            )
        self._url, self._repository, self._revision = url, match[1], match[2]

    @property
    def url(self) -> str:
        """``hub:OWNER/NAME@REVISION``."""
        return self._url

    def read(self, key: str) -> bytes | None:
        """A whole small object; ``None`` when there is none.

        Raises:
            SnapshotError: The hub does not answer or refuses (``retry`` where another attempt may help).
        """
        response = self._open(key, offset=0)
        return None if response is None else b"".join(self._read_on(response, key, offset=0, what=key))

    def stream(self, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        """An object's bytes from ``offset`` on; a connection that breaks off is taken up where it ended.

        Raises:
            SnapshotError: No such object, or the hub does not answer or refuses.
        """
        yield from self._read_on(self._must_open(key, offset=offset, what=what), key, offset=offset, what=what)

    def _read_on(self, response: urllib3.BaseHTTPResponse, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        attempt = 1
        while True:
            try:
                for chunk in response.stream(_CHUNK):
                    offset += len(chunk)
                    yield chunk
                return
            except HTTPError as error:
                if attempt == _ATTEMPTS:
                    raise SnapshotError(
                        f"{self._url}: {what} broke off after {offset} bytes, {_ATTEMPTS} times: {error}",
                        "the whole object",
                        "Run it again: what was fetched is kept.",
                        retry=True,
                    ) from error
            finally:
                response.release_conn()
            attempt += 1
            response = self._must_open(key, offset=offset, what=what)

    def _must_open(self, key: str, *, offset: int, what: str) -> urllib3.BaseHTTPResponse:
        response = self._open(key, offset=offset)
        if response is None:
            raise SnapshotError(
                f"remote {self._url} lacks {what} ({key})",
                "every file of the snapshot",
                "Upload the remote again from a whole copy, and name the new commit.",
            )
        return response

    def _open(self, key: str, *, offset: int) -> urllib3.BaseHTTPResponse | None:
        from huggingface_hub import constants, get_token
        from urllib3.exceptions import HTTPError

        address = (
            f"{constants.ENDPOINT}/datasets/{self._repository}/resolve/{quote(self._revision, safe='')}/{quote(key)}"
        )
        headers = {"Accept-Encoding": "identity"}
        if token := get_token():
            headers["Authorization"] = f"Bearer {token}"  # urllib3 does not send it on to another host
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            response: urllib3.BaseHTTPResponse = self._pool.request(
                "GET", address, headers=headers, preload_content=False
            )
            if response.status == 200 and offset:  # who does not know of ranges sends the whole
                while offset and (skipped := response.read(min(offset, _CHUNK))):
                    offset -= len(skipped)
        except HTTPError as error:
            raise SnapshotError(
                f"{self._url} cannot be reached: {error}",
                "a hub that answers",
                "Check the network and HF_ENDPOINT.",
                retry=True,
            ) from error
        if response.status in (200, 206):
            return response
        response.drain_conn()
        if response.status == 416:  # at the object's end
            return self._empty()
        self._refuse(response, key)
        return None

    def _refuse(self, response: urllib3.BaseHTTPResponse, key: str) -> None:
        reason = response.headers.get("X-Error-Code", "")
        if response.status == 404 and reason not in ("RepoNotFound", "RevisionNotFound"):
            return
        if response.status in _BUSY:
            raise SnapshotError(
                f"{self._url} failed at {key} ({response.status}), {_REQUESTS} times",
                "a hub that answers",
                "Run it again: what was fetched is kept.",
                retry=True,
            )
        raise SnapshotError(
            f"{self._url} refused {key}: {reason or 'no reason given'} ({response.status})",
            "a data set and a commit that exist and that you may read",
            "Check the address; for a private or gated data set set HF_TOKEN.",
        )

    @staticmethod
    def _empty() -> urllib3.BaseHTTPResponse:
        import urllib3

        return urllib3.HTTPResponse(io.BytesIO(), preload_content=False)

    @cached_property
    def _pool(self) -> Any:
        import urllib3

        retries = urllib3.Retry(
            total=_REQUESTS - 1, backoff_factor=0.2, status_forcelist=_BUSY, raise_on_status=False, redirect=5
        )
        return urllib3.PoolManager(
            maxsize=16, retries=retries, timeout=urllib3.Timeout(connect=_CONNECT_S, read=_READ_S)
        )
