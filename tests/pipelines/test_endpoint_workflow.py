"""What the Argo workflow of a run says through an endpoint: reasons, attempts, logs; the same through every way in."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from manyeyes.harness.events import error_line
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.endpoint_runs import state_of
from manyeyes.kubeflow.run_status import RETRIES_OFF, failures_of, follow_run, read_status, words_of
from tests.pipelines import argo_toys as argo
from tests.pipelines.argo_toys import ALIGNED, GROUP, RESOLVED, SFT, SUMMARY, WORKFLOW
from tests.pipelines.endpoint_toys import REFUSAL, Answer, snapshot, started_run, task
from tests.pipelines.kfp_server import Kubeflow, start_server
from tests.pipelines.recording import RECORDED

OUT_OF_MEMORY = [
    *argo.groups("Failed"),
    *RESOLVED,
    *ALIGNED,
    *argo.tried_step(SFT, ["Failed", "Failed"], at=120, message="main: OOMKilled (exit code 137)", memory="60Mi"),
    *SUMMARY,
]


def pod(path: str, template: str = "system-container-impl") -> str:
    return f"{WORKFLOW}-{template}-{argo.fnv32a(f'{WORKFLOW}.{path}')}"


def test_workflow_and_log_are_asked_for_with_the_same_credentials(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    kubeflow.workflows[run.run_id] = [argo.manifest(argo.step(SFT, "Failed"), phase="Failed")]
    kubeflow.only_ui = True
    before = len(kubeflow.requests)
    monkeypatch.setenv("KFP_COOKIE", "oauth2_proxy_kubeflow=abc")
    manyeyes("pipeline", "status", run.run_id)
    asked = kubeflow.requests[before:]
    assert {headers.get("Cookie") for _, _, headers in asked} == {"oauth2_proxy_kubeflow=abc"}
    assert [path.split("/")[1:3] for _, path, _ in asked][-2:] == [["apis", "v1alpha1"], ["k8s", "pod"]]
    assert any("/apis/v1beta1/" in path for _, path, _ in asked)


@pytest.mark.parametrize(("base", "only_ui", "token"), [("", False, ""), ("", True, ""), ("/pipeline", True, "t0ken")])
def test_every_way_in_tells_the_same(
    manyeyes: Callable[..., Answer],
    endpoint: Endpoint,
    kubeflow: Kubeflow,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    only_ui: bool,
    token: str,
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    failed = argo.step(f"{GROUP}.resolve-data", "Failed", message="main: Error (exit code 1)")
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    kubeflow.workflows[run.run_id] = [argo.manifest([*argo.groups("Failed"), *failed, *SUMMARY], phase="Failed")]
    # By the pod's name alone: the UI knows no other.
    kubeflow.logs[run.run_id, pod(f"{GROUP}.resolve-data.executor")] = f"I1128 launcher\n{error_line(REFUSAL)}"
    kubeflow.base, kubeflow.only_ui, kubeflow.token = base, only_ui, token
    monkeypatch.setenv("KFP_TOKEN", token)
    answer = manyeyes("pipeline", "status", run.run_id, "--endpoint", kubeflow.url + base)
    assert answer.code == 0
    assert answer.out.splitlines()[1:] == [
        "  resolve data                 failed  45 s: exit code 1",
        "  summarise run                succeeded  45 s",
        "  prealign encoder             not started",
        "  sft                          not started",
        "  evaluate the bundle          not started",
    ]
    assert answer.err.splitlines() == [
        "resolve data: ValidationError",
        f"  found   {REFUSAL.found}",
        f"  needed  {REFUSAL.needed}",
        f"  do      {REFUSAL.do}",
    ]
    assert manyeyes("pipeline", "status", run.run_id, "--follow", "--endpoint", kubeflow.url + base).code == 2


def test_step_that_ran_out_of_memory_names_its_limit_and_the_field_to_change(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    # The API's own tasks have stopped here, as they do where Argo compresses the workflow.
    kubeflow.scripts[run.run_id] = [snapshot("FAILED", task("exit-handler-1", "RUNNING"))]
    kubeflow.workflows[run.run_id] = [argo.manifest(OUT_OF_MEMORY, phase="Failed", compressed=True)]
    written = "".join(f"line {number}\n\n" for number in range(30))
    kubeflow.logs[run.run_id, pod(f"{SFT}.executor(1)", "retry-system-container-impl")] = written
    answer = manyeyes("pipeline", "status", run.run_id)
    assert "sft                          failed  1 min 45 s, attempt 2: out of memory: limit 60Mi" in answer.out
    assert "exit handler 1" not in answer.out
    assert "found   out of memory: limit 60Mi, in the last of 2 attempts" in answer.err
    assert "memory_limit" in answer.err
    assert [line.strip() for line in answer.err.splitlines() if line.strip().startswith("line ")] == [
        f"line {number}" for number in range(20, 30)
    ]


def test_reason_of_an_earlier_attempt_is_taken_where_the_last_one_left_none(
    endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    nodes = argo.tried_step(SFT, ["Failed", "Error"], message="pod deleted")
    kubeflow.workflows[run.run_id] = [argo.manifest(nodes, phase="Failed")]
    kubeflow.logs[run.run_id, pod(f"{SFT}.executor(0)", "retry-system-container-impl")] = error_line(REFUSAL)
    (failure,) = failures_of(endpoint, read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id)))
    assert failure.report == REFUSAL


DRIVER_LOG = """\
I1128 21:04:23.485212      17 main.go:333] input ComponentSpec:{
  "executorLabel": "exec-sft"
}
F1128 21:04:23.522401      17 main.go:127] KFP driver: failed to init podSpecPatch: quantities must match
"""


def test_log_of_a_driver_that_failed_is_shown(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    failed = argo.driver(SFT, "Failed", message="main: Error (exit code 1)")
    kubeflow.workflows[run.run_id] = [argo.manifest([failed], phase="Failed")]
    kubeflow.logs[run.run_id, pod(f"{SFT}-driver", "system-container-driver")] = DRIVER_LOG
    (failure,) = failures_of(endpoint, read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id)))
    assert (failure.name, failure.report.found) == ("sft", "Kubeflow's driver failed: exit code 1")
    assert failure.log == [DRIVER_LOG.splitlines()[-1]]


def test_of_a_log_only_what_the_step_wrote_is_shown(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    failed = argo.step(SFT, "Failed", message="main: Error (exit code 1)")
    kubeflow.workflows[run.run_id] = [argo.manifest(failed, phase="Failed")]
    kubeflow.logs[run.run_id, pod(f"{SFT}.executor")] = """\
I1128 20:51:10.986363      16 main.go:67] Setting log level to: '1'
[KFP Executor 2026-11-28 20:51:11,671 INFO]: Got executor_input:
{
    "inputs": {"parameterValues": {"a": "{}"}},
    "outputs": {
    }
}
Traceback (most recent call last):
  File "a.py", line 1
ValueError: {1}
E1128 20:51:11.735860      16 launcher_v2.go:449] Component failed to execute successfully: exit status 1
I1128 20:51:11.833851      16 launcher_v2.go:206] publish success.
"""
    (failure,) = failures_of(endpoint, read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id)))
    assert [line.split()[0] for line in failure.log] == ["Traceback", "File", "ValueError:"]


def test_account_that_lacks_a_right_is_named_from_a_drivers_log(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    failed = argo.node("root-driver", "Failed", message="main: Error (exit code 1)", templateName="system-dag-driver")
    kubeflow.workflows[run.run_id] = [argo.manifest([failed], phase="Failed")]
    kubeflow.logs[run.run_id, pod("root-driver", "system-dag-driver")] = (
        'F1128 21:25:05.737751 16 main.go:127] KFP driver: configmaps "kfp-launcher" is forbidden: User '
        '"system:serviceaccount:kubeflow:default" cannot get resource "configmaps" in API group ""\n'
    )
    (failure,) = failures_of(endpoint, read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id)))
    assert failure.name == "Kubeflow's driver of the run"
    assert failure.report.found == "the account default may not get configmaps"
    assert "--service-account" in failure.report.do


@pytest.mark.parametrize(
    "message", ["etcdserver: request is too large", "workflow is longer than maximum allowed size"]
)
def test_run_whose_state_is_too_large_is_told_to_be_split(endpoint: Endpoint, kubeflow: Kubeflow, message: str) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    nodes = [*argo.groups(), *RESOLVED, *argo.step(SFT, "Pending", around="Running")]
    kubeflow.workflows[run.run_id] = [argo.manifest(nodes, phase="Error", message=message)]
    status = read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id))
    assert ("sft", "stopped") in [(step.name, words_of(step)) for step in status.steps]
    (failure,) = failures_of(endpoint, status)
    assert failure.report.error == "RunTooLarge"
    assert message in failure.report.found
    assert "Split it" in failure.report.do


def test_log_that_the_api_server_does_not_find_is_read_from_kubeflows_pages_without_credentials(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    failed = argo.step(SFT, "Failed", message="main: Error (exit code 1)")
    kubeflow.workflows[run.run_id] = [argo.manifest(failed, phase="Failed", compressed=True)]
    kubeflow.token = "t0ken"
    monkeypatch.setenv("KFP_TOKEN", "t0ken")
    assert "KFP_UI_ENDPOINT" in manyeyes("pipeline", "status", run.run_id).err
    server, pages = start_server()
    try:
        pages.logs[run.run_id, pod(f"{SFT}.executor")] = error_line(REFUSAL)
        monkeypatch.setenv("KFP_UI_ENDPOINT", pages.url)
        assert REFUSAL.found in manyeyes("pipeline", "status", run.run_id).err
        assert [(path, headers.get("Authorization")) for _, path, headers in pages.requests] == [
            ("/k8s/pod/logs", None)
        ]
    finally:
        server.shutdown()
        server.server_close()


def test_words_of_argo_for_the_whole_run_are_shown_where_no_step_failed(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    message = "Max duration limit exceeded"
    kubeflow.workflows[run.run_id] = [argo.manifest([*argo.groups()], phase="Error", message=message)]
    (failure,) = failures_of(endpoint, read_status(endpoint, endpoint.runs.run_service_get_run(run.run_id)))
    assert failure.report.found == message


def test_follow_tells_a_waiting_pods_reason_once_and_what_never_started(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [*[snapshot("RUNNING")] * 5, snapshot("FAILED")]
    around = [*argo.groups(), *RESOLVED]
    waiting = [
        argo.manifest([*around, *argo.step(SFT, "Pending", at=100, around="Running", message=message)])
        for message in ("PodInitializing", "ErrImagePull: not found", "ImagePullBackOff: Back-off", "ErrImagePull: no")
    ]
    failed = argo.step(SFT, "Failed", at=100, message="main: Error (exit code 143)")
    kubeflow.workflows[run.run_id] = [*waiting, argo.manifest([*around, *failed], phase="Failed")]
    answer = manyeyes("pipeline", "status", run.run_id, "--follow", "--poll", "0.01")
    assert [" ".join(line.split()[1:]) for line in answer.out.splitlines() if " sft " in line] == [
        "sft waiting: its image cannot be pulled: not found",
        "sft failed 45 s: its pod was deleted or evicted (exit code 143)",
    ]
    assert answer.out.splitlines()[-1] == "not started: prealign encoder, evaluate the bundle, summarise run"
    assert answer.code == 1


def test_status_of_a_waiting_step_says_what_to_do(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("RUNNING")]
    nodes = [
        *RESOLVED,
        *argo.step(SFT, "Pending", message='CreateContainerConfigError: secret "manyeyes-s3" not found'),
    ]
    kubeflow.workflows[run.run_id] = [argo.manifest(nodes)]
    out = manyeyes("pipeline", "status", run.run_id).out
    assert 'waiting: secret "manyeyes-s3" is missing in the namespace of the runs' in out
    assert "mark it optional in the profile" in out


def test_page_of_a_run_is_one_file_with_reason_timeline_and_steps(
    manyeyes: Callable[..., Answer], endpoint: Endpoint, kubeflow: Kubeflow, tmp_path: Path
) -> None:
    run, _ = started_run(endpoint, kubeflow, name="<b>nightly</b>")
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    kubeflow.workflows[run.run_id] = [argo.manifest(OUT_OF_MEMORY, phase="Failed")]
    kubeflow.logs[run.run_id, pod(f"{SFT}.executor(1)", "retry-system-container-impl")] = "<script>x</script>\n"
    page = tmp_path / "run.html"
    answer = manyeyes("pipeline", "status", run.run_id, "--html", str(page))
    assert str(page) in answer.out
    html = page.read_text(encoding="utf-8")
    for text in (
        "out of memory: limit 60Mi",
        "prealign efficientnet",
        "evaluate the bundle",
        "not started",
        "Timeline",
    ):
        assert text in html
    assert "<script" not in html
    assert "<b>nightly" not in html
    # sft: prepared, first attempt, pause, second attempt.
    assert html.count('title="attempt 1: failed, out of memory: limit 60Mi"') == 1
    assert html.count('title="waits for another attempt"') == 1


def test_endpoint_that_hands_out_no_workflow_is_asked_for_its_tasks(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("SUCCEEDED", task("sft", "SUCCEEDED"))]
    for manifests in (None, [""], ["{}"]):
        if manifests is not None:
            kubeflow.workflows[run.run_id] = manifests
        ended = follow_run(endpoint, run.run_id, say=lambda _line: None, poll_s=0.01)
        assert [(step.name, words_of(step)) for step in ended.steps] == [("sft", "succeeded  90 s")]


# --- recorded answers of Kubeflow Pipelines 2.17.0 -----------------------------------------------------------------


def replay(state: Kubeflow, name: str, *, compressed: bool = False, workflow: bool = True) -> str:
    """Have the server answer as the real one did; the id of the run."""
    recorded = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    run = recorded["run"]
    state.runs.append(run)
    if workflow:
        status = recorded["workflow"]["status"]
        if compressed:
            packed = gzip.compress(json.dumps(status.pop("nodes")).encode())
            status["compressedNodes"] = base64.b64encode(packed).decode()
        state.workflows[run["run_id"]] = [json.dumps(recorded["workflow"])]
    for name_of_pod, log in recorded["logs"].items():
        state.logs[run["run_id"], name_of_pod] = log
    return str(run["run_id"])


@pytest.mark.parametrize(
    ("base", "only_ui", "compressed"), [("", False, False), ("", True, False), ("/pipeline", True, True)]
)
def test_real_run_that_failed_in_four_ways_says_each(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow, base: str, only_ui: bool, compressed: bool
) -> None:
    run_id = replay(kubeflow, "ends_badly", compressed=compressed)
    kubeflow.base, kubeflow.only_ui = base, only_ui
    answer = manyeyes("pipeline", "status", run_id, "--endpoint", kubeflow.url + base)
    assert answer.out.splitlines() == [
        f"ends_badly-1  {run_id}  failed",
        "  export onnx                  failed  29 s: exit code 1",
        "  pretrain projector           failed  78 s: its pod was deleted or evicted (exit code 143)",
        "  resolve data                 succeeded  18 s",
        "  validate data                failed  18 s: exit code 1",
        "  sft                          failed  32 s: out of memory: limit 60Mi",
        "  prealign convnext            succeeded  21 s",
        "  prealign efficientnet        succeeded  16 s",
        "  summarise run                succeeded  23 s",
        "  evaluate the bundle          not started",
    ]
    found = [line.split(maxsplit=1)[1] for line in answer.err.splitlines() if line.startswith("  found ")]
    assert found == [
        "exit code 1",
        "its pod was deleted or evicted (exit code 143)",
        "12 conversations without an image",
        "out of memory: limit 60Mi",
    ]
    shown = [line.strip() for line in answer.err.splitlines() if line.startswith("    ")]
    assert shown == [*(f"line {number}" for number in range(20, 30)), "sleeps", "takes memory"]


def test_real_pods_that_cannot_start_say_why(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    run_id = replay(kubeflow, "waits")
    lines = manyeyes("pipeline", "status", run_id).out.splitlines()
    assert lines[1].startswith("  register                     waiting: its image cannot be pulled: ")
    assert (
        lines[3]
        == '  resolve data                 waiting: secret "manyeyes-nowhere" is missing in the namespace of the runs'
    )
    assert (
        lines[5]
        == "  sft                          waiting: no node fits: 0/1 nodes are available: 1 Insufficient memory."
    )


def test_real_run_from_the_cache_says_so(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    run_id = replay(kubeflow, "ends_well_cached")
    assert manyeyes("pipeline", "status", run_id, "--follow").out.splitlines()[-1].endswith("ends_well-2: succeeded")
    assert [" ".join(line.split()) for line in manyeyes("pipeline", "status", run_id).out.splitlines()[1:]] == [
        "resolve data from the cache",
        "evaluate the checkpoint from the cache",
        "prealign encoder 1 from the cache",
        "prealign encoder 2 from the cache",
        "summarise run succeeded 22 s",
    ]


def test_real_run_that_somebody_ended_was_canceled_and_has_not_failed(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow
) -> None:
    run_id = replay(kubeflow, "terminated")
    answer = manyeyes("pipeline", "status", run_id)
    assert answer.out.splitlines()[0].endswith("canceled")
    assert ["stopped" in line for line in answer.out.splitlines()[1:]] == [True] * 3
    assert "failed" not in answer.out + answer.err
    assert "canceled" in manyeyes("pipeline", "status").out
    assert manyeyes("pipeline", "status", run_id, "--follow").code == 1


def test_real_run_that_was_ended_and_went_on_has_failed_when_it_fails(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run_id = replay(kubeflow, "terminated")
    kubeflow.runs[-1]["state_history"] += [
        {"update_time": "2026-11-28T21:00:00Z", "state": "RUNNING"},
        {"update_time": "2026-11-28T21:01:00Z", "state": "FAILED"},
    ]
    assert state_of(endpoint.runs.run_service_get_run(run_id)) == "FAILED"


def test_real_tasks_without_the_workflow_hide_the_machinery_too(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    run_id = replay(kubeflow, "ends_badly", workflow=False)
    status = read_status(endpoint, endpoint.runs.run_service_get_run(run_id))
    assert sorted(step.name for step in status.steps) == [
        "evaluate",
        "export onnx",
        "prealign encoder",
        "prealign encoder #2",
        "pretrain projector",
        "resolve data",
        "sft",
        "summarise run",
        "validate data",
    ]


def test_real_pod_that_was_deleted_is_tried_again_and_a_drivers_error_is_shown(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow
) -> None:
    answer = manyeyes("pipeline", "status", replay(kubeflow, "tried_again"))
    assert answer.out.splitlines()[1:] == [
        "  evaluate                     failed  6 s: Kubeflow's driver failed: exit code 1",
        "  pretrain projector           succeeded  2 min 25 s, attempt 2",
        "  train clip+convnext          succeeded  17 s",
    ]
    (shown,) = [line for line in answer.err.splitlines() if line.startswith("    ")]
    assert "failed to init podSpecPatch: quantities must match the regular expression" in shown


@pytest.mark.parametrize(
    ("policy", "off"),
    [("OnError", True), ("OnTransientError", True), ("Always", False), ("OnFailure", False), ("", False)],
)
@pytest.mark.parametrize(("message", "worth_it"), [("main: Error (exit code 143)", True), ("OOMKilled", False)])
def test_what_may_go_well_another_time_names_the_retry_and_says_where_the_cluster_makes_none(
    manyeyes: Callable[..., Answer],
    endpoint: Endpoint,
    kubeflow: Kubeflow,
    policy: str,
    off: bool,
    message: str,
    worth_it: bool,
) -> None:
    run, _ = started_run(endpoint, kubeflow)
    kubeflow.scripts[run.run_id] = [snapshot("FAILED")]
    failed = argo.step(SFT, "Failed", at=100, message=message)
    manifest = json.loads(argo.manifest([*argo.groups("Failed"), *RESOLVED, *failed], phase="Failed"))
    manifest["spec"]["templateDefaults"] = {"retryStrategy": {"limit": "2", "retryPolicy": policy}} if policy else {}
    kubeflow.workflows[run.run_id] = [json.dumps(manifest)]
    said = manyeyes("pipeline", "status", run.run_id).err
    assert (f"manyeyes pipeline retry {run.run_id}" in said) == worth_it
    assert (RETRIES_OFF in said) == (worth_it and off)
