"""The parts of the steps that need no model: digests, markers, parameters, reports, the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyeyes.errors import PipelineError, RecipeError, SnapshotError
from manyeyes.harness import kept as code_digest_module
from manyeyes.harness.base import Reporter
from manyeyes.harness.events import Artifact, Event, RunSummary, StepSummary, union_seconds, write_summary
from manyeyes.harness.inputs import Pinned, is_absent, locate_data, mark_absent, parse_pinned, training_datasets
from manyeyes.harness.kept import code_digest
from manyeyes.harness.stage import LOCAL_BRANCHES, note_branches, num_data_workers, parallel_branches
from manyeyes.kubeflow.summarise import in_words, summarise
from manyeyes.pages import Curve, draw_curves, readable, step_page
from manyeyes.recipe import load_recipe
from manyeyes.steps.prealign_encoder import prealign_encoder
from manyeyes.steps.pretrain_projector import by_encoder, pretrain_projector
from manyeyes.steps.resolve_data import read_recipe
from manyeyes.steps.sft import sft
from tests.pinned_toys import pin


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "manyeyes"
    (folder / "steps").mkdir(parents=True)
    (folder / "recipes").mkdir()
    (folder / "errors.py").write_text("a = 1\n", encoding="utf-8")
    (folder / "recipes" / "tiny.yaml").write_text("name: tiny\n", encoding="utf-8")
    monkeypatch.setattr(code_digest_module, "__file__", str(folder / "steps" / "code_digest.py"))
    monkeypatch.delenv("MANYEYES_IMAGE_DIGEST", raising=False)
    return folder


def test_code_digest_changes_with_every_source_file_and_with_constraints(package: Path, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    first = code_digest(constraints=constraints)
    assert len(first) == 64
    constraints.write_text("torch==2\n", encoding="utf-8")
    pinned = code_digest(constraints=constraints)
    (package / "errors.py").write_text("a = 2\n", encoding="utf-8")
    edited = code_digest(constraints=constraints)
    (package / "errors.py").rename(package / "mistakes.py")
    renamed = code_digest(constraints=constraints)
    assert len({first, pinned, edited, renamed}) == 4


def test_code_digest_ignores_recipes_and_compiled_files(package: Path, tmp_path: Path) -> None:
    before = code_digest(constraints=tmp_path / "none")
    (package / "recipes" / "tiny.yaml").write_text("name: other\n", encoding="utf-8")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "errors.py").write_text("", encoding="utf-8")
    assert code_digest(constraints=tmp_path / "none") == before


def test_image_digest_wins_over_the_source(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_IMAGE_DIGEST", "sha256:abc")
    assert code_digest() == "abc"


def test_recipe_comes_by_name_path_or_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\nname: mine\n", encoding="utf-8")
    by_path = read_recipe(str(path), "seed=5\n\n stages.sft.epochs=1 \n")
    assert (by_path.name, by_path.seed) == ("mine", 5)
    assert by_path.stages.sft is not None
    assert by_path.stages.sft.epochs == 1
    assert read_recipe(by_path.canonical_json(), "") == by_path
    assert read_recipe("extends: tiny\nname: mine\n", "seed=5\nstages.sft.epochs=1") == by_path
    assert read_recipe("tiny", "") == load_recipe("tiny")


def test_wrong_recipe_parameter_is_refused() -> None:
    with pytest.raises(RecipeError, match="tiny"):
        read_recipe("tinny", "")
    with pytest.raises(RecipeError, match="path=value"):
        read_recipe("tiny", "seed")


def test_data_is_named_by_parameters_or_by_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_data("a" * 32, "s3://bucket") == ("a" * 32, "s3://bucket")
    with pytest.raises(SnapshotError, match=r"data\.dvc"):
        locate_data("", "s3://bucket")


def test_what_was_pinned_is_read_back_and_anything_else_is_refused() -> None:
    pinned = Pinned(load_recipe("tiny"), data_md5="a" * 32, data_remote="x", code_digest="c")
    assert parse_pinned(pinned.text()) == pinned
    for wrong in ("", "[]", "{}", pinned.text().replace("data_md5", "data_md6")):
        with pytest.raises(PipelineError, match="preflight"):
            parse_pinned(wrong)


def test_every_training_data_set_is_named_once() -> None:
    assert training_datasets(load_recipe("tiny")) == ["easy-vqa-train"]


def test_stages_that_a_recipe_lacks_leave_markers_and_load_nothing(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", overrides={"stages.prealign": None, "stages.pretrain": None})
    given: Any = {"pinned": pin(recipe, "pretrain_projector"), "validation": tmp_path}
    result = prealign_encoder(Reporter("p"), encoder="", encoder_checkpoint=tmp_path / "encoder", **given)
    assert result.headline == "not in this recipe"
    assert is_absent(tmp_path / "encoder")
    pretrain_projector(
        Reporter("p"), encoder_checkpoints=[tmp_path / "encoder"], checkpoint=tmp_path / "pretrained", **given
    )
    assert is_absent(tmp_path / "pretrained")
    assert by_encoder([], [tmp_path / "encoder"]) == {}


def test_recipe_without_sft_keeps_the_pretrained_model(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", overrides={"stages.sft": None})
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text("{}", encoding="utf-8")
    sft(
        Reporter("s"),
        pinned=pin(recipe, "sft"),
        validation=tmp_path,
        encoder_checkpoints=[],
        pretrained=tmp_path / "pretrained",
        checkpoint=tmp_path / "checkpoint",
    )
    assert (tmp_path / "checkpoint" / "config.json").read_text(encoding="utf-8") == "{}"


def test_encoder_checkpoints_are_matched_in_the_recipes_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found = by_encoder(["vit", "efficientnet"], [tmp_path / "a", tmp_path / "b"])
    assert found == {"vit": tmp_path / "a", "efficientnet": tmp_path / "b"}
    mark_absent(tmp_path / "b", "test")
    with pytest.raises(ValueError, match="shorter"):
        by_encoder(["vit", "efficientnet"], [tmp_path / "a", tmp_path / "b"])


def test_a_step_of_one_encoder_learns_how_many_are_trained_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MANYEYES_RUN_DIR", raising=False)
    note_branches(3)  # on a cluster each has a pod of its own
    assert parallel_branches("prealign") == 1
    monkeypatch.setenv("MANYEYES_RUN_DIR", str(tmp_path))
    assert parallel_branches("prealign") == 1
    for encoders, branches in ((0, 1), (1, 1), (3, LOCAL_BRANCHES)):
        note_branches(encoders)
        assert parallel_branches("prealign") == branches
    assert parallel_branches("sft") == 1


def test_parallel_steps_count_once_in_the_time_inside_steps() -> None:
    assert union_seconds([(0.0, 4.0), (1.0, 3.0), (3.0, 6.0), (10.0, 11.0)]) == pytest.approx(7.0)
    assert union_seconds([]) == 0.0


def test_curves_are_scaled_into_the_picture() -> None:
    def drawn(points: list[tuple[float, float]]) -> str:
        return step_page("t", "", {"Loss": draw_curves([Curve("loss", points)], x_label="step", y_label="loss <nats>")})

    chart = drawn([(0, 2.0), (5, 1.0), (10, 0.0)])
    points = chart.split('points="')[1].split('"')[0].split()
    assert points == ["0.0,0.0", "50.0,50.0", "100.0,100.0"]
    assert "loss &lt;nats&gt;" in chart
    assert "Too few points" in drawn([(0, 2.0)])


def test_values_are_shown_as_a_person_writes_them() -> None:
    assert [readable(value) for value in (True, 1234567, 0.123456, 12345.678, "x", None)] == [
        "yes",
        "1,234,567",
        "0.1235",
        "12,346",
        "x",
        "None",
    ]


def event(kind: str, step: str, **fields: object) -> Event:
    return Event.model_validate({"kind": kind, "step": step, "time": 100.0, **fields})


def test_summary_counts_time_outside_step_functions_as_overhead(tmp_path: Path) -> None:
    report = tmp_path / "page"
    report.write_text("<!doctype html>", encoding="utf-8")
    events = [
        event("finished", "a[x]", seconds=4.0, ended=10.0, figure="good", import_seconds=1.0),
        event("finished", "a[y]", seconds=4.0, ended=12.0),
        event("completed", "a[x]", artifacts={"report": Artifact(path=str(report), metadata={})}),
        event("cached", "b", figure="as before"),
    ]
    summary = summarise(
        events,
        run_dir=tmp_path,
        pipeline="toy",
        status="succeeded",
        started="now",
        git_commit=None,
        git_dirty=None,
        error=None,
        wall_s=10.0,
    )
    assert summary.overhead_s == pytest.approx(4.0)
    assert [(step.name, step.seconds, step.cached) for step in summary.steps] == [
        ("a[x]", 4.0, False),
        ("a[y]", 4.0, False),
        ("b", 0.0, True),
    ]
    assert summary.reports == {"a[x]": str(tmp_path / "reports" / "a-x.html")}
    written = write_summary(summary, tmp_path)
    assert RunSummary.model_validate_json(written.read_text(encoding="utf-8")) == summary


def test_interrupted_run_says_that_nothing_goes_on(tmp_path: Path) -> None:
    summary = RunSummary(
        run_id="r", pipeline="train", status="interrupted", started="now", log="l", overhead_s=1, wall_s=65
    )
    assert in_words(summary)[0] == "stopped after 1 min 5 s; nothing goes on running"


def test_words_name_verdict_version_and_what_to_type_next() -> None:
    summary = RunSummary.model_validate(
        {
            "run_id": "r",
            "pipeline": "train",
            "status": "succeeded",
            "started": "now",
            "log": "l",
            "overhead_s": 30,
            "wall_s": 120,
            "steps": [StepSummary(name="a", seconds=1, cached=True).model_dump()],
            "scorecard": {
                "easy-vqa": {"n": 9673, "score": 98.76, "ci95": [98.1, 99.2], "image_off": 64.2, "parse_failures": 0}
            },
            "gate": {"verdict": "passed", "rules": [{"rule": "floor", "found": 1, "needed": 0, "passed": True}]},
            "model": {"name": "m", "version": "3", "aliases": ["challenger", "champion"]},
            "bundle": {"path": "/b", "bytes": 25_000_000},
            "example": {"image": "/i.png", "question": "what?", "reference": "that"},
        }
    )
    lines = in_words(summary)
    assert lines[0] == ("easy-vqa: 98.8% right (95% interval 98.1 to 99.2, 9,673 questions), without the image 64.2%")
    assert "gate: passed (1 of 1 rules)" in lines
    assert "registered: m version 3, now challenger and champion" in lines
    assert "bundle: /b (25.0 MB)" in lines
    assert any("30 s (25%)" in line for line in lines)
    assert '  manyeyes ask m /i.png "what?"' in lines
    assert json.loads(summary.model_dump_json())["scorecard"]["easy-vqa"]["n"] == 9673


def test_batches_are_built_ahead_where_a_gpu_trains_or_the_machine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYEYES_DATA_WORKERS", raising=False)
    assert num_data_workers(threads=16, gpus=0) == 0
    assert [num_data_workers(threads=threads, gpus=1) for threads in (1, 2, 3, 16)] == [1, 1, 2, 4]
    for given in ("0", "7"):
        monkeypatch.setenv("MANYEYES_DATA_WORKERS", given)
        assert num_data_workers(threads=2, gpus=1) == int(given)
    for wrong in ("-1", "two"):
        monkeypatch.setenv("MANYEYES_DATA_WORKERS", wrong)
        with pytest.raises(PipelineError, match=f'MANYEYES_DATA_WORKERS is "{wrong}"'):
            num_data_workers(threads=2, gpus=0)
