"""Images of a request: from data URIs, or from hosts that the operator allows; bounded in number, bytes and pixels."""

from __future__ import annotations

import base64
import http.client
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from manyeyes.errors import FetchError, RecordError
from manyeyes.runtime.preprocess import read_image_size
from manyeyes.web.public_hosts import PinnedConnection, find_public_address

_FETCH_S = 10.0
_CHUNK = 2**16


@dataclass(frozen=True)
class ImageLimits:
    """What a request may bring.

    Attributes:
        max_images: Images in one request.
        max_pixels: Width times height of one, as its header says, before anything is decoded.
        max_bytes: Bytes of one that is fetched.
        allowed_hosts: Hosts that images may be fetched from; none by default.
    """

    max_images: int = 8
    max_pixels: int = 40_000_000
    max_bytes: int = 20 * 2**20
    allowed_hosts: tuple[str, ...] = ()


def collect_images(urls: Sequence[str], limits: ImageLimits) -> tuple[bytes, ...]:
    """Image files of a request, in order.

    Raises:
        RecordError: Too many, too large, no image, or a URL that may not be fetched or cannot be.
    """
    if len(urls) > limits.max_images:
        raise RecordError(
            f"request has {len(urls)} images", f"at most {limits.max_images} are taken", "Send fewer images."
        )
    images = []
    for place, url in enumerate(urls):
        data = _decode(url, place) if url.startswith("data:") else _fetch(url, limits)
        width, height = read_image_size(data)
        if width * height > limits.max_pixels:
            raise RecordError(
                f"image {place} is {width} x {height} pixels",
                f"at most {limits.max_pixels} pixels are taken",
                "Shrink it.",
            )
        images.append(data)
    return tuple(images)


def _decode(url: str, place: int) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RecordError(f"image {place} is {head[:60]!r}", "data:image/png;base64,...", "Encode it in base64.")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise RecordError(f"image {place} is no base64 ({error})", "base64 after the comma", "Encode it.") from error


def _fetch(url: str, limits: ImageLimits) -> bytes:
    """A remote image: from an allowed host, at a public address, without redirects, bounded in bytes and time."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RecordError(f"image_url is {url[:60]!r} ({error})", "a data URI", "Correct it.") from error
    if parts.scheme not in ("http", "https") or host not in limits.allowed_hosts:
        allowed = ", ".join(limits.allowed_hosts)
        raise RecordError(
            f"image_url is {url[:60]!r}",
            f"a data URI{f', or http(s) from {allowed},' if allowed else ''} is taken",
            "Send the image itself as data:image/...;base64,... (or start the server with --allow-image-host).",
        )
    secure = parts.scheme == "https"
    deadline = time.monotonic() + _FETCH_S
    try:
        address = find_public_address(host, port or (443 if secure else 80))
        connection = PinnedConnection(host, address, secure=secure, timeout=_FETCH_S)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*"})
            response = connection.getresponse()
            if response.status != 200:  # a redirect could lead anywhere
                raise RecordError(f"{host} answers {response.status}", "the image itself, with 200", "Send it inline.")
            data = b""
            while chunk := response.read(_CHUNK):
                data += chunk
                if len(data) > limits.max_bytes or time.monotonic() > deadline:
                    raise RecordError(
                        f"the image at {host} is too large or too slow",
                        f"at most {limits.max_bytes} bytes within {_FETCH_S:.0f} s are read",
                        "Send it inline, or smaller.",
                    )
            return data
        finally:
            connection.close()
    except FetchError as error:
        raise RecordError(error.found, error.needed, "Send the image inline.") from error
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise RecordError(
            f"image_url {url[:60]!r} cannot be fetched ({error})", "a server that answers", "Send it inline."
        ) from error
