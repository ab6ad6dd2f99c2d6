"""A DVC remote that lies in a data set repository of the Hugging Face hub.

``hf upload OWNER/NAME infra/dvc-remote . --repo-type dataset`` puts one there. Objects come from the hub's resolve
addresses, which send large files on to a store; ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from manyeyes.data.object_store import CHUNK, ObjectStore
from manyeyes.errors import SnapshotError

if TYPE_CHECKING:
    import urllib3

_REQUESTS = 5  # of one that the hub is too busy for
_BUSY = (429, 500, 502, 503, 504)
_CONNECT_S, _READ_S = 10.0, 60.0


HUB_URL = re.compile(r"hub:([\w.-]+/[\w.-]+)@([\w./-]+)")


class HubRemote(ObjectStore):
    """A remote in a data set repository at a revision, which should be a commit: branches move.

    Args:
        url: ``hub:OWNER/NAME@REVISION``.

    Raises:
        SnapshotError: Not such an address, or the hub may not be asked.
    """

    def __init__(self, url: str) -> None:
        match = HUB_URL.fullmatch(url)
        if match is None:
            raise SnapshotError(
                f'data remote is "{url}"', "hub:OWNER/NAME@COMMIT", "Copy the commit from the data set's history."
            )
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise SnapshotError(
                f"{url} may not be asked: HF_HUB_OFFLINE is set", "the hub", "Unset it, or use a remote in a folder."
            )
        super().__init__(url, push_again="Upload the remote again from a whole copy, and name the new commit.")
        self._repository, self._revision = match[1], match[2]

    def _breaks(self) -> tuple[type[Exception], ...]:
        from urllib3.exceptions import HTTPError

        return (HTTPError,)

    def _open(self, key: str, *, offset: int) -> Iterator[bytes] | None:
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
                while offset and (skipped := response.read(min(offset, CHUNK))):
                    offset -= len(skipped)
        except HTTPError as error:
            raise SnapshotError(
                f"{self._url} cannot be reached: {error}",
                "a hub that answers",
                "Check the network and HF_ENDPOINT.",
                retry=True,
            ) from error
        if response.status in (200, 206):
            return _read_body(response)
        response.drain_conn()
        if response.status == 416:  # at the object's end
            return iter(())
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

    @cached_property
    def _pool(self) -> Any:
        import urllib3

        retries = urllib3.Retry(
            total=_REQUESTS - 1, backoff_factor=0.2, status_forcelist=_BUSY, raise_on_status=False, redirect=5
        )
        return urllib3.PoolManager(
            maxsize=16, retries=retries, timeout=urllib3.Timeout(connect=_CONNECT_S, read=_READ_S)
        )


def _read_body(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    try:
        yield from response.stream(CHUNK)
    finally:
        response.release_conn()
