"""Webhooks: a JSON body sent to an address, signed where there is a secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

_TIMEOUT_S = 10.0
# Before the second and the third attempt.
_WAITS_S = (1.0, 3.0)
_BUSY = 429


def post_json(
    url: str,
    body: str,
    *,
    timeout_s: float = _TIMEOUT_S,
    waits_s: tuple[float, ...] = _WAITS_S,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Send a JSON body, again where the service is busy or away.

    Args:
        url: ``http://`` or ``https://``. It may hold a secret, and is never shown.
        body: JSON text.
        timeout_s: For each attempt.
        waits_s: Before each further attempt.
        headers: Beside the content's type.

    Returns:
        What came of it, in words, with the service's host alone.
    """
    parts = urlsplit(url)
    host = parts.hostname or "no host"
    if parts.scheme not in ("http", "https"):
        return f"not sent: the webhook's address begins with {parts.scheme or 'nothing'}, and not with https"
    request = urllib.request.Request(
        url, data=body.encode(), headers={"Content-Type": "application/json", **(headers or {})}
    )
    reason = ""
    for wait in (0.0, *waits_s):
        time.sleep(wait)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return f"sent to {host} ({answer.status})"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"it answers {error.code}"
            if error.code < 500 and error.code != _BUSY:
                break
        except (OSError, http.client.HTTPException) as error:
            # urllib wraps some of these in URLError, which is an OSError.
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    return f"not sent: {host}: {reason}"


def sign(body: str, secret: str) -> dict[str, str]:
    """The headers that prove who sent a body, as the Standard Webhooks specification names them.

    The signature is ``v1,`` and the base64 of HMAC-SHA256 over ``id.timestamp.body``: what MLflow's own webhooks carry
    too, under other names. A receiver refuses an old timestamp and an id that it has seen.

    Args:
        body: JSON text.
        secret: Shared with the receiver.
    """
    headers = {"webhook-id": uuid.uuid4().hex, "webhook-timestamp": str(int(time.time()))}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}"
    digest = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()
    return {**headers, "webhook-signature": f"v1,{base64.b64encode(digest).decode()}"}
