"""The exit handler: what it learns from MLflow, what it says, and a webhook that fails in every way."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyeyes.errors import RecordError
from manyeyes.harness.base import Reporter, StepResult, tagging_failure
from manyeyes.harness.events import pipeline_tags
from manyeyes.kubeflow.pipeline import PIPELINES
from manyeyes.registry.tracking import connect, start_parent_run, step_records, step_run
from manyeyes.registry.webhook import post_json
from manyeyes.steps import summarise_run as summarise_module
from manyeyes.steps.summarise_run import LAST_STEPS, RunNotice, summarise_run
from tests.registry_store import store_uri

REGISTERED = {
    "manyeyes.figure": "m version 3, champion",
    "manyeyes.model": "m",
    "manyeyes.version": "3",
    "manyeyes.aliases": "champion, challenger",
    "manyeyes.verdict": "passed",
    "manyeyes.scores": "easy-vqa 98.8% (98.1 to 99.2, 9,673 questions)",
}


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("MLFLOW_RUN_ID", "MANYEYES_PARENT_RUN_ID", "MANYEYES_PIPELINE_RUN", "MANYEYES_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MANYEYES_WEBHOOK_URL", "MANYEYES_MLFLOW_URL", "MANYEYES_KUBEFLOW_URL"):
        monkeypatch.delenv(name, raising=False)


def finish(name: str, tags: dict[str, str]) -> None:
    with step_run(name, tags=pipeline_tags()) as run:
        run.set_tags(tags)


def fail(name: str) -> None:
    with pytest.raises(RecordError), step_run(name, tags=pipeline_tags()) as run, tagging_failure(name, run):
        raise RecordError("a pear", "an apple", "Buy apples.")


def say(state: str | None = "SUCCEEDED", message: str = "") -> StepResult:
    return summarise_run(
        Reporter("summarise_run"), pipeline="train", subject="tiny", run_id="run-1", state=state, message=message
    )


def test_good_run_names_score_verdict_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("another"))
    finish("sft", {"manyeyes.figure": "of another run"})
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("good"))
    finish("preflight", {"manyeyes.figure": "14 checks, nothing wrong"})
    finish("gate", {"manyeyes.figure": "passed: 6 of 6", "manyeyes.verdict": "passed"})
    finish("register", REGISTERED)
    monkeypatch.setenv("MANYEYES_MLFLOW_URL", "https://user:secret@mlflow.example/")
    monkeypatch.setenv("MANYEYES_KUBEFLOW_URL", "https://kubeflow.example/pipeline")
    result = say()
    assert result.headline == (
        "train of tiny succeeded, easy-vqa 98.8% (98.1 to 99.2, 9,673 questions), gate passed, "
        "m version 3 is champion, challenger"
    )
    assert "| registered | m version 3 |" in result.markdown
    assert "https://mlflow.example/#/models/m/versions/3" in result.markdown
    assert "https://kubeflow.example/pipeline/#/runs/details/run-1" in result.markdown
    assert "14 checks, nothing wrong" in result.markdown
    assert "of another run" not in result.markdown
    assert "secret" not in result.markdown + result.html
    assert result.metrics == {"succeeded": 1.0, "steps": 3.0}


def test_failed_run_says_found_needed_and_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("bad"))
    finish("preflight", {"manyeyes.figure": "fine"})
    fail("validate_data")
    result = say("FAILED", "Task exit-handler-1 failed.")
    assert result.headline == "train of tiny failed in validate_data: a pear"
    for line in ("- found: a pear", "- needed: an apple", "- do: Buy apples."):
        assert line in result.markdown
    assert "Buy apples." in result.html
    # Kubeflow's own words say nothing beside that.
    assert "exit-handler" not in result.markdown


def test_step_that_died_without_a_word_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("killed"))
    with pytest.raises(KeyboardInterrupt), step_run("sft"):
        raise KeyboardInterrupt
    result = say("FAILED", "Task exit-handler-1 failed.")
    assert result.headline == "train of tiny failed in sft"
    assert "Task exit-handler-1 failed." in result.markdown


@pytest.mark.parametrize("word", ["COMPLETE", "SUCCEEDED", "CACHED", "complete"])
def test_every_word_for_a_good_end_is_reported_as_success(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run(f"good {word}"))
    finish("gate", {"manyeyes.figure": "passed"})
    result = say(word)
    assert result.headline == "train of tiny succeeded"
    assert "| result | succeeded |" in result.markdown
    assert result.metrics["succeeded"] == 1.0


@pytest.mark.parametrize("word", ["CANCELED", "CANCELLED"])
def test_stopped_run_is_stopped_and_not_failed(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run(f"stopped {word}"))
    finish("preflight", {"manyeyes.figure": "fine"})
    assert say(word).headline == "train of tiny stopped"


# MLMD's other words, kfp's "a task that was left out", a word of a later version, and none at all.
UNSETTLED = ["RUNNING", "NEW", "UNKNOWN", "SKIPPED", "PAUSED", "", None]


@pytest.mark.parametrize("word", UNSETTLED)
def test_word_that_settles_nothing_leaves_it_to_the_steps(word: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run(f"well {word}"))
    finish("gate", {"manyeyes.figure": "passed", "manyeyes.verdict": "passed"})
    # Not at its end: the next step may never have started.
    unknown = say(word)
    assert unknown.headline == "train of tiny: outcome unknown"
    assert "| result | unknown |" in unknown.markdown
    assert "how the run ended, nor does what its steps left in MLflow" in unknown.markdown
    assert "succeeded" not in unknown.metrics
    finish("register", REGISTERED)
    assert say(word).headline.startswith("train of tiny succeeded, easy-vqa 98.8%")
    fail("sft")
    assert say(word).headline == "train of tiny failed in sft: a pear"
    # A second attempt makes it good.
    finish("sft", {"manyeyes.figure": "loss 0.4"})
    assert say(word).headline.startswith("train of tiny succeeded")


@pytest.mark.parametrize("word", UNSETTLED)
def test_word_that_settles_nothing_without_mlflow_is_unknown(word: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = say(word)
    assert result.headline == "train of tiny: outcome unknown"
    assert "MLflow could not be asked" in result.markdown
    assert "| result | unknown |" in result.markdown


def test_step_that_has_not_ended_is_named_where_the_outcome_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = start_parent_run("killed without a word")
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", parent)
    tracking = connect(create=True)
    tags = {"mlflow.parentRunId": parent, "manyeyes.step": "sft"}
    tracking.client.create_run(tracking.experiment_id, tags=tags)
    assert say("RUNNING").headline == "train of tiny: outcome unknown, sft has not ended"


def test_attempt_that_was_made_good_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("tried again"))
    fail("sft")
    finish("sft", {"manyeyes.figure": "loss 0.4"})
    result = say("COMPLETE")
    assert result.headline == "train of tiny succeeded"
    assert "Buy apples." not in result.markdown + result.html


def test_round_that_does_not_end_a_search_settles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("search"))

    def told() -> str:
        return summarise_run(Reporter("summarise_run"), pipeline="search_encoders", state="RUNNING").headline

    finish("advance_search[round 0]", {"manyeyes.figure": "a: 50%", "manyeyes.ended": "no"})
    assert told() == "search_encoders: outcome unknown"
    finish("advance_search[round 1]", {"manyeyes.figure": "a + b: 51%", "manyeyes.ended": "none helped"})
    assert told() == "search_encoders succeeded"


def test_failure_that_was_made_good_is_none_whatever_kubeflow_calls_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("good in the end"))
    fail("sft")
    finish("sft", {"manyeyes.figure": "loss 0.4"})
    assert say("FAILED").headline == "train of tiny failed"
    finish("register", REGISTERED)
    assert say("FAILED").headline.startswith("train of tiny succeeded")


def test_last_step_of_a_pipeline_needs_every_other_one() -> None:
    assert set(LAST_STEPS) == set(PIPELINES)
    for name, step in LAST_STEPS.items():
        text = Path(f"pipelines/compiled/{name}.yaml").read_text(encoding="utf-8")
        compiled = next(yaml.safe_load_all(text))
        dags = {key: value["dag"]["tasks"] for key, value in compiled["components"].items() if "dag" in value}

        def holds(component: str, step: str = step, dags: dict[str, Any] = dags) -> bool:
            if re.fullmatch(rf"comp-{step.replace('_', '-')}(-\d+)?", component):
                return True
            return any(holds(task["componentRef"]["name"]) for task in dags.get(component, {}).values())

        assert any(holds(component) for component in dags), (name, step)
        for tasks in dags.values():
            last = {key for key, task in tasks.items() if holds(task["componentRef"]["name"])}
            needed = set(last)
            while more := {key for each in needed for key in tasks[each].get("dependentTasks", ())} - needed:
                needed |= more
            assert not last or needed == set(tasks), (name, step, set(tasks) - needed)
            after = {key for key, task in tasks.items() if last & set(task.get("dependentTasks", []))}
            # Rounds of a search follow each other.
            assert after <= last, (name, step, after - last)


def test_run_without_traces_says_so_and_ends_well() -> None:
    assert "| remark | no step left anything in MLflow |" in say().markdown


def test_mlflow_that_does_not_answer_is_a_remark_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = say("FAILED", "sft failed with exit code 137")
    assert result.headline == "train of tiny failed"
    assert "MLflow could not be asked" in result.markdown
    assert "exit code 137" in result.markdown


def test_steps_find_each_other_by_the_pipeline_run_where_there_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PIPELINE_RUN", "kfp-1")
    finish("preflight", {"manyeyes.figure": "fine"})
    monkeypatch.setenv("MANYEYES_PIPELINE_RUN", "kfp-2")
    finish("gate", {"manyeyes.figure": "passed"})
    assert [record.step for record in step_records()] == ["gate"]


def test_steps_find_each_other_in_the_runs_that_kubeflow_made(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = connect(create=True)
    parent = start_parent_run("made by Kubeflow")
    made = [
        tracking.client.create_run(tracking.experiment_id, tags={"mlflow.parentRunId": parent}).info.run_id
        for _ in range(3)
    ]
    monkeypatch.setenv("MLFLOW_RUN_ID", made[0])
    finish("preflight", {"manyeyes.figure": "fine"})
    monkeypatch.setenv("MLFLOW_RUN_ID", made[1])
    fail("sft")
    monkeypatch.setenv("MLFLOW_RUN_ID", made[2])
    # Kubeflow ends these runs, some time later.
    assert [(record.step, record.state) for record in step_records()] == [("preflight", "finished"), ("sft", "failed")]


@pytest.mark.parametrize("pipeline_run", ["", "kfp-3"])
def test_steps_are_found_in_the_groups_and_loops_that_kubeflow_gives_runs(
    monkeypatch: pytest.MonkeyPatch, pipeline_run: str
) -> None:
    if pipeline_run:
        monkeypatch.setenv("MANYEYES_PIPELINE_RUN", pipeline_run)
    tracking = connect(create=True)

    def made_by_kubeflow(parent: str) -> str:
        tags = {"mlflow.parentRunId": parent}
        return str(tracking.client.create_run(tracking.experiment_id, tags=tags).info.run_id)

    root = start_parent_run("made by Kubeflow")
    group, summary = made_by_kubeflow(root), made_by_kubeflow(root)
    loop = made_by_kubeflow(group)
    for name, parent in (("preflight", group), ("prealign_encoder", loop), ("prealign_encoder", loop), ("sft", group)):
        monkeypatch.setenv("MLFLOW_RUN_ID", made_by_kubeflow(parent))
        finish(name, {"manyeyes.figure": "fine"})
    made_by_kubeflow(start_parent_run("of somebody else"))
    monkeypatch.setenv("MLFLOW_RUN_ID", summary)
    assert [record.step for record in step_records()] == ["preflight", "prealign_encoder", "prealign_encoder", "sft"]


def test_the_tree_that_a_real_kubeflow_made_of_a_train_run_gives_all_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Recorded of Kubeflow Pipelines 2.17.0 with plugins.mlflow and injectUserEnvVars.
    recorded = Path(__file__).parents[1] / "pipelines/recorded/mlflow_tree.json"
    tracking, made = connect(create=True), {}
    for run in json.loads(recorded.read_text(encoding="utf-8")):
        # Without the profile's MANYEYES_PIPELINE_RUN the tree alone says what belongs together.
        tags = {key: value for key, value in run["tags"].items() if key != "manyeyes.pipeline_run"}
        if run["parent"]:
            tags["mlflow.parentRunId"] = made[run["parent"]]
        created = tracking.client.create_run(tracking.experiment_id, tags=tags, run_name=run["name"]).info.run_id
        tracking.client.set_terminated(created, run["status"])
        made[run["id"]] = created
        if run["name"] == "summarise-run":
            monkeypatch.setenv("MLFLOW_RUN_ID", created)
    found = [(record.step, record.state) for record in step_records()]
    steps = ["preflight", "validate_data", "prealign_encoder[vit]", "prealign_encoder[efficientnet]"]
    steps += ["pretrain_projector", "sft", "evaluate[torch]", "export_onnx", "evaluate[bundle]", "gate", "register"]
    assert found == [(step, "finished") for step in steps]


def test_recipe_that_travels_as_text_is_shown_by_its_name() -> None:
    first_line = summarise_module._first_line
    assert first_line('{"model": {}, "name": "mine"}') == "mine"
    assert first_line("{model: {}, name: mine}") == "mine"
    assert first_line("# a comment\nname: mine\nmodel: {}\n") == "mine"
    assert first_line("tiny") == "tiny"
    assert first_line("{not json") == "{not json"
    assert first_line("") == ""


def test_reason_too_long_for_a_tag_is_cut_and_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("long"))
    with pytest.raises(RecordError), step_run("sft") as run, tagging_failure("sft", run):
        raise RecordError("pear " * 5000, "apple " * 5000, "Buy.")
    result = say("FAILED")
    assert "- do: Buy." in result.markdown
    assert "pear pear" in result.headline


# --- the webhook ---------------------------------------------------------------------------------------------------


@contextmanager
def service(*answers: int, hold_s: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """A web service that gives these answers in turn, the last one for ever; 0 drops the connection."""
    bodies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            answer = answers[min(len(bodies), len(answers)) - 1]
            time.sleep(hold_s)
            if answer == 0:
                self.close_connection = True
                return
            self.send_response(answer)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/hooks/secret", bodies
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answers", "attempts", "outcome"),
    [
        ((200,), 1, "sent to 127.0.0.1 (200)"),
        ((500, 429, 204), 3, "sent to 127.0.0.1 (204)"),
        ((0, 200), 2, "sent to 127.0.0.1 (200)"),
        ((503,), 3, "not sent: 127.0.0.1: it answers 503"),
        ((404,), 1, "not sent: 127.0.0.1: it answers 404"),
    ],
)
def test_webhook_is_tried_again_where_that_may_help(answers: tuple[int, ...], attempts: int, outcome: str) -> None:
    with service(*answers) as (url, bodies):
        assert post_json(url, '{"text": "done"}', waits_s=(0.0, 0.0)) == outcome
    assert bodies == ['{"text": "done"}'] * attempts


def test_webhook_that_is_silent_or_away_is_given_up_soon() -> None:
    with service(200, hold_s=1.0) as (url, _):
        started = time.monotonic()
        said = post_json(url, "{}", timeout_s=0.2, waits_s=())
        assert time.monotonic() - started < 0.9
    assert said.startswith("not sent: 127.0.0.1: ")
    assert "timed out" in said
    assert "refused" in post_json(url, "{}", waits_s=())
    assert "secret" not in said
    assert "https" in post_json("ftp://example/secret", "{}")
    assert "https" in post_json("", "{}")


@pytest.mark.parametrize("answer", [200, 404])
def test_webhook_gets_the_whole_notice_and_never_fails_the_run(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("told"))
    finish("register", REGISTERED)
    with service(answer) as (url, bodies):
        monkeypatch.setenv("MANYEYES_WEBHOOK_URL", url)
        result = say()
    (body,) = bodies
    notice = RunNotice.model_validate_json(body)
    assert (notice.state, notice.version, notice.steps[0].name) == ("succeeded", "3", "register")
    assert json.loads(body)["text"] == result.headline
    assert ("| webhook | sent to 127.0.0.1 (200) |" in result.markdown) == (answer == 200)
    assert "secret" not in result.markdown
    assert Path(url).name == "secret"
