"""Where DVC keeps its objects: a folder, an S3 bucket, or a data set of the hub (``hub_remote.py``).

Reading, and what it takes to put a new snapshot beside those that are there; all else is ``dvc push``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from manyeyes.data.hub_remote import HUB_URL, HubRemote
from manyeyes.data.object_store import CHUNK, ObjectStore, missing_object
from manyeyes.errors import SnapshotError
from manyeyes.storage import new_file, write_file

if TYPE_CHECKING:
    from botocore.response import StreamingBody

_PUSH_AGAIN = "Push it again from a whole copy: dvc push"
# How often a store is asked that answers 500. With one failure in ten calls, six attempts fail once in a million
# objects; boto3's own three, once in a thousand.
_REQUESTS = 6
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "TooManyRequests")


class Remote(Protocol):
    """A DVC remote, read only. Keys are paths below its root, with forward slashes."""

    @property
    def url(self) -> str:
        """As the user wrote it."""

    @property
    def push_again(self) -> str:
        """What to do where something is missing or damaged."""

    def read(self, key: str) -> bytes | None:
        """A whole small object; ``None`` when there is none."""

    def stream(self, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        """An object's bytes from ``offset`` on; nothing when it ends there.

        Raises:
            SnapshotError: No such object, or the remote does not answer (``retry``).
        """


def open_remote(url: str) -> Remote:
    """Open a remote by its url.

    Args:
        url: A folder's path, ``s3://bucket/prefix``, or ``hub:OWNER/NAME@COMMIT``.

    Raises:
        SnapshotError: Another scheme, or no such folder.
    """
    if url.startswith("hub:"):
        return HubRemote(url)
    if url.startswith("s3://"):
        return S3Remote(url)
    if "://" in url:
        raise SnapshotError(
            f'data remote is "{url}"',
            "a folder, s3://bucket/prefix (any S3-compatible store: set AWS_ENDPOINT_URL) or hub:OWNER/NAME@COMMIT",
            "Use one of these, or copy the remote into a folder.",
        )
    return FolderRemote(url)


class WritableRemote(Remote, Protocol):
    """A DVC remote that takes objects."""

    def size(self, key: str) -> int | None:
        """Bytes of an object; ``None`` when there is none.

        Raises:
            SnapshotError: The remote does not answer (``retry``).
        """

    def write(self, key: str, content: Path | bytes) -> None:
        """Keep an object, which is there as a whole or not at all.

        Raises:
            SnapshotError: The remote refuses it, or does not answer (``retry``).
            StorageError: No space or no permission.
        """


def open_writable_remote(url: str) -> WritableRemote:
    """Open a remote to put objects into.

    Args:
        url: A folder's path, or ``s3://bucket/prefix``.

    Raises:
        SnapshotError: One that can only be read, another scheme, or no such folder.
    """
    remote = open_remote(url)
    if isinstance(remote, HubRemote):
        raise SnapshotError(
            f"{url} can only be read", "a folder or s3://bucket/prefix to write to", "Name another remote."
        )
    return cast("WritableRemote", remote)


def is_remote_address(url: str) -> bool:
    """Whether a remote is one that any machine can read: a bucket, or a data set of the hub at a revision."""
    return re.match("s3://[^/]", url) is not None or HUB_URL.fullmatch(url) is not None


class FolderRemote:
    """A remote in a folder.

    Args:
        url: The folder's path.

    Raises:
        SnapshotError: No such folder.
    """

    def __init__(self, url: str) -> None:
        self._path = Path(url)
        self._url = url
        if not self._path.is_dir():
            raise SnapshotError(
                f'data remote "{url}" is not a folder (seen from {Path.cwd()})',
                "a DVC remote",
                "Check data_remote, or run: dvc push",
            )

    @property
    def url(self) -> str:
        """The folder's path."""
        return self._url

    @property
    def push_again(self) -> str:
        """What to do where something is missing or damaged."""
        return _PUSH_AGAIN

    def read(self, key: str) -> bytes | None:
        """A whole small object; ``None`` when there is none.

        Raises:
            SnapshotError: It is there, but cannot be read.
        """
        try:
            return (self._path / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(self._url, key, error) from error

    def stream(self, key: str, *, offset: int, what: str) -> Iterator[bytes]:
        """An object's bytes from ``offset`` on.

        Raises:
            SnapshotError: No such object, or it cannot be read.
        """
        try:
            with (self._path / key).open("rb") as file:
                file.seek(offset)
                while chunk := file.read(CHUNK):
                    yield chunk
        except FileNotFoundError as error:
            raise missing_object(self._url, key, what, do=_PUSH_AGAIN) from error
        except OSError as error:
            raise _refused(self._url, key, error) from error

    def size(self, key: str) -> int | None:
        """Bytes of an object; ``None`` when there is none."""
        path = self._path / key
        return path.stat().st_size if path.is_file() else None

    def write(self, key: str, content: Path | bytes) -> None:
        """Keep an object, which is there as a whole or not at all.

        Raises:
            StorageError: No space or no permission.
        """
        if isinstance(content, bytes):
            write_file(self._path / key, content)
            return
        with new_file(self._path / key) as file:
            shutil.copyfile(content, file)


class S3Remote(ObjectStore):
    """A remote in an S3 bucket, or in a store that speaks S3.

    Credentials, region and ``AWS_ENDPOINT_URL`` come from boto3's usual places.

    Args:
        url: ``s3://bucket/prefix``.

    Raises:
        SnapshotError: No bucket in the url, or boto3 is not installed.
    """

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise SnapshotError(f'data remote is "{url}"', "s3://bucket/prefix", "Name the bucket.")
        super().__init__(url.rstrip("/"), push_again=_PUSH_AGAIN)
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._client = _connect()

    def _breaks(self) -> tuple[type[Exception], ...]:
        from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

        # Of an object that was sent with a checksum, botocore says only that what came does not match it.
        return HTTPClientError, IncompleteReadError, FlexibleChecksumError

    def _open(self, key: str, *, offset: int) -> Iterator[bytes] | None:
        from botocore.exceptions import BotoCoreError, ClientError

        full_key = self._full_key(key)
        try:
            if offset:
                response = self._client.get_object(Bucket=self._bucket, Key=full_key, Range=f"bytes={offset}-")
            else:
                response = self._client.get_object(Bucket=self._bucket, Key=full_key)
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError):
                if error.response.get("Error", {}).get("Code", "") in ("NoSuchKey", "404"):
                    return None
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) == 416:  # at the object's end
                    return iter(())
            raise self._refusal(error, full_key) from error
        return _read_body(response["Body"])

    def size(self, key: str) -> int | None:
        """Bytes of an object; ``None`` when there is none.

        Raises:
            SnapshotError: The store does not answer or refuses.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        full_key = self._full_key(key)
        try:
            return int(self._client.head_object(Bucket=self._bucket, Key=full_key)["ContentLength"])
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                return None
            raise self._refusal(error, full_key) from error

    def write(self, key: str, content: Path | bytes) -> None:
        """Keep an object of at most 5 GB, which is there as a whole or not at all.

        Raises:
            SnapshotError: The store does not answer (``retry``) or refuses.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        full_key = self._full_key(key)
        opened = contextlib.nullcontext(content) if isinstance(content, bytes) else content.open("rb")
        try:
            with opened as body:
                self._client.put_object(Bucket=self._bucket, Key=full_key, Body=body)
        except (ClientError, BotoCoreError) as error:
            raise self._refusal(error, full_key) from error

    def list_names(self) -> Iterator[str]:
        """Keys of all objects below the root, relative to it, sorted as S3 sorts them: by their bytes.

        Raises:
            SnapshotError: The store does not answer or refuses.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        prefix = self._full_key("")
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        try:
            for page in pages:
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):  # a folder, as some tools mark it
                        yield entry["Key"].removeprefix(prefix)
        except (ClientError, BotoCoreError) as error:
            raise self._refusal(error, prefix) from error

    def _full_key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _refusal(self, error: Exception, full_key: str) -> SnapshotError:
        from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError, TokenRetrievalError

        if isinstance(error, ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                return SnapshotError(
                    f'{self._url}: there is no bucket "{self._bucket}"',
                    "the bucket of the remote",
                    "Check data_remote.",
                )
            if status >= 500 or code in _BUSY:
                return SnapshotError(
                    f"{self._url} failed at {full_key}: {code} ({status}), as often as it was asked",
                    "an S3 store that answers",
                    "Run it again: what was fetched is kept. AWS_MAX_ATTEMPTS says how often an object is asked for.",
                    retry=True,
                )
            return _no_credentials(f"{self._url} refused {full_key}: {code} ({status})")
        if isinstance(error, NoCredentialsError | PartialCredentialsError | TokenRetrievalError):
            return _no_credentials(f"{self._url} cannot be read: {error}")
        return SnapshotError(
            f"{self._url} cannot be reached: {error}",
            "an S3 store that answers",
            "Check the network and AWS_ENDPOINT_URL.",
            retry=True,
        )


def _read_body(body: StreamingBody) -> Iterator[bytes]:
    with contextlib.closing(body):
        yield from body.iter_chunks(CHUNK)


def _connect() -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.session import get_session
    except ImportError as error:
        raise SnapshotError(
            "boto3 is not installed", "boto3 for s3:// remotes", "pip install 'manyeyes[data]'"
        ) from error
    core = get_session()
    # From AWS_MAX_ATTEMPTS or a profile.
    attempts = core.get_config_variable("max_attempts") or _REQUESTS
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts}, max_pool_connections=32, connect_timeout=10
    )
    return boto3.Session(botocore_session=core).client("s3", config=config)


def _no_credentials(found: str) -> SnapshotError:
    return SnapshotError(
        found,
        "credentials that may list and read the bucket, and write to it where something is put there",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the pod's role), then run again.",
    )


def _refused(url: str, key: str, error: OSError) -> SnapshotError:
    return SnapshotError(
        f"remote {url}: {key} cannot be read: {error}", "a file that can be read", "Check the folder's permissions."
    )
