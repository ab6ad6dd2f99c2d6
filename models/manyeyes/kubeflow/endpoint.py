"""A Kubeflow Pipelines endpoint: the SDK's generated services over a transport that retries and never doubles.

``kfp.Client`` prints, reads a file in the home directory, waits without a limit and repeats nothing, so only the SDK's
generated services and models (``kfp_server_api``) are used, with a transport of our own under them.

Whether a request may be sent again depends on its method, on what came back and on whether it arrived at all. That is
the whole of the loop; the pause, which a library for retries would give, is three lines.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import kfp_server_api
import urllib3
from kfp_server_api import models

from manyeyes.errors import EndpointError

# Where a pod finds the token that Kubeflow's pipelines accept:
# https://www.kubeflow.org/docs/components/pipelines/user-guides/core-functions/connect-api/
_POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
_CONNECT_TIMEOUT_S = 10.0
BUSY = (429, 503)
BROKEN = (500, 502, 504)


@dataclass(frozen=True)
class EndpointSettings:
    """How to reach an endpoint.

    Args:
        url: Its address, with the path under which Kubeflow serves pipelines where there is one.
        namespace: Kubeflow namespace of the user; empty for Kubeflow of one user.
        token_file: File of a bearer token, read again for each call, since Kubernetes renews it.
        token: A bearer token.
        cookie: A ``Cookie`` header, for instance ``oauth2_proxy_kubeflow=...``.
        ca_cert: Certificate authority of the endpoint.
        ui: Address of Kubeflow's pages for people; empty when it is not known.
        timeout_s: Seconds to wait for an answer.
        attempts: How often a call is made at most.
        pause_s: Seconds before the second attempt; doubles with each.
    """

    url: str
    namespace: str = ""
    token_file: str = ""
    token: str = ""
    cookie: str = ""
    ca_cert: str = ""
    ui: str = ""
    timeout_s: float = 60.0
    attempts: int = 5
    pause_s: float = 0.5

    @classmethod
    def from_environment(cls, url: str = "", environment: Mapping[str, str] = os.environ) -> EndpointSettings:
        """Settings from ``KFP_*`` variables; secrets come from nowhere else.

        Raises:
            EndpointError: No address, a wrong one, or two ways to sign in.
        """
        url = (url or environment.get("KFP_ENDPOINT", "")).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            # Never shown: someone may have put a password into it.
            shown = "not set" if not url else f'"{parts.scheme}://{parts.hostname or ""}"'
            raise EndpointError(
                f"the endpoint is {shown}",
                "http://HOST[:PORT][/PATH] or https://..., without user and password",
                "Set KFP_ENDPOINT or give --endpoint, for instance: kubectl port-forward -n kubeflow "
                "svc/ml-pipeline 8888:8888, then KFP_ENDPOINT=http://localhost:8888",
            )
        ways = {name: environment.get(name, "") for name in ("KFP_TOKEN_FILE", "KFP_TOKEN", "KFP_COOKIE")}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise EndpointError(f"{' and '.join(given)} are set", "one way to sign in", f"Unset {given[-1]}.")
        timeout = environment.get("KFP_TIMEOUT_S") or "60"
        if not re.fullmatch(r"\d+(\.\d+)?", timeout) or float(timeout) == 0:
            raise EndpointError(f'KFP_TIMEOUT_S is "{timeout}"', "a number of seconds", "For instance: 120")
        token_file = ways["KFP_TOKEN_FILE"] or (str(_POD_TOKEN) if not given and _POD_TOKEN.is_file() else "")
        return cls(
            url=url,
            namespace=environment.get("KFP_NAMESPACE", ""),
            token_file=token_file,
            token=ways["KFP_TOKEN"],
            cookie=ways["KFP_COOKIE"],
            ca_cert=environment.get("KFP_CA_CERT", ""),
            timeout_s=float(timeout),
            # The API server itself, behind a port-forward, has no pages; the gateway has both under one path.
            ui=(environment.get("KFP_UI_ENDPOINT") or (url if parts.path else "")).rstrip("/"),
        )

    @property
    def signs_in(self) -> str:
        """How, in words, for messages."""
        if self.token_file:
            return f"the token in {self.token_file}"
        if self.token:
            return "KFP_TOKEN"
        return "KFP_COOKIE" if self.cookie else "no credentials"


class AnsweredError(EndpointError):
    """The endpoint answered, and not with what was asked for; ``status`` is HTTP's."""

    status = 0


class UnknownOutcomeError(EndpointError):
    """A request left, and nothing says whether it took effect; ``timed_out`` when no answer came in time."""

    timed_out = False


@dataclass
class HttpReply:
    """What the SDK's generated client needs of an answer."""

    status: int
    reason: str
    data: Any
    headers: Mapping[str, str]

    def getheader(self, name: str, default: str | None = None) -> str | None:
        """One header."""
        return self.headers.get(name, default)

    def getheaders(self) -> Mapping[str, str]:
        """All headers."""
        return self.headers


class Transport:
    """Sends the generated client's requests: limits, retries, and errors in words."""

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        timeout = urllib3.Timeout(connect=min(_CONNECT_TIMEOUT_S, settings.timeout_s), read=settings.timeout_s)
        # A redirect leads to a login page, whose 200 would look like an answer.
        options: dict[str, Any] = {"timeout": timeout, "retries": False}
        if settings.ca_cert:
            options["ssl_context"] = ssl.create_default_context(cafile=settings.ca_cert)
        self._pool = urllib3.PoolManager(**options)

    def close(self) -> None:
        """Close its connections."""
        self._pool.clear()

    # The generated client calls these by the name of the HTTP method.
    def GET(self, url: str, **call: Any) -> HttpReply:  # noqa: N802
        """Read; repeated until it works or all attempts are spent."""
        return self._repeat("GET", url, **call)

    def DELETE(self, url: str, **call: Any) -> HttpReply:  # noqa: N802
        """Remove; repeated like reading."""
        return self._repeat("DELETE", url, **call)

    def POST(self, url: str, **call: Any) -> HttpReply:  # noqa: N802
        """Make or switch; what makes something is repeated only when it surely did not take effect."""
        # Switching something on or off twice is the same as once; creating is not.
        if re.search(r":(enable|disable|terminate)$", url):
            return self._repeat("POST", url, **call)
        return self._send("POST", url, repeat_broken=False, **call)

    def _repeat(self, method: str, url: str, **call: Any) -> HttpReply:
        return self._send(method, url, repeat_broken=True, **call)

    def _send(self, method: str, url: str, *, repeat_broken: bool, **call: Any) -> HttpReply:
        attempt = 1
        while True:
            last = attempt >= self._settings.attempts
            try:
                reply = self.once(method, url, **call)
            except UnknownOutcomeError:
                if last or not repeat_broken:
                    raise
                wait = None
            except _NotSentError as error:
                if last:
                    raise EndpointError(error.found, error.needed, error.do, retry=True) from error
                wait = None
            else:
                # Kubeflow's gateway answers a stranger with a page to sign in on.
                is_page = "html" in (reply.getheader("Content-Type") or "")
                if 200 <= reply.status < 300 and not is_page:
                    return reply
                if last or not (reply.status in BUSY or (repeat_broken and reply.status in BROKEN)):
                    raise self._explain(method, url, reply)
                wait = reply.getheader("Retry-After")
            self._wait(attempt, wait)
            attempt += 1

    def _wait(self, attempt: int, told: str | None) -> None:
        pause = self._settings.pause_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        if told and told.isdigit():
            pause = max(pause, min(float(told), 60.0))
        time.sleep(pause)

    def once(
        self,
        method: str,
        url: str,
        *,
        query_params: Any = None,
        headers: Mapping[str, str] | None = None,
        post_params: Any = None,
        body: Any = None,
        **_unused: Any,
    ) -> HttpReply:
        """One request, whatever its status."""
        headers = dict(headers or {})
        if query_params:
            url += "?" + urlencode(query_params)
        content: dict[str, Any] = {}
        if headers.get("Content-Type") == "multipart/form-data":
            del headers["Content-Type"]
            content = {"fields": post_params, "encode_multipart": True}
        elif body is not None:
            content = {"body": json.dumps(body)}
        host = urlsplit(url).netloc
        try:
            answer = self._pool.request(method, url, headers=headers, **content)
        except urllib3.exceptions.SSLError as error:
            raise EndpointError(
                f"{host} has no certificate that this machine trusts ({error})",
                "a certificate of a known authority",
                "Set KFP_CA_CERT to the authority's file.",
            ) from error
        except (
            urllib3.exceptions.NewConnectionError,
            urllib3.exceptions.ConnectTimeoutError,
            urllib3.exceptions.NameResolutionError,
        ) as error:
            raise _NotSentError(
                f"{host} cannot be reached ({type(error).__name__})",
                "a Kubeflow Pipelines endpoint that answers there",
                "Check KFP_ENDPOINT and the network; with a port-forward, that it still runs.",
            ) from error
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            timed_out = isinstance(error, urllib3.exceptions.TimeoutError)
            outcome = UnknownOutcomeError(
                f"{host} gave no answer within {self._settings.timeout_s:g} s"
                if timed_out
                else f"{host} broke the connection off in the middle of {method} ({type(error).__name__})",
                "a whole answer",
                "Run the same command again"
                + (", with KFP_TIMEOUT_S set higher if it is just slow." if timed_out else "."),
                retry=True,
            )
            outcome.timed_out = timed_out
            raise outcome from error
        return HttpReply(answer.status, answer.reason or "", answer.data, answer.headers)

    def _explain(self, method: str, url: str, reply: HttpReply) -> AnsweredError:
        host = urlsplit(url).netloc
        message = _message_of(reply)
        settings = self._settings
        if reply.status in (401, 403) or 200 <= reply.status < 400:
            how = "a page to sign in on" if reply.status < 400 else f"HTTP {reply.status}{message}"
            error = AnsweredError(
                f"{host} refuses {settings.signs_in} ({how})",
                "credentials that the endpoint accepts"
                + (", for this namespace" if reply.status == 403 and settings.namespace else ""),
                "Set KFP_TOKEN_FILE, KFP_TOKEN or KFP_COOKIE (docs/endpoint.md says which), and KFP_NAMESPACE for "
                "Kubeflow of several users.",
            )
        elif reply.status in (*BUSY, *BROKEN):
            error = AnsweredError(
                f"{host} answers HTTP {reply.status}{message}, {settings.attempts} times over"
                if reply.status in BUSY or method != "POST"
                else f"{host} answers HTTP {reply.status}{message}",
                "an endpoint in working order",
                "Wait and run the same command again; look at: kubectl logs -n kubeflow deploy/ml-pipeline",
                retry=True,
            )
        else:
            error = AnsweredError(
                f"{host} answers HTTP {reply.status}{message} to {method} {urlsplit(url).path}",
                "a request that it accepts",
                "Check the names and values in the message."
                if reply.status != 404
                else "Check KFP_ENDPOINT: behind Kubeflow's gateway it ends in /pipeline.",
            )
        error.status = reply.status
        return error


class _NotSentError(EndpointError):
    """The request did not leave this machine."""


def _message_of(reply: HttpReply) -> str:
    try:
        parsed = json.loads(reply.data)
    except ValueError:
        return ""
    text = str(parsed.get("message") or parsed.get("error") or "") if isinstance(parsed, dict) else ""
    # The backend's messages carry Go stack traces after the first line.
    return f": {text.splitlines()[0][:300]}" if text else ""


_LOG_BYTES = 2 * 2**20

T = TypeVar("T")


class Endpoint:
    """What ManyEyes asks of Kubeflow Pipelines.

    Args:
        settings: How to reach it.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        configuration = kfp_server_api.Configuration()
        configuration.host = settings.url
        if settings.token or settings.token_file:
            configuration.api_key["authorization"] = settings.token
            configuration.api_key_prefix["authorization"] = "Bearer"
        if settings.token_file:
            configuration.refresh_api_key_hook = self._read_token
        self._transport = Transport(settings)
        self._client = kfp_server_api.ApiClient(configuration, cookie=settings.cookie or None)
        self._client.rest_client = self._transport
        self.pipelines = kfp_server_api.PipelineServiceApi(self._client)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(self._client)
        self.runs = kfp_server_api.RunServiceApi(self._client)
        self.experiments = kfp_server_api.ExperimentServiceApi(self._client)
        self.schedules = kfp_server_api.RecurringRunServiceApi(self._client)

    def close(self) -> None:
        """Close its connections."""
        self._transport.close()
        self._client.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _read_token(self, configuration: Any) -> None:
        try:
            token = Path(self.settings.token_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise EndpointError(
                f"KFP_TOKEN_FILE is {self.settings.token_file}, which cannot be read ({error.strerror})",
                "a file that holds a bearer token",
                "In a pod, mount a projected token for the audience pipelines.kubeflow.org.",
            ) from error
        configuration.api_key["authorization"] = token

    def named(self, listing: Callable[..., Any], field: str, name: str, **scope: Any) -> list[Any]:
        """Everything of one kind that bears a name, the newest first.

        Args:
            listing: The generated service's listing call.
            field: Field of its answer that holds the items.
            name: The name that people see.
            scope: Namespace, pipeline or the like.
        """
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        query = {"filter": json.dumps({"predicates": [predicate]}), "sort_by": "created_at desc", "page_size": 100}
        answer = listing(**query, **scope)
        return [item for item in getattr(answer, field) or [] if item.display_name == name]

    def create(self, look: Callable[[], T | None], make: Callable[[], T], *, unique: bool) -> tuple[T, bool]:
        """Make something that is not there yet, exactly once, whatever becomes of the answer.

        Looks by name first. When a request's outcome is unknown (connection broken off, 5xx, no answer in time), looks
        again, several times, and repeats the request only when the thing is still not there.

        Args:
            look: Finds it by its name.
            make: Asks the endpoint to make it.
            unique: Whether the endpoint itself refuses a second one of that name, so that even a request that may
                still be under way can be repeated.

        Returns:
            The thing, and whether it is new.

        Raises:
            EndpointError: The endpoint refuses, or it is unknown whether the thing was made.
        """
        found = look()
        if found is not None:
            return found, False
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return make(), True
            except AnsweredError as error:
                if error.status != 409 and error.status not in BROKEN:
                    raise
                failure: EndpointError = error
            except UnknownOutcomeError as error:
                failure = error
            found = self._look_again(look)
            if found is not None:
                return found, not (isinstance(failure, AnsweredError) and failure.status == 409)
            in_doubt = isinstance(failure, UnknownOutcomeError) and failure.timed_out and not unique
            if in_doubt or attempt == self.settings.attempts or getattr(failure, "status", 0) == 409:
                raise failure
        raise AssertionError("unreachable")

    def _look_again(self, look: Callable[[], T | None]) -> T | None:
        for number in range(4):
            time.sleep(self.settings.pause_s * 2**number)
            found = look()
            if found is not None:
                return found
        return None

    def pipeline(self, name: str) -> models.V2beta1Pipeline | None:
        """The pipeline of that name, or None."""
        scope = {"namespace": self.settings.namespace} if self.settings.namespace else {}
        found = self.named(self.pipelines.pipeline_service_list_pipelines, "pipelines", name, **scope)
        return found[0] if found else None

    def version(self, pipeline_id: str, name: str) -> models.V2beta1PipelineVersion | None:
        """The version of that name, or None."""
        listing = self.pipelines.pipeline_service_list_pipeline_versions
        found = self.named(listing, "pipeline_versions", name, pipeline_id=pipeline_id)
        return found[0] if found else None

    def experiment(self, name: str) -> models.V2beta1Experiment:
        """The experiment of that name, made when it is not there."""
        scope = {"namespace": self.settings.namespace} if self.settings.namespace else {}

        def look() -> models.V2beta1Experiment | None:
            found = self.named(self.experiments.experiment_service_list_experiments, "experiments", name, **scope)
            return found[0] if found else None

        def make() -> models.V2beta1Experiment:
            body = models.V2beta1Experiment(display_name=name, **scope)
            return self.experiments.experiment_service_create_experiment(experiment=body)

        return self.create(look, make, unique=True)[0]

    def run(self, name_or_id: str) -> models.V2beta1Run | None:
        """The run of that id or, failing that, the newest of that name; None when there is neither."""
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name_or_id):
            try:
                return self.runs.run_service_get_run(name_or_id)
            except AnsweredError as error:
                if error.status != 404:
                    raise
                return None
        scope = {"namespace": self.settings.namespace} if self.settings.namespace else {}
        found = self.named(self.runs.run_service_list_runs, "runs", name_or_id, **scope)
        return found[0] if found else None

    def schedule(self, name: str) -> models.V2beta1RecurringRun | None:
        """The recurring run of that name, or None."""
        scope = {"namespace": self.settings.namespace} if self.settings.namespace else {}
        listing = self.schedules.recurring_run_service_list_recurring_runs
        found = self.named(listing, "recurring_runs", name, **scope)
        return found[0] if found else None

    def workflow_of(self, run_id: str) -> str | None:
        """The Argo workflow of a run, as JSON; None where the endpoint does not hand it out.

        Only the older API has it, which the API server, Kubeflow's UI and its gateway all serve.
        """
        url = f"{self.settings.url}/apis/v1beta1/runs/{quote(run_id)}"
        try:
            reply = self._transport.GET(url, headers=self._own_headers())
            runtime = json.loads(reply.data).get("pipeline_runtime") or {}
        except AnsweredError as error:
            if error.retry:
                raise
            return None
        except (ValueError, AttributeError):
            return None
        return str(runtime.get("workflow_manifest") or "") or None

    def log_of(self, run_id: str, pod: str) -> str | None:
        """The end of what a pod of a run wrote; None when the endpoint cannot say.

        The API server serves logs itself (``ReadRunLogV1`` in kubeflow/pipelines, backend/src/apiserver/main.go), from
        the pod or, once that is gone, from the log archive; Kubeflow's UI, where the gateway lets only it through,
        under another path, which takes the pod's name and not the id of Argo's node. In Kubeflow of one user the API
        server finds archived logs only, by the run's status, and none where Argo has compressed that: so Kubeflow's
        pages are asked as well where their address is known.
        """
        base, own = self.settings.url, self._own_headers()
        query = {"podname": pod, "runid": run_id}
        if self.settings.namespace:
            query["podnamespace"] = self.settings.namespace
        ui_path = f"/k8s/pod/logs?{urlencode(query)}"
        places = [(f"{base}/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(pod)}/log", own), (base + ui_path, own)]
        if self.settings.ui not in ("", base):
            # Another address gets no credentials of this one.
            places.append((self.settings.ui + ui_path, {}))
        for url, headers in places:
            try:
                reply = self._transport.once("GET", url, headers=headers)
            except EndpointError:
                continue
            # Kubeflow's UI answers a path that it does not know with its front page, and the API server says in the
            # log's place why it has none: the answer has begun by then.
            is_page = "html" in (reply.getheader("Content-Type") or "")
            if reply.status == 200 and reply.data and not is_page and not reply.data.startswith(b'{"error_message":'):
                return bytes(reply.data[-_LOG_BYTES:]).decode(errors="replace")
        return None

    def _own_headers(self) -> dict[str, str]:
        """What signs in where the generated client does not ask."""
        headers: dict[str, str] = {}
        if self.settings.cookie:
            headers["Cookie"] = self.settings.cookie
        self._client.update_params_for_auth(headers, [], ["Bearer"])
        return headers
