"""Objects behind a connection that may break off: what a bucket and the hub have in common."""

from __future__ import annotations

import abc
from collections.abc import Iterator

from manyeyes.errors import SnapshotError

CHUNK = 1024**2
# How often an object is taken up again that breaks off.
_ATTEMPTS = 4


class ObjectStore(abc.ABC):
    """A remote whose objects are read on where they broke off.

    Args:
        url: As the user wrote it.
        push_again: What to do where an object is missing or damaged.
    """

    def __init__(self, url: str, *, push_again: str) -> None:
        self._url = url
        self._push_again = push_again

    @property
    def url(self) -> str:
        """As the user wrote it."""
        return self._url

    @property
    def push_again(self) -> str:
        """What to do where something is missing or damaged."""
        return self._push_again

    def read(self, key: str) -> bytes | None:
        """A whole small object; ``None`` when there is none.

        Raises:
            SnapshotError: The store does not answer or refuses (``retry`` where another attempt may help).
        """
        chunks = self._open(key, offset=0)
        return None if chunks is None else b"".join(self._read_on(chunks, key, offset=0, what=key))

    def stream(self, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        """An object's bytes from ``offset`` on; a connection that breaks off is taken up where it ended.

        Raises:
            SnapshotError: No such object, or the store does not answer or refuses.
        """
        yield from self._read_on(self._must_open(key, offset=offset, what=what), key, offset=offset, what=what)

    def _read_on(self, chunks: Iterator[bytes], key: str, *, offset: int, what: str) -> Iterator[bytes]:
        attempt = 1
        while True:
            try:
                for chunk in chunks:
                    offset += len(chunk)
                    yield chunk
                return
            except self._breaks() as error:
                if attempt == _ATTEMPTS:
                    raise SnapshotError(
                        f"{self._url}: {what} broke off after {offset} bytes, {_ATTEMPTS} times: {error}",
                        "the whole object",
                        "Run it again: what was fetched is kept.",
                        retry=True,
                    ) from error
            attempt += 1
            chunks = self._must_open(key, offset=offset, what=what)

    def _must_open(self, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        chunks = self._open(key, offset=offset)
        if chunks is None:
            raise missing_object(self._url, key, what, do=self._push_again)
        return chunks

    @abc.abstractmethod
    def _open(self, key: str, *, offset: int) -> Iterator[bytes] | None:
        """An object's chunks from ``offset`` on, nothing when it ends there; ``None`` when there is no object."""

    @abc.abstractmethod
    def _breaks(self) -> tuple[type[Exception], ...]:
        """What the chunks raise when the connection breaks off."""


def missing_object(url: str, key: str, what: str, *, do: str) -> SnapshotError:
    """The error for a remote that lacks an object.

    Args:
        url: The remote.
        key: The object.
        what: It holds.
        do: What to do about it.
    """
    return SnapshotError(f"remote {url} lacks {what} ({key})", "every file of the snapshot", do)
