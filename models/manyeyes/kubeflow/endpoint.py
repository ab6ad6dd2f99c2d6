"""A Kubeflow Pipelines endpoint: the SDK's generated services over a transport that retries and never doubles.

``kfp.Client`` prints, reads a file in the home directory, waits without a limit and repeats nothing, so only the SDK's
generated services and models (``kfp_server_api``) are used, with a transport of our own under them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import kfp_server_api
from kfp_server_api import models

from manyeyes.errors import EndpointError
from manyeyes.kubeflow.endpoint_transport import BROKEN, AnsweredError, EndpointSettings, Transport, UnknownOutcomeError

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

    def log_of(self, run_id: str, pod: str) -> str | None:
        """The end of what a pod of a run wrote; None when the endpoint cannot say.

        The API server serves logs itself (``ReadRunLogV1`` in kubeflow/pipelines, backend/src/apiserver/main.go), from
        the pod or, once that is gone, from the log archive; Kubeflow's UI, where the gateway lets only it through,
        under another path.
        """
        base = self.settings.url
        query = {"podname": pod, "runid": run_id}
        if self.settings.namespace:
            query["podnamespace"] = self.settings.namespace
        paths = (
            f"/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(pod)}/log",
            f"/k8s/pod/logs?{urlencode(query)}",
        )
        headers: dict[str, str] = {}
        if self.settings.cookie:
            headers["Cookie"] = self.settings.cookie
        self._client.update_params_for_auth(headers, [], ["Bearer"])
        for path in paths:
            try:
                reply = self._transport.once("GET", base + path, headers=headers)
            except EndpointError:
                continue
            # Kubeflow's UI answers a path that it does not know with its front page.
            if reply.status == 200 and reply.data and "html" not in (reply.getheader("Content-Type") or ""):
                return bytes(reply.data[-_LOG_BYTES:]).decode(errors="replace")
        return None
