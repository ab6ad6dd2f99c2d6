"""What a platform engineer does and sees on an endpoint, over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manyeyes.cli import main as command_line
from manyeyes.cli import uploading
from manyeyes.cli.endpoint import Endpoint
from manyeyes.cli.endpoint_runs import failures_of, find_version, follow_run, run_parameters, start_run, task_states
from manyeyes.cli.endpoint_transport import EndpointSettings
from manyeyes.cli.schedules import create_schedule, delete_schedule, make_trigger
from manyeyes.cli.uploading import code_state, upload_pipeline, version_name
from manyeyes.errors import EndpointError, PipelineError, RecipeError
from manyeyes.steps.events import ErrorReport, error_line
from tests.pipelines.checkout import ROOT
from tests.pipelines.kfp_server import EPOCH, Fault, Kubeflow, check_model, start_server

DIGEST = "0123456789ab" + "c" * 52
IMAGE = f"registry.example/team/manyeyes-steps@sha256:{DIGEST}"
SECRET = "s3cr3t-t0ken-value"
REFUSAL = ErrorReport(
    step="validate_data",
    error="ValidationError",
    found="12 conversations without an image",
    needed="one image each",
    do="Read the quarantine file.",
    retry=False,
    user_error=True,
)


@pytest.fixture
def kubeflow() -> Iterator[Kubeflow]:
    server, state = start_server()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
    assert state.violations == [], "a request or a reply is not as the SDK's models say"


@pytest.fixture
def endpoint(kubeflow: Kubeflow) -> Iterator[Endpoint]:
    with Endpoint(EndpointSettings(kubeflow.url, timeout_s=0.5, pause_s=0.01)) as endpoint:
        yield endpoint


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def manyeyes(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """The command line, in this process, in the checkout."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("KFP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KFP_ENDPOINT", kubeflow.url)

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["manyeyes", *arguments])
        capsys.readouterr()
        try:
            command_line.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles to the same few lines, for tests of what happens to the file and not of the file."""

    def write(_name: str, out: Path, **_options: Any) -> Path:
        out.write_text("pipelineInfo: {name: train}\nroot: {}\n")
        return out

    monkeypatch.setattr(uploading, "compile_pipeline", write)


def add_version(state: Kubeflow, name: str = "train") -> None:
    """A pipeline with one version, as an upload leaves it."""
    parameters = {
        "recipe": {"parameterType": "STRING", "defaultValue": "tiny", "literals": ["tiny", "large"]},
        "recipe_overrides": {"parameterType": "STRING", "defaultValue": ""},
        "data_md5": {"parameterType": "STRING", "defaultValue": ""},
        "rounds": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1},
    }
    spec = {"root": {"inputDefinitions": {"parameters": parameters}}}
    state.pipelines.append({"pipeline_id": "p1", "display_name": name, "created_at": state.now()})
    state.versions.append(
        {
            "pipeline_id": "p1",
            "pipeline_version_id": "v1",
            "display_name": "0.1.0-abc-def",
            "created_at": state.now(),
            "pipeline_spec": {"pipeline_spec": spec, "platform_spec": {}},
        }
    )


def task(name: str, state: str, *pods: str, **fields: Any) -> dict[str, Any]:
    """A node as the API server tells it: no error, no pod of its own, only its children's pods."""
    return {
        "run_id": "r",
        "task_id": f"id-{name}",
        "display_name": name,
        "create_time": "2026-11-22T01:00:00Z",
        "start_time": "2026-11-22T01:00:00Z" if state != "PENDING" else EPOCH,
        "end_time": "2026-11-22T01:01:30Z" if state in ("SUCCEEDED", "FAILED") else EPOCH,
        "state": state,
        "execution_id": "0",
        "child_tasks": [{"pod_name": pod} for pod in pods],
        **fields,
    }


def snapshot(state: str, *tasks: dict[str, Any], **fields: Any) -> dict[str, Any]:
    machinery = [task("root", state, "x"), task("root-driver", "SUCCEEDED"), task("executor", state)]
    return {"state": state, "run_details": {"task_details": [*machinery, *tasks]}, **fields}


def started_run(endpoint: Endpoint, state: Kubeflow, **options: Any) -> Any:
    if not state.pipelines:
        add_version(state)
    version = find_version(endpoint, "train")
    return start_run(endpoint, version, pipeline="train", parameters={"recipe": "tiny"}, **options)


# --- upload --------------------------------------------------------------------------------------------------------


def test_upload_makes_pipeline_and_version_and_the_second_time_does_nothing(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow
) -> None:
    first = manyeyes("pipeline", "upload", "train", "--image", IMAGE, "--profile", "cluster")
    assert first.code == 0, first.err
    assert "uploaded" in first.out
    (version,) = kubeflow.versions
    commit, dirty = code_state(ROOT)
    assert version["display_name"].startswith(f"{command_line.__version__}-{commit[:12]}")
    assert version["display_name"].endswith("-0123456789ab")
    assert ("-dirty-" in version["display_name"]) == dirty
    executors = version["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {IMAGE}
    assert version["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]

    second = manyeyes("pipeline", "upload", "train", "--image", IMAGE, "--profile", "cluster")
    assert second.code == 0
    assert "was there already" in second.out
    assert len(kubeflow.pipelines) == len(kubeflow.versions) == 1
    assert kubeflow.calls("POST", "upload_version") == 1


@pytest.mark.parametrize("image", ["", "manyeyes-steps:0.1.0", "manyeyes-steps@sha256:abc"])
def test_upload_refuses_an_image_without_digest_before_it_asks_anything(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow, image: str
) -> None:
    answer = manyeyes("pipeline", "upload", "train", "--image", image)
    assert answer.code == 2
    assert f'image is "{image}"' in answer.err
    assert "@sha256:" in answer.err
    assert kubeflow.requests == []


def test_upload_names_the_nearest_pipeline(manyeyes: Callable[..., Answer]) -> None:
    answer = manyeyes("pipeline", "upload", "trian", "--image", IMAGE)
    assert answer.code == 2
    assert 'Did you mean "train"?' in answer.err


@pytest.mark.usefixtures("quick_compiler")
def test_upload_refuses_other_contents_under_the_same_name(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    kubeflow.versions[0]["description"] = "profile cluster; sha256 0000000000000000"
    with pytest.raises(PipelineError, match="is there with other contents"):
        upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)


def test_version_name_tells_two_uncommitted_changes_apart() -> None:
    clean = version_name("146dd53c0ffee0", DIGEST)
    assert clean.split("-")[1:] == ["146dd53c0ffe", "0123456789ab"]
    assert version_name("146dd53c0ffee0", DIGEST, changed="a" * 16) != version_name(
        "146dd53c0ffee0", DIGEST, changed="b" * 16
    )


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("takes_effect", [True, False])
@pytest.mark.parametrize("kind", ["drop", "timeout", 500, 502])
def test_upload_cut_off_in_the_middle_leaves_one_version(
    endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str, takes_effect: bool
) -> None:
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [
        Fault("POST", "/pipelines$", kind, takes_effect=takes_effect),
        Fault("POST", "upload_version", kind, takes_effect=takes_effect),
    ]
    done = upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    assert done.new
    assert len(kubeflow.pipelines) == len(kubeflow.versions) == 1
    assert kubeflow.calls("POST", "upload_version") == (1 if takes_effect else 2)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("status", [429, 503])
def test_busy_endpoint_is_asked_again(endpoint: Endpoint, kubeflow: Kubeflow, status: int) -> None:
    kubeflow.faults = [Fault("POST", "upload_version", status, times=2), Fault("GET", "/pipelines$", status, times=2)]
    upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    assert len(kubeflow.versions) == 1


@pytest.mark.usefixtures("quick_compiler")
def test_somebody_else_uploads_the_same_version_at_the_same_time(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    kubeflow.faults = [Fault("POST", "upload_version", 409, takes_effect=True)]
    done = upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    assert not done.new
    assert len(kubeflow.versions) == 1


# --- run -----------------------------------------------------------------------------------------------------------


def test_run_passes_parameters_and_recipe_fields(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    answer = manyeyes(
        *("pipeline", "run", "train", "--param", "recipe=large", "--param", "rounds=3"),
        *("--set", "stages.sft.epochs=1", "--set", "model.fusion.strategy=channel-concat"),
    )
    assert answer.code == 0, answer.err
    (run,) = kubeflow.runs
    assert run["runtime_config"]["parameters"] == {
        "recipe": "large",
        "rounds": 3,
        "recipe_overrides": "stages.sft.epochs=1\nmodel.fusion.strategy=channel-concat",
    }
    assert run["pipeline_version_reference"] == {"pipeline_id": "p1", "pipeline_version_id": "v1"}
    assert run["run_id"] in answer.out
    assert "--follow" in answer.out


FORM = {
    "recipe": {"parameterType": "STRING", "defaultValue": "tiny", "literals": ["tiny", "large"]},
    "rounds": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1},
    "benchmarks": {"parameterType": "LIST", "defaultValue": []},
    "threshold": {"parameterType": "NUMBER_DOUBLE", "defaultValue": 0.5},
    "force": {"parameterType": "BOOLEAN", "defaultValue": False},
}


def test_parameters_get_the_types_of_the_form() -> None:
    given = ["rounds=2", "benchmarks=[a, b]", "threshold=1", "force=true"]
    assert run_parameters(FORM, given=given) == {
        "rounds": 2,
        "benchmarks": ["a", "b"],
        "threshold": 1,
        "force": True,
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("recipes=tiny", 'Did you mean "recipe"?'),
        ("recipe=tinny", 'Did you mean "tiny"?'),
        ("rounds=many", "NUMBER_INTEGER"),
        ("rounds=true", "NUMBER_INTEGER"),
        ("force=1", "BOOLEAN"),
        ("benchmarks=a", "LIST"),
        ("recipe", "name=value"),
    ],
)
def test_wrong_parameter_says_what_is_right(pair: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        run_parameters(FORM, given=[pair])
    assert message in str(caught.value)


def test_recipe_file_travels_as_text_and_a_shipped_one_by_name(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("extends: tiny\nname: own\n")
    values = run_parameters({**FORM, "recipe_text": {"defaultValue": ""}}, given=[], recipe=str(file))
    assert list(values) == ["recipe_text"]
    assert json.loads(values["recipe_text"])["name"] == "own"
    assert run_parameters(FORM, given=[], recipe="large") == {"recipe": "large"}
    with pytest.raises(PipelineError, match="takes recipe_text"):
        run_parameters(FORM, given=[], recipe=str(file))
    with pytest.raises(PipelineError, match='Did you mean "tiny"'):
        run_parameters(FORM, given=[], recipe="tinny")


def test_parameter_without_default_must_be_given() -> None:
    with pytest.raises(PipelineError, match="reason not given"):
        run_parameters({"reason": {"parameterType": "STRING"}}, given=[])
    with pytest.raises(PipelineError, match="takes recipe_overrides"):
        run_parameters(FORM, given=[], assignments=["a.b=1"])
    with pytest.raises(RecipeError, match="path=value"):
        run_parameters({"recipe_overrides": {"defaultValue": ""}}, given=[], assignments=["epochs"])


def test_run_of_a_pipeline_that_is_not_there_says_how_to_upload_it(manyeyes: Callable[..., Answer]) -> None:
    answer = manyeyes("pipeline", "run", "train")
    assert answer.code == 2
    assert "manyeyes pipeline upload train" in answer.err


def test_run_of_an_unknown_version_lists_what_there_is(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    answer = manyeyes("pipeline", "run", "train", "--version", "0.1.0-abc-dee")
    assert answer.code == 2
    assert 'Did you mean "0.1.0-abc-def"?' in answer.err


@pytest.mark.parametrize(
    ("kind", "takes_effect"),
    [
        ("drop", True),
        ("drop", False),
        (500, True),
        (502, False),
        (504, True),
        ("timeout", True),
        (429, False),
        (503, False),
    ],
)
def test_run_whose_answer_is_lost_is_started_once(
    endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str, takes_effect: bool
) -> None:
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [Fault("POST", "/runs$", kind, takes_effect=takes_effect)]
    run, _ = started_run(endpoint, kubeflow)
    assert [each["run_id"] for each in kubeflow.runs] == [run.run_id]


def test_run_of_unknown_fate_is_not_started_again_until_its_name_is_given(
    endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [Fault("POST", "/runs$", "timeout")]
    with pytest.raises(EndpointError) as caught:
        started_run(endpoint, kubeflow, name="nightly-7")
    assert "--name nightly-7" in caught.value.do
    assert caught.value.retry
    assert kubeflow.runs == []
    assert started_run(endpoint, kubeflow, name="nightly-7")[1]
    assert not started_run(endpoint, kubeflow, name="nightly-7")[1]
    assert len(kubeflow.runs) == 1


def test_experiment_is_made_once(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    kubeflow.faults = [Fault("POST", "/experiments$", "drop", takes_effect=True)]
    started_run(endpoint, kubeflow)
    started_run(endpoint, kubeflow)
    assert [each["display_name"] for each in kubeflow.experiments] == ["manyeyes"]
    assert len(kubeflow.runs) == 2


# --- follow and status ---------------------------------------------------------------------------------------------


def test_follow_shows_each_change_once_and_none_of_the_machinery(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [
        snapshot("RUNNING", task("resolve-data", "RUNNING"), task("sft", "PENDING")),
        snapshot("RUNNING", task("resolve-data", "RUNNING")),
        snapshot("RUNNING", task("resolve-data", "SUCCEEDED"), task("sft", "RUNNING")),
        snapshot("SUCCEEDED", task("resolve-data", "SUCCEEDED"), task("sft", "SUCCEEDED")),
    ]
    lines: list[str] = []
    ended = follow_run(endpoint, run.run_id, say=lines.append, poll_s=0.01)
    assert ended.state == "SUCCEEDED"
    told = [" ".join(line.split()[1:]) for line in lines]
    assert told == [
        "resolve-data running",
        f"run {run.display_name}: running",
        "resolve-data succeeded 90 s",
        "sft running",
        "sft succeeded 90 s",
        f"run {run.display_name}: succeeded",
    ]


def test_iterations_of_a_loop_are_told_apart(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    first, second = task("prealign-encoder", "SUCCEEDED"), task("prealign-encoder", "RUNNING", task_id="later")
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING", second, first)] * 4 + [snapshot("SUCCEEDED", first)]
    lines: list[str] = []
    follow_run(endpoint, run.run_id, say=lines.append, poll_s=0.01)
    told = [" ".join(line.split()[1:]) for line in lines if "prealign" in line]
    assert told == ["prealign-encoder succeeded 90 s", "prealign-encoder #2 running"]


def test_follow_waits_for_an_endpoint_that_is_away(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("SUCCEEDED")]
    kubeflow.faults = [
        Fault("GET", "/runs/", 503, times=6),
        Fault("GET", "/runs/", "drop", times=6),
        Fault("GET", "/runs/", 500, times=1),
    ]
    lines: list[str] = []
    assert follow_run(endpoint, run.run_id, say=lines.append, poll_s=0.01).state == "SUCCEEDED"
    assert sum("waiting for it" in line for line in lines) == 1


@pytest.mark.parametrize(("user_error", "code"), [(True, 2), (False, 1)])
def test_failed_run_shows_the_error_of_its_step_and_exits_as_the_step_did(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow, user_error: bool, code: int
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    report = REFUSAL.model_copy(update={"user_error": user_error})
    failed = snapshot(
        "FAILED", task("resolve-data", "SUCCEEDED", "pod-1"), task("validate-data", "FAILED", "a", "pod-2")
    )
    kubeflow.scripts[run.run_id] = [failed]
    kubeflow.logs[run.run_id, "pod-2"] = f"I1122 launcher\nTraceback ...\n{error_line(report)}I1122 exit status 2\n"
    followed = manyeyes("pipeline", "status", run.display_name, "--follow", "--poll", "0.01")
    assert followed.code == code
    for text in ("validate_data: ValidationError", REFUSAL.found, REFUSAL.needed, REFUSAL.do):
        assert text in followed.err
    asked = manyeyes("pipeline", "status", run.run_id)
    assert asked.code == 0
    assert "validate-data" in asked.out
    assert REFUSAL.found in asked.err


def test_log_is_read_through_the_ui_where_the_gateway_lets_only_that_through(
    endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    kubeflow.only_ui = True
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED", task("validate-data", "FAILED", "pod"))]
    kubeflow.logs[run.run_id, "pod"] = error_line(REFUSAL)
    assert failures_of(endpoint, endpoint.runs.run_service_get_run(run.run_id)) == [REFUSAL]


def test_step_that_died_without_a_word_says_where_to_look(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED", task("sft", "FAILED", "gone"))]
    (report,) = failures_of(endpoint, follow_run(endpoint, run.run_id, say=lambda _line: None, poll_s=0.01))
    assert (report.step, report.user_error) == ("sft", False)
    assert f"pipeline/runid={run.run_id}" in report.do


def test_words_of_the_backend_are_shown_where_the_step_has_none(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [
        snapshot("FAILED", task("sft", "FAILED"), error={"code": 13, "message": "workflow exceeded its deadline"})
    ]
    (report,) = failures_of(endpoint, follow_run(endpoint, run.run_id, say=lambda _line: None, poll_s=0.01))
    assert report.found == "workflow exceeded its deadline"


def test_tasks_that_never_started_are_not_listed(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING", task("gate", "PENDING"), task("sft", "RUNNING"))]
    assert [(each.name, each.state) for each in task_states(endpoint.runs.run_service_get_run(run.run_id))] == [
        ("sft", "RUNNING")
    ]


def test_status_lists_runs_and_refuses_an_unknown_one(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    assert "no runs yet" in manyeyes("pipeline", "status").out
    run, _ = started_run(endpoint, kubeflow)
    assert run.display_name in manyeyes("pipeline", "status").out
    for unknown in ("nightly", "00000000-0000-0000-0000-000000000000"):
        answer = manyeyes("pipeline", "status", unknown)
        assert answer.code == 2
        assert "manyeyes pipeline status" in answer.err


def test_terminated_run_exits_1(manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("CANCELED")]
    answer = manyeyes("pipeline", "status", run.run_id, "--follow", "--poll", "0.01")
    assert answer.code == 1
    assert "canceled" in answer.err


def test_ctrl_c_leaves_the_run_going_and_says_how_to_follow_again(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING", task("sft", "RUNNING"))]
    # In the background of a shell Ctrl-C is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "manyeyes.cli.main", "pipeline", "status", run.run_id, "--follow", "--poll", "0.05"],
        env={**os.environ, "KFP_ENDPOINT": kubeflow.url, "PYTHONPATH": str(ROOT / "models")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 30
    while kubeflow.calls("GET", f"/runs/{run.run_id}") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"manyeyes pipeline status {run.run_id} --follow" in err
    assert "Traceback" not in err
    assert kubeflow.calls("POST", "terminate") == 0


# --- signing in ----------------------------------------------------------------------------------------------------


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
    file.write_text("stale")
    monkeypatch.setenv(variable, str(file) if variable == "KFP_TOKEN_FILE" else SECRET)
    if variable == "KFP_TOKEN_FILE":
        assert manyeyes("pipeline", "status").code == 2
        file.write_text(f"{SECRET}\n")
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
            file.write_text(token)
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
        assert failures_of(endpoint, endpoint.runs.run_service_get_run(run.run_id)) == [REFUSAL]


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
    version = find_version(endpoint, "train")
    version.pipeline_version_id = "unknown"
    with pytest.raises(EndpointError) as caught:
        start_run(endpoint, version, pipeline="train", parameters={})
    assert "pipeline_version_id unknown not found" in caught.value.found
    assert "github.com" not in caught.value.found


# --- schedules -----------------------------------------------------------------------------------------------------


def test_schedule_is_made_listed_switched_and_deleted(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    create = ("pipeline", "schedule", "create", "train", "--cron", "0 2 * * *", "--name", "nightly", "--set", "a.b=1")
    made = manyeyes(*create)
    assert made.code == 0, made.err
    (schedule,) = kubeflow.schedules
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert schedule["mode"] == "ENABLE"
    assert schedule["no_catchup"] is True
    assert schedule["runtime_config"]["parameters"] == {"recipe_overrides": "a.b=1"}

    assert "was there already" in manyeyes(*create).out
    other = manyeyes("pipeline", "schedule", "create", "train", "--every", "6h", "--name", "nightly")
    assert other.code == 2
    assert "does something else" in other.err
    assert len(kubeflow.schedules) == 1

    assert "cron 0 0 2 * * *, on" in manyeyes("pipeline", "schedule", "list").out
    assert manyeyes("pipeline", "schedule", "disable", "nightly").code == 0
    assert ", off" in manyeyes("pipeline", "schedule", "list").out
    assert manyeyes("pipeline", "schedule", "enable", "nightly").code == 0
    assert kubeflow.schedules[0]["status"] == "ENABLED"
    unknown = manyeyes("pipeline", "schedule", "delete", "nightli")
    assert 'Did you mean "nightly"?' in unknown.err
    assert manyeyes("pipeline", "schedule", "delete", "nightly").code == 0
    assert kubeflow.schedules == []


@pytest.mark.parametrize("kind", ["drop", "timeout", 500])
def test_schedule_whose_answer_is_lost_is_made_once(endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str) -> None:
    add_version(kubeflow)
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [Fault("POST", "/recurringruns$", kind, takes_effect=True)]
    options = {"name": "weekly", "trigger": make_trigger(every="1w"), "parameters": {}}
    create_schedule(endpoint, find_version(endpoint, "train"), **options)
    assert [each["display_name"] for each in kubeflow.schedules] == ["weekly"]
    assert kubeflow.schedules[0]["trigger"] == {"periodic_schedule": {"interval_second": "604800"}}


def test_delete_whose_answer_is_lost_is_no_error(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    version = find_version(endpoint, "train")
    create_schedule(endpoint, version, name="weekly", trigger=make_trigger(every="30m"), parameters={})
    kubeflow.faults = [Fault("DELETE", "/recurringruns/", "drop", takes_effect=True)]
    delete_schedule(endpoint, "weekly")
    assert kubeflow.schedules == []


@pytest.mark.parametrize(
    "when", [{}, {"cron": "0 2 * * *", "every": "6h"}, {"cron": "0 2 *"}, {"every": "6 hours"}, {"every": "0h"}]
)
def test_wrong_time_says_what_is_right(when: dict[str, str]) -> None:
    with pytest.raises(PipelineError):
        make_trigger(**when)


# --- the server of these tests -------------------------------------------------------------------------------------


def test_strict_models_see_an_unknown_field_and_a_wrong_type() -> None:
    assert check_model({"run_id": "a", "state": "SUCCEEDED"}, "V2beta1Run", "run") == []
    wrong = {"runs": [{"run_id": 1, "stat": "x", "state": "DONE", "created_at": "yesterday"}]}
    problems = check_model(json.loads(json.dumps(wrong)), "V2beta1ListRunsResponse", "runs")
    assert len(problems) == 4
