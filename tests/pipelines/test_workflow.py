"""What a run's steps are called and how they fare, read from its Argo workflow; and Argo's messages in our words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from manyeyes.harness.base import attempts_in
from manyeyes.harness.cluster import explain
from manyeyes.kubeflow.run_status import words_of
from manyeyes.kubeflow.workflow import StepStatus, read_workflow, steps_of
from tests.pipelines import argo_toys as argo
from tests.pipelines.argo_toys import ALIGNED, BUNDLE, GROUP, ITERATION, RESOLVED, SFT, SUMMARY, WORKFLOW


def steps(nodes: Sequence[dict[str, Any]], **options: Any) -> list[StepStatus]:
    workflow = read_workflow(argo.manifest(nodes, **options))
    assert workflow is not None
    return steps_of(workflow)


def told(nodes: Sequence[dict[str, Any]], **options: Any) -> list[tuple[str, str]]:
    return [(step.name, words_of(step)) for step in steps(nodes, **options)]


@pytest.mark.parametrize("compressed", [False, True])
def test_steps_have_the_names_that_people_know_and_argos_machinery_is_left_out(compressed: bool) -> None:
    nodes = [
        *argo.groups("Succeeded"),
        *RESOLVED,
        *ALIGNED,
        *argo.cached_step(f"{ITERATION.format(1)}.prealign-encoder", at=71),
        *argo.tried_step(SFT, ["Failed", "Succeeded"], at=120, message="main: Error (exit code 1)"),
        *argo.step(BUNDLE, "Succeeded", at=260),
        *SUMMARY,
    ]
    assert told(nodes, phase="Succeeded", compressed=compressed) == [
        ("resolve data", "succeeded  45 s"),
        ("prealign efficientnet", "succeeded  45 s"),
        ("prealign encoder 2", "from the cache"),
        ("sft", "succeeded  1 min 45 s, attempt 2"),
        ("evaluate the bundle", "succeeded  45 s"),
        ("summarise run", "succeeded  45 s"),
    ]


def test_steps_that_never_started_are_said_to_be_so_in_the_order_of_the_pipeline() -> None:
    omitted = argo.node(f"{BUNDLE}-driver", "Omitted", "Skipped", message="omitted: depends condition not met")
    nodes = [*argo.groups("Failed"), *argo.step(f"{GROUP}.resolve-data", "Failed"), omitted, *SUMMARY]
    assert [name for name, words in told(nodes, phase="Failed") if words == "not started"] == [
        "prealign encoder",
        "sft",
        "evaluate the bundle",
    ]


def test_item_of_an_empty_loop_has_nothing_to_do() -> None:
    nothing = argo.step(f"{ITERATION.format(0)}.prealign-encoder", "Succeeded", at=70, inputs={"encoder": ""})
    assert ("prealign encoder (nothing to do)", "succeeded  45 s") in told([*RESOLVED, *nothing])


@pytest.mark.parametrize(
    ("component", "inputs", "name"),
    [
        ("train-trial", {"variant": '{"encoders":["clip","convnext"]}'}, "train clip+convnext"),
        (
            "train-trial",
            {"variants": '{"encoders":["clip"]}\n{"changes":{"model.fusion.strategy":"sum"}}\n{"encoders":["dino"]}'},
            "train clip and 2 more",
        ),
        ("train-trial", {"variants": "of a later version"}, "train of a later version"),
        ("train-trial", {"variants": ""}, "train trial (nothing to do)"),
        ("score-benchmark-3", {"benchmark": "easy-vqa"}, "score easy-vqa"),
        ("advance-search-2", {"round_number": 2.0}, "advance search, round 2"),
        ("advance-search", {"round_number": 0}, "advance search, round 0"),
    ],
)
def test_steps_of_a_loop_are_called_by_what_they_work_on(
    component: str, inputs: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = component.rstrip("-0123456789")
    only = argo.make_step(component, taskInfo={"name": own})
    monkeypatch.setitem(argo.TEMPLATES, "comp-exit-handler-1", only)
    assert name in dict(told(argo.step(f"{GROUP}.{component}", "Running", inputs=inputs)))


def test_workflow_without_any_node_lists_what_there_will_be() -> None:
    assert {words for _, words in told([], phase="")} == {"not started"}
    assert len(told([], phase="")) == 5


@pytest.mark.parametrize("text", ["", "{}", "[]", "no json", '{"metadata": {"name": "a"}, "spec": {}, "status": {}}'])
def test_what_is_no_workflow_is_not_read(text: str) -> None:
    assert read_workflow(text) is None


@pytest.mark.parametrize("packed", ["%%%", "aGVsbG8=", "H4sIAAAA"])
def test_damaged_status_is_not_read(packed: str) -> None:
    whole = argo.manifest([], compressed=True)
    start = whole.index('"compressedNodes": "') + len('"compressedNodes": "')
    damaged = whole[:start] + packed + whole[whole.index('"', start) :]
    assert read_workflow(damaged) is None


def test_name_of_a_pod_is_made_as_argo_makes_it() -> None:
    (sft,) = [step for step in steps([*argo.tried_step(SFT, ["Failed", "Running"])]) if step.name == "sft"]
    hashes = [argo.fnv32a(f"{WORKFLOW}.{SFT}.executor({number})") for number in (0, 1)]
    assert [attempt.pod for attempt in sft.attempts] == [
        f"{WORKFLOW}-retry-system-container-impl-{number}" for number in hashes
    ]


# What Argo writes (workflow/controller/operator.go), and what a person reads.
REASONS = [
    ("main: OOMKilled (exit code 137)", "out of memory: limit 60Mi", "memory_limit", "OutOfMemory"),
    ("OOMKilled (exit code 137)", "out of memory: limit 60Mi", "memory_limit", "OutOfMemory"),
    (
        'ImagePullBackOff: Back-off pulling image "r.example/a:1"',
        'its image cannot be pulled: Back-off pulling image "r.example/a:1"',
        "image_pull_secrets",
        "ImageNotPulled",
    ),
    (
        "ErrImagePull: rpc error: code = NotFound desc = no such image",
        "its image cannot be pulled: rpc error: code = NotFound desc = no such image",
        "--image",
        "ImageNotPulled",
    ),
    (
        "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "no node fits: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "node_selector",
        "NoNodeFits",
    ),
    (
        'CreateContainerConfigError: secret "manyeyes-s3" not found',
        'secret "manyeyes-s3" is missing in the namespace of the runs',
        "docs/endpoint.md",
        "ContainerNotStarted",
    ),
    (
        "CreateContainerConfigError: couldn't find key AWS_ACCESS_KEY_ID in Secret kubeflow/manyeyes-s3",
        'secret "manyeyes-s3" has no key AWS_ACCESS_KEY_ID',
        "optional",
        "ContainerNotStarted",
    ),
    (
        "The node was low on resource: memory. Container main was using 900Mi.",
        "evicted: The node was low on resource: memory. Container main was using 900Mi.",
        "memory_request",
        "Evicted",
    ),
    (
        "main: Error (exit code 143)",
        "its pod was deleted or evicted (exit code 143)",
        "checkpoints",
        "PodDeleted",
    ),
    ("pod deleted", "its pod was deleted or evicted", "again", "PodDeleted"),
    (
        "Pod was active on the node longer than the specified deadline",
        "out of time: Pod was active on the node longer than the specified deadline",
        "timeout_s",
        "OutOfTime",
    ),
    (
        'wait: Error (exit code 64): workflowtaskresults.argoproj.io is forbidden: User "system:serviceaccount:'
        'kubeflow:small" cannot create resource "workflowtaskresults" in API group "argoproj.io"',
        "the account small may not create workflowtaskresults",
        "--service-account",
        "Forbidden",
    ),
    ("main: Error (exit code 137)", "killed (exit code 137)", "memory_limit", "Killed"),
    ("main: Error (exit code 1)", "exit code 1", "", "TaskFailed"),
    ("init: Error (exit code 2): no such file", "init: Error (exit code 2): no such file", "", "TaskFailed"),
    (
        "Pod failed before main container starts due to ImagePullBackOff: Back-off pulling image",
        "its image cannot be pulled: Back-off pulling image",
        "--image",
        "ImageNotPulled",
    ),
]


@pytest.mark.parametrize(("message", "text", "do", "error"), REASONS)
def test_message_of_argo_is_put_into_words(message: str, text: str, do: str, error: str) -> None:
    reason = explain(message, memory_limit="60Mi")
    assert reason is not None
    assert (reason.text, reason.error) == (text, error)
    assert do in reason.do


@pytest.mark.parametrize("message", ["ContainerCreating", "PodInitializing"])
def test_pod_that_is_being_made_does_not_wait_for_anything(message: str) -> None:
    assert explain(message) is None
    assert told([*RESOLVED, *argo.step(SFT, "Pending", message=message)])[1] == ("sft", "starting")


@pytest.mark.parametrize(("message", "text", "_do", "_error"), [row for row in REASONS if "due to" not in row[0]][2:7])
def test_pod_that_cannot_start_says_why_while_it_waits(message: str, text: str, _do: str, _error: str) -> None:
    nodes = [*RESOLVED, *argo.step(SFT, "Pending", message=message, around="Running")]
    assert ("sft", f"waiting: {text}") in told(nodes)


def test_step_between_two_attempts_waits_for_the_next_one() -> None:
    nodes = [*RESOLVED, *argo.tried_step(SFT, ["Failed"], message="main: Error (exit code 1)", goes_on=True)]
    assert ("sft", "waiting: for another attempt; this one failed: exit code 1") in told(nodes)
    nodes = [*RESOLVED, *argo.tried_step(SFT, ["Failed", "Running"], goes_on=True)]
    assert ("sft", "running, attempt 2") in told(nodes)


def test_pods_of_a_run_that_was_ended_are_stopped_and_not_failed() -> None:
    killed = argo.step(SFT, "Failed", at=100, message="main: Error (exit code 143)")
    never = argo.step(BUNDLE, "Failed", at=120, message="workflow shutdown with strategy: Terminate")
    nodes = [*RESOLVED, *killed, *never]
    ended = dict(told(nodes, phase="Failed", shutdown="Terminate"))
    assert ended["sft"].startswith("stopped")
    assert ended["evaluate the bundle"].startswith("stopped")
    # Nobody ended this one.
    assert dict(told(nodes, phase="Failed"))["sft"].startswith("failed")


def test_driver_that_fails_or_cannot_start_is_shown_as_its_step_or_group() -> None:
    no_node = "Unschedulable: 0/1 nodes are available: 1 Insufficient memory."
    step_driver = argo.driver(SFT, "Pending", message=no_node)
    assert ("sft", "waiting: no node fits: 0/1 nodes are available: 1 Insufficient memory.") in told([step_driver])
    failed = argo.driver(SFT, "Failed", message="main: Error (exit code 1)")
    assert ("sft", "failed  10 s: Kubeflow's driver failed: exit code 1") in told([failed], phase="Failed")
    group = argo.node(
        "root.exit-handler-1-driver", "Failed", message="main: Error (exit code 1)", templateName="system-dag-driver"
    )
    assert ("Kubeflow's driver of exit handler 1", "failed  30 s: exit code 1") in told([group], phase="Failed")


def test_steps_from_the_cache_in_a_loop_are_named_by_the_recipe_that_preflight_got(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    templates = json.loads(json.dumps(argo.TEMPLATES).replace("resolve-data", "preflight"))
    monkeypatch.setattr(argo, "TEMPLATES", templates)
    cached = [
        node
        for number in (0, 1)
        for node in argo.cached_step(f"{ITERATION.format(number)}.prealign-encoder", at=70 + number)
    ]
    for recipe, names in (
        ({"recipe": "tiny"}, ["prealign efficientnet", "prealign vit"]),
        ({"recipe": "of another version"}, ["prealign encoder 1", "prealign encoder 2"]),
    ):
        checked = argo.step(f"{GROUP}.preflight", "Succeeded", inputs=recipe)
        found = steps([*argo.groups("Succeeded"), *checked, *cached], phase="Succeeded")
        assert sorted(step.name for step in found if step.state == "cached") == names


def test_attempts_in_a_pod_are_counted_from_its_log() -> None:
    assert attempts_in("a line\n") == 1
    log = "sft failed (no answer): attempt 2 of 3 in 15 s\nwork\nsft failed (no answer): attempt 3 of 3 in 30 s\n"
    assert attempts_in(log) == 3
