"""Credentials, addresses and gateways in front of an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from manyeyes.errors import EndpointError
from manyeyes.harness.events import error_line
from manyeyes.kubeflow.endpoint import Endpoint, EndpointSettings
from manyeyes.kubeflow.endpoint_runs import find_pipeline_version, start_run
from manyeyes.kubeflow.run_status import failures_of, read_status
from tests.pipelines.endpoint_toys import REFUSAL, SECRET, Answer, add_version, snapshot, started_run, task
from tests.pipelines.kfp_server import Fault, Kubeflow


@pytest.mark.parametrize("variable", ["KFP_TOKEN", "KFP_TOKEN_FILE"])
def test_token_signs_in_and_is_never_shown(
    manyeyes: Callable[..., Answer],
    kubeflow: Kubeflow,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
) -> None:
    kubeflow.token = SECRET
    refused = manyeyes("pipeline", "status")
    assert refused.code == 2
    assert "no credentials" in refused.err
    assert "KFP_TOKEN_FILE" in refused.err
    file = tmp_path / "token"
    file.write_text("stale", encoding="utf-8")
    monkeypatch.setenv(variable, str(file) if variable == "KFP_TOKEN_FILE" else SECRET)
    if variable == "KFP_TOKEN_FILE":
        assert manyeyes("pipeline", "status").code == 2
        file.write_text(f"{SECRET}\n", encoding="utf-8")
    accepted = manyeyes("pipeline", "status")
    assert accepted.code == 0, accepted.err
    kubeflow.token = "renewed"
    again = manyeyes("pipeline", "status")
    assert SECRET not in accepted.out + accepted.err + again.out + again.err


def test_token_file_is_read_again_for_each_call(kubeflow: Kubeflow, tmp_path: Path) -> None:
    file = tmp_path / "token"
    with Endpoint(EndpointSettings(kubeflow.url, token_file=str(file), pause_s=0.01)) as endpoint:
        for token in ("first", "second"):
            kubeflow.token = token
            file.write_text(token, encoding="utf-8")
            assert endpoint.pipeline("train") is None
        file.unlink()
        with pytest.raises(EndpointError, match="cannot be read"):
            endpoint.pipeline("train")


def test_cookie_signs_in(manyeyes: Callable[..., Answer], kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_COOKIE", "oauth2_proxy_kubeflow=abc")
    assert manyeyes("pipeline", "status").code == 0
    assert kubeflow.requests[-1][2]["Cookie"] == "oauth2_proxy_kubeflow=abc"


def test_log_is_asked_for_with_the_same_credentials(kubeflow: Kubeflow) -> None:
    kubeflow.token = SECRET
    with Endpoint(EndpointSettings(kubeflow.url, token=SECRET, pause_s=0.01)) as endpoint:
        run, _ = started_run(endpoint, kubeflow)
        kubeflow.logs[run.run_id, "pod"] = error_line(REFUSAL)
        kubeflow.scripts[run.run_id] = [snapshot("FAILED", task("validate-data", "FAILED", "pod"))]
        (failure,) = failures_of(endpoint, read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id)))
        assert failure.report == REFUSAL


def test_two_ways_to_sign_in_are_refused() -> None:
    with pytest.raises(EndpointError, match="KFP_TOKEN and KFP_COOKIE are set"):
        EndpointSettings.from_environment("http://x", {"KFP_TOKEN": "a", "KFP_COOKIE": "b"})


@pytest.mark.parametrize("url", ["", "localhost:8888", "https://user:hunter2@host/pipeline", "ftp://host"])
def test_wrong_address_says_what_is_right_and_shows_no_password(url: str) -> None:
    with pytest.raises(EndpointError) as caught:
        EndpointSettings.from_environment(url, {})
    assert "KFP_ENDPOINT" in caught.value.do
    assert "hunter2" not in str(caught.value)


def test_link_leads_to_pages_where_there_are_any() -> None:
    assert EndpointSettings.from_environment("http://localhost:8888", {}).ui == ""
    assert EndpointSettings.from_environment("https://k/pipeline/", {}).ui == "https://k/pipeline"
    given = {"KFP_UI_ENDPOINT": "http://localhost:8080/"}
    assert EndpointSettings.from_environment("http://localhost:8888", given).ui == "http://localhost:8080"


def test_timeout_that_is_no_number_is_refused() -> None:
    with pytest.raises(EndpointError, match="KFP_TIMEOUT_S"):
        EndpointSettings.from_environment("http://k", {"KFP_TIMEOUT_S": "1 minute"})


@pytest.mark.parametrize("kind", ["page", 302])
def test_login_page_is_told_from_an_answer(endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str) -> None:
    kubeflow.faults = [Fault("GET", "/pipelines$", kind, times=9)]
    with pytest.raises(EndpointError, match="a page to sign in on"):
        endpoint.pipeline("train")
    assert len(kubeflow.requests) == 1


def test_path_of_the_gateway_is_kept(kubeflow: Kubeflow) -> None:
    kubeflow.base = "/pipeline"
    with Endpoint(EndpointSettings.from_environment(f"{kubeflow.url}/pipeline/", {})) as endpoint:
        assert endpoint.pipeline("train") is None
    with (
        Endpoint(EndpointSettings(kubeflow.url, pause_s=0.01)) as endpoint,
        pytest.raises(EndpointError, match="ends in /pipeline"),
    ):
        endpoint.pipeline("train")


def test_namespace_is_asked_for_where_one_is_set(kubeflow: Kubeflow) -> None:
    with Endpoint(EndpointSettings(kubeflow.url, namespace="team-a", pause_s=0.01)) as endpoint:
        started_run(endpoint, kubeflow)
    assert kubeflow.experiments[0]["namespace"] == "team-a"


def test_endpoint_that_stays_broken_is_given_up_with_a_hint(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    kubeflow.faults = [Fault("GET", "/pipelines$", 500, times=99)]
    with pytest.raises(EndpointError, match="5 times over") as caught:
        endpoint.pipeline("train")
    assert caught.value.retry
    assert len(kubeflow.requests) == 5


def test_only_the_first_line_of_the_backends_message_is_shown(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    version = find_pipeline_version(endpoint, "train")
    version.pipeline_version_id = "unknown"
    with pytest.raises(EndpointError) as caught:
        start_run(endpoint, version, pipeline="train", parameters={})
    assert "pipeline_version_id unknown not found" in caught.value.found
    assert "github.com" not in caught.value.found
