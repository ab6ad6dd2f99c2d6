"""What MLflow, its database and its artifact store raise, told in words that say what to set."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import mlflow
import mlflow.exceptions
import requests  # type: ignore[import-untyped]
import sqlalchemy.exc
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

from manyeyes.errors import RegistryError, RegistryUnreachableError

T = TypeVar("T")

# A tag that tells the things made by two requests apart, so that one whose answer was lost is found again.
REQUEST = "manyeyes.request"

# Longest wait between two attempts; with MLflow's seven retries that makes a minute and a half, as long as a server
# takes to come back.
LONGEST_WAIT_S = 30.0
# Requests that never got an answer are plain MlflowExceptions that name the request; so are database failures, and
# downloads that broke off.
_UNREACHABLE = (
    "failed with exception",
    "failed with timeout",
    "Max retries exceeded",
    "OperationalError",
    "DatabaseError",
    "ConnectionError",
    "Connection broken",
    "Connection aborted",
    "ended prematurely",
    "Incomplete read",
    "IncompleteRead",
    "500 Server Error",
    "502 Server Error",
    "503 Server Error",
    "504 Server Error",
    "error code 500",
    "error code 502",
    "error code 503",
    "error code 504",
)
_WRONG_KEYS = re.compile(
    "InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|ExpiredToken|InvalidToken|Unable to locate credentials|"
    "NoCredentialsError|PartialCredentialsError"
)
_ARTIFACTS = re.compile("mlflow-artifacts|s3:|Failed to upload")
# What S3 adds to an address that anyone may then use for an hour.
_SIGNED = re.compile(r"\?[^\s'\"]*X-Amz-[^\s'\"]*")


@contextmanager
def registry_errors() -> Iterator[None]:
    """Turn what MLflow and its stores raise into ``RegistryError`` or ``RegistryUnreachableError``."""
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        raise _explain(error, str(error), error.error_code) from error
    except (sqlalchemy.exc.DBAPIError, sqlite3.Error) as error:
        raise unreachable(mlflow.get_tracking_uri(), str(error)) from error
    except requests.RequestException as error:  # artifacts that go through the server
        raise _explain(error, str(error), "") from error
    except _store_exceptions() as error:  # artifacts that go straight to S3
        raise _explain(error, f"s3: {error}", "") from error


def create_once(create: Callable[[], T], *, find: Callable[[], T | None]) -> T:
    """Make something of which there must not be two, although an answer may be lost.

    MLflow repeats a request that got no answer, and a server that did the work and then died is asked twice. Here the
    request is sent once; where no answer comes, ``find`` looks first whether the work was done.

    Args:
        create: Asks MLflow; run without its retries.
        find: What ``create`` made, or ``None``.

    Raises:
        RegistryError: MLflow refuses.
        RegistryUnreachableError: It did not answer as often as MLflow itself would have asked
            (``MLFLOW_HTTP_REQUEST_MAX_RETRIES``).
    """
    # A database that fails is not asked again: MLflow has done so already.
    retries = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() if mlflow.get_tracking_uri().startswith("http") else 0
    for attempt in range(retries + 1):
        try:
            if attempt and (found := find()) is not None:
                return found
            with registry_errors(), asked_once():
                return create()
        except RegistryUnreachableError:
            if attempt == retries:
                raise
            time.sleep(min(2.0**attempt, LONGEST_WAIT_S))
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def asked_once(*, timeout_s: int | None = None) -> Iterator[None]:
    """No retries of MLflow's own.

    Args:
        timeout_s: For an answer; MLflow's own when left out.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    if timeout_s is not None:
        wanted["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout_s)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def unreachable(uri: str, reason: str) -> RegistryUnreachableError:
    """The error for a store that does not answer.

    Args:
        uri: Of the store; a password in it is not shown.
        reason: What was raised.
    """
    return RegistryUnreachableError(
        without_password(f"MLflow at {uri} does not answer ({_first_line(reason)})"),
        "a tracking server or store that does",
        "Start it, correct MLFLOW_TRACKING_URI, or unset it to use runs/mlflow.db.",
    )


def without_password(text: str) -> str:
    """A text without the user, password and signature of the addresses in it."""
    return _SIGNED.sub("?***", re.sub(r"//[^/@\s]+@", "//***@", text))


def may_pass(text: str) -> bool:
    """Whether what was raised is a failure of a server or a connection, which another attempt may not meet."""
    return any(sign in text for sign in _UNREACHABLE)


def _explain(error: Exception, text: str, code: str) -> RegistryError:
    uri = mlflow.get_tracking_uri()
    if _status(text, 401):
        return RegistryError(
            without_password(f"MLflow at {uri} does not know this user (401)"),
            "a user and password that it knows",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), then run again.",
        )
    if "Invalid Host header" in text:
        host = uri.partition("//")[2].rpartition("@")[2].partition("/")[0]
        return RegistryError(
            f'the MLflow server does not go by the name "{host}" (403)',
            "a name in its list of allowed hosts",
            f"Add {host} to MLFLOW_SERVER_ALLOWED_HOSTS (--allowed-hosts) of the server, or call it by another name.",
        )
    if _WRONG_KEYS.search(text) and _ARTIFACTS.search(text):
        return _wrong_keys(text)
    if code == "PERMISSION_DENIED" or _status(text, 403):
        return RegistryError(
            without_password(f"MLflow at {uri} does not allow this ({_first_line(text)})"),
            "a user who may",
            "Ask its administrator for EDIT on the experiment and MANAGE on the model (READ of both is enough to pull "
            "and compare), or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of another user.",
        )
    if code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED") or may_pass(text):
        return _artifacts_unreachable(text) if _ARTIFACTS.search(text) else unreachable(uri, text)
    if isinstance(error, mlflow.exceptions.MlflowException):
        return RegistryError(
            without_password(f"MLflow refuses ({_first_line(text)})"),
            "a request that it takes",
            "Check names and permissions.",
        )
    return _artifacts_unreachable(text)


def _status(text: str, status: int) -> bool:
    return f"error code {status} " in text or f"{status} Client Error" in text


def _wrong_keys(text: str) -> RegistryError:
    return RegistryError(
        without_password(f"the artifact store refuses the keys ({_first_line(text)})"),
        "S3 keys that may read and write MLflow's artifacts",
        "Where artifacts go through the MLflow server (mlflow-artifacts:), set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY of the server; where they go straight to s3://, set them here.",
    )


def _artifacts_unreachable(text: str) -> RegistryUnreachableError:
    return RegistryUnreachableError(
        without_password(f"MLflow's artifact store fails ({_first_line(text)})"),
        "a store that takes and gives files",
        "Run again. If it stays so: the MLflow server's log says why; check its S3 keys, bucket and "
        "MLFLOW_S3_ENDPOINT_URL.",
    )


def _first_line(text: str) -> str:
    return without_password(text.strip().partition("\n")[0])[:300]


def _store_exceptions() -> tuple[type[Exception], ...]:
    """S3's; evaluated only when something else than the above was raised, because importing boto3 takes a while."""
    try:
        import boto3.exceptions
        import botocore.exceptions
    except ImportError:
        return ()
    return (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, boto3.exceptions.Boto3Error)
