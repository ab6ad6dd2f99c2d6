"""The compiled train pipeline, as ``manyeyes run`` runs it: one optimizer step a stage, real records, real registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyeyes.harness.events import EventReader, RunSummary
from manyeyes.runtime.bundle import load_bundle
from tests.pipelines.checkout import Checkout

# Steps in the order in which they end.
STEPS = [
    "preflight",
    "validate_data",
    "prealign_encoder[vit]",
    "pretrain_projector",
    "sft",
    "export_onnx",
    "evaluate[torch]",
    "evaluate[bundle]",
    "gate",
    "register",
    "summarise_run",
]
NEVER_CACHED = {"preflight", "gate", "register", "summarise_run"}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def first_run(toy_checkout: Checkout) -> tuple[str, RunSummary]:
    code, output = toy_checkout.run("run", "--recipe", "toy.yaml")
    assert code == 0, output + toy_checkout.log()[-8000:]
    return output, toy_checkout.summary()


@pytest.mark.slow
def test_every_step_runs_and_reports(first_run: tuple[str, RunSummary]) -> None:
    output, summary = first_run
    names = [step.name for step in summary.steps]
    assert sorted(names) == sorted(STEPS)
    side_by_side = "evaluate[torch]"  # with export_onnx: neither waits for the other
    assert [name for name in names if name != side_by_side] == [name for name in STEPS if name != side_by_side]
    assert not any(step.cached for step in summary.steps)
    for step in summary.steps:
        assert step.seconds > 0
        assert step.report is not None
        assert Path(step.report).read_text(encoding="utf-8").lower().startswith("<!doctype html>")
        assert len([line for line in output.splitlines() if line.split()[:2] == [step.name, "done"]]) == 1
    assert "\x1b" not in output
    assert "executor" not in output


@pytest.mark.slow
def test_summary_says_what_ran_on_what(first_run: tuple[str, RunSummary], toy_checkout: Checkout) -> None:
    _, summary = first_run
    assert summary.status == "succeeded"
    assert summary.recipe == "toy"
    assert summary.data_md5 is not None
    assert summary.data_md5 in (toy_checkout.path / "data.dvc").read_text(encoding="utf-8")
    assert summary.git_commit is None
    assert summary.scorecard is not None
    assert summary.scorecard["easy-vqa"].n == 16
    assert summary.scorecard["easy-vqa"].image_off is not None
    assert summary.parity is not None
    assert summary.parity.token_match == 1.0
    assert summary.bundle is not None
    files = [path for path in Path(summary.bundle.path).rglob("*") if path.is_file()]
    assert summary.bundle.bytes == sum(path.stat().st_size for path in files)
    int4 = summary.variants["int4"]
    assert int4.precision == "vision int8, embed int4, decoder int4"
    assert 0 < int4.bytes < summary.bundle.bytes / 2
    assert int4.scores["easy-vqa"].n == 16
    assert "Variants of this bundle" in Path(summary.reports["evaluate[bundle]"]).read_text(encoding="utf-8")
    assert 0 < summary.overhead_s < summary.wall_s
    written = json.loads((toy_checkout.path / "runs" / "latest" / "summary.json").read_text(encoding="utf-8"))
    assert written["gate"]["verdict"] == "failed"


@pytest.mark.slow
def test_model_of_one_step_is_registered_but_moves_no_alias(first_run: tuple[str, RunSummary]) -> None:
    output, summary = first_run
    assert summary.gate is not None
    assert summary.gate.verdict == "failed"
    assert "floor" in [rule.rule for rule in summary.gate.rules if not rule.passed]
    (precision,) = [rule for rule in summary.gate.rules if rule.rule == "precision"]
    assert precision.passed
    assert "points" in precision.found
    assert summary.model is not None
    assert (summary.model.name, summary.model.version, summary.model.aliases) == ("manyeyes-toy", "1", [])
    assert "gate: failed" in output


@pytest.mark.slow
def test_registered_version_answers_and_is_pulled(first_run: tuple[str, RunSummary], toy_checkout: Checkout) -> None:
    _, summary = first_run
    assert summary.example is not None
    code, output = toy_checkout.run("ask", "manyeyes-toy/1", summary.example.image, summary.example.question)
    assert code == 0, output
    code, output = toy_checkout.run("pull", "manyeyes-toy/1", "pulled")
    assert code == 0, output
    assert summary.bundle is not None
    pulled = json.loads((toy_checkout.path / "pulled" / "manifest.json").read_text(encoding="utf-8"))
    assert pulled == json.loads((Path(summary.bundle.path) / "manifest.json").read_text(encoding="utf-8"))
    asked = (summary.example.image, summary.example.question)
    code, output = toy_checkout.run("ask", "manyeyes-toy/1", *asked, "--variant", "int4")
    assert code == 0, output
    int4 = load_bundle(Path(summary.bundle.path), variant="int4")
    image = (toy_checkout.path / summary.example.image).read_bytes()
    assert output.strip().endswith(int4.answer(asked[1], images=[image], max_new_tokens=32).strip())
    fetched = toy_checkout.path / "runs" / "cache" / "bundles" / "manyeyes-toy-1-int4"
    assert {path.name for path in fetched.glob("onnx/*")} == {
        "vision_encoder_int8.onnx",
        "embed_tokens_q4.onnx",
        "decoder_model_merged_q4.onnx",
        "decoder_model_merged_q4.onnx_data",
        "decoder_prefill_q4.onnx",
    }
    code, output = toy_checkout.run("pull", "manyeyes-toy", "champion")
    assert code == 2
    assert "champion" in output


@pytest.mark.slow
def test_bundle_scores_the_same_outside_the_pipeline(first_run: tuple[str, RunSummary], toy_checkout: Checkout) -> None:
    _, summary = first_run
    assert summary.bundle is not None
    assert summary.bundle_scorecard is not None
    code, output = toy_checkout.run("evaluate", summary.bundle.path, "--recipe", "toy.yaml", "--out", "again")
    assert code == 0, output
    card = json.loads((toy_checkout.path / "again" / "scorecard" / "scorecard.json").read_text(encoding="utf-8"))
    assert card["benchmarks"]["easy-vqa"]["score"] == summary.bundle_scorecard["easy-vqa"].score
    assert card["model"]["kind"] == "bundle"


@pytest.mark.slow
def test_version_that_the_gate_refused_is_promoted_only_by_force(
    first_run: tuple[str, RunSummary], toy_checkout: Checkout
) -> None:
    code, output = toy_checkout.run("promote", "manyeyes-toy/1")
    assert code == 2
    assert "gate" in output
    code, output = toy_checkout.run("rollback", "manyeyes-toy")
    assert code == 2
    assert "champion" in output


@pytest.mark.slow
def test_second_run_comes_from_the_cache_and_finds_the_same_version(
    first_run: tuple[str, RunSummary], toy_checkout: Checkout
) -> None:
    _, first = first_run
    code, output = toy_checkout.run("run", "--recipe", "toy.yaml", "--require-promotion")
    assert code == 3, output
    second = toy_checkout.summary()
    assert {step.name for step in second.steps if not step.cached} == NEVER_CACHED
    assert second.model == first.model
    assert second.scorecard == first.scorecard
    assert second.code_digest == first.code_digest
    assert f"{len(STEPS) - len(NEVER_CACHED)} of {len(STEPS)} steps from cache" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "ran", "version"),
    [
        ("description=In other words", set(), "1"),
        ("gate.0.at_least=91", set(), "1"),
        ("stages.sft.max_steps=2", {"sft", "evaluate[torch]", "export_onnx", "evaluate[bundle]"}, "2"),
    ],
)
def test_a_changed_field_runs_the_steps_that_read_it_and_those_after_them(
    changed: str, ran: set[str], version: str, first_run: tuple[str, RunSummary], toy_checkout: Checkout
) -> None:
    _, first = first_run
    code, output = toy_checkout.run("run", "--recipe", "toy.yaml", "--set", changed)
    assert code == 0, output
    summary = toy_checkout.summary()
    assert {step.name for step in summary.steps if not step.cached} == NEVER_CACHED | ran
    assert summary.recipe_digest != first.recipe_digest
    assert summary.model is not None
    assert summary.model.version == version


@pytest.mark.slow
def test_edited_library_is_not_answered_from_the_cache(
    first_run: tuple[str, RunSummary], toy_checkout: Checkout
) -> None:
    _, first = first_run
    edited = toy_checkout.library / "manyeyes" / "steps" / "validate_data.py"
    before = edited.read_text(encoding="utf-8")
    # A step that comes from the cache could not raise this.
    edited.write_text(
        before.replace("    reporter.progress(", '    raise ValidationError("edited", "", "")\n    reporter.progress('),
        encoding="utf-8",
    )
    try:
        code, output = toy_checkout.run("run", "--recipe", "toy.yaml")
    finally:
        edited.write_text(before, encoding="utf-8")
    assert code == 2, output
    assert "validate_data failed: ValidationError" in output
    assert "edited" in output
    summary = toy_checkout.summary()
    assert summary.status == "failed"
    assert summary.code_digest != first.code_digest


def test_unreachable_mlflow_is_refused_before_any_training(toy_checkout: Checkout) -> None:
    code, output = toy_checkout.run("run", "--recipe", "toy.yaml", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 2, output
    assert "RegistryUnreachableError" in output
    events = EventReader((toy_checkout.path / "runs" / "latest").resolve()).read_new()
    assert not [event for event in events if event.step.startswith(("prealign", "pretrain", "sft"))]


def test_snapshot_that_the_remote_lacks_is_refused_by_name(toy_checkout: Checkout) -> None:
    code, output = toy_checkout.run("run", "--recipe", "toy.yaml", "--data-md5", "0" * 32)
    assert code == 2, output
    assert "preflight failed: PreflightError" in output
    assert "0" * 32 in output


@pytest.mark.slow
def test_everything_that_is_wrong_is_said_at_once_before_any_step(toy_checkout: Checkout) -> None:
    code, output = toy_checkout.run(
        "run",
        *("--recipe", "toy.yaml", "--data-md5", "0" * 32, "--registry-model", "no such/name"),
        *("--set", "model.encoders.0.source=dir:nowhere"),
    )
    assert code == 2, output
    error = toy_checkout.summary().error
    assert error is not None
    assert [problem.subject for problem in error.problems] == ["registry name", "data", "encoder vit"]
    for problem in error.problems:
        assert problem.found in output
        assert f"do      {problem.do}" in output
    events = EventReader((toy_checkout.path / "runs" / "latest").resolve()).read_new()
    assert {event.step for event in events if event.kind == "started"} == {"preflight", "summarise_run"}
    # The exit handler learns of it through MLflow.
    summary = next(event for event in events if event.step == "summarise_run" and event.kind == "finished")
    assert "toy failed in preflight" in summary.figure
    notes = Path(next(event for event in events if event.kind == "completed").artifacts["notes"].path).read_text(
        encoding="utf-8"
    )
    assert all(problem.found in notes for problem in error.problems)


@pytest.mark.slow
def test_run_is_summarised_with_its_verdict_and_steps(
    first_run: tuple[str, RunSummary], toy_checkout: Checkout
) -> None:
    _, summary = first_run
    step = next(step for step in summary.steps if step.name == "summarise_run")
    assert "train of toy succeeded" in step.figure
    assert "gate failed" in step.figure
    assert "manyeyes-toy version 1" in step.figure
    assert step.report is not None
    page = Path(step.report).read_text(encoding="utf-8")
    assert all(name in page for name in STEPS[:-1])
