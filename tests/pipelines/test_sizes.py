"""How large runs become on Kubeflow: each pipeline with every published recipe, from what would be uploaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from manyeyes.data.curation.parts import MAX_PARTS
from manyeyes.errors import PipelineError
from manyeyes.harness.base import LocalArtifact
from manyeyes.kubeflow import component
from manyeyes.kubeflow.pipeline import PIPELINES, compile_pipeline, read_documents
from manyeyes.kubeflow.profiles import load_profile
from manyeyes.kubeflow.sizes import SIZES, WorkflowSize, check_growth, check_size, known_outputs, workflow_size
from manyeyes.recipe import list_recipes, load_recipe, write_recipe_text
from tests.pipelines.checkout import ROOT

IMAGE = "registry.example:5000/team/manyeyes-steps@sha256:" + "7" * 64
# Argo compresses a workflow at this size, and Kubeflow's own list of tasks then stops.
COMPRESSED_AT = 1024 * 1024
GRID = "seed=[1, 2, 3, 4, 5, 6]\nmodel.projector.depth=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"


@pytest.fixture(scope="module", params=PIPELINES)
def uploaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(request.param, tmp_path_factory.mktemp("uploaded"))


def compiled(name: str, folder: Path) -> list[dict[str, Any]]:
    profile = load_profile("laptop", root=ROOT)
    path = compile_pipeline(name, folder / f"{name}.yaml", root=ROOT, image=IMAGE, profile=profile)
    return read_documents(path)


def size_of(documents: list[dict[str, Any]], **given: Any) -> WorkflowSize:
    form = documents[0]["root"]["inputDefinitions"]["parameters"]
    values = {name: definition.get("defaultValue", "") for name, definition in form.items()}
    values |= {name: value for name, value in given.items() if name in form}
    return workflow_size(documents, parameters=values, outputs=known_outputs(values))


def test_every_published_recipe_runs_to_its_end(uploaded: list[dict[str, Any]]) -> None:
    for recipe in list_recipes():
        size = size_of(uploaded, recipe=recipe, ablate_grid=GRID)
        size.check(recipe)
        for task in size.tasks:
            if task.step:
                assert task.status_bytes < MOST_A_STEP.get(task.step, 63_000), (recipe, task)


# Bytes of status. Each artifact that a step takes is 2 kB: merge_scorecards takes one of each benchmark, compare_trials
# one of each batch, curate_data and judge_snapshot one of each part, register all evidence beside the whole recipe.
MOST_A_STEP = {
    **dict.fromkeys(("promote_version", "restore_previous"), 36_500),
    **dict.fromkeys(("fetch_model", "summarise_run", "validate_data", "score_benchmark"), 46_000),
    **dict.fromkeys(("prealign_encoder", "plan_ablation"), 51_000),
    # These hold how the size follows from the recipe, too.
    **dict.fromkeys(("preflight", "plan_evaluation"), 51_500),
    "register": 76_500,
    **dict.fromkeys(("compare_trials", "curate_data", "judge_snapshot"), 69_000),
    "merge_scorecards": 73_000,
}


def test_training_of_two_and_of_five_encoders_is_not_compressed(tmp_path: Path) -> None:
    documents = compiled("train", tmp_path)
    assert size_of(documents, recipe="tiny").total_bytes < 720_000
    for recipe in ("eagle-x5-13b", "tiny-eagle-x5"):
        assert size_of(documents, recipe=recipe).total_bytes < 800_000, recipe


def test_a_recipe_of_ones_own_takes_no_more_than_a_shipped_one(tmp_path: Path) -> None:
    documents = compiled("train", tmp_path)
    text = write_recipe_text(load_recipe("tiny"))
    sizes = {task.step: task for task in size_of(documents, recipe_text=text).tasks}
    assert sizes["preflight"].status_bytes < 60_000
    assert size_of(documents, recipe_text=text).total_bytes < 740_000


def test_what_a_loop_runs_for_is_counted_with_each_of_its_items(tmp_path: Path) -> None:
    size = size_of(compiled("train", tmp_path), recipe="tiny")
    aligned = [task.input_bytes for task in size.tasks if task.step == "prealign_encoder"]
    # The second encoder's source has 190 characters, that of the first 24.
    assert 150 < aligned[1] - aligned[0] < 250


def test_sixty_variants_are_no_larger_than_eight_steps(tmp_path: Path) -> None:
    documents = compiled("ablate", tmp_path)
    size = size_of(documents, recipe="tiny", ablate_grid=GRID)
    assert [task.step for task in size.tasks].count("train_trial") == 8
    assert size.total_bytes < 0.9 * COMPRESSED_AT


def test_a_curation_in_all_of_its_parts_is_not_compressed(tmp_path: Path) -> None:
    size = size_of(compiled("curate", tmp_path))
    assert [task.step for task in size.tasks].count("gather_facts") == MAX_PARTS
    assert size.total_bytes < 0.95 * COMPRESSED_AT


def test_a_validation_in_all_of_its_parts_is_not_compressed(tmp_path: Path) -> None:
    size = size_of(compiled("validate", tmp_path), recipe="eagle-x5-13b")
    assert [task.step for task in size.tasks].count("profile_shards") == MAX_PARTS
    assert size.total_bytes < 0.95 * COMPRESSED_AT


def test_search_over_five_encoders_counts_every_round(tmp_path: Path) -> None:
    documents = compiled("search_encoders", tmp_path)
    size = size_of(documents, recipe="tiny-eagle-x5")
    steps = [task.step for task in size.tasks]
    assert steps.count("advance_search") == 6
    assert steps.count("prealign_encoder") == 3
    assert steps.count("train_trial") == 1 + 5 * 5  # no round has more
    size.check("a search")


def test_what_would_end_before_its_end_is_refused_with_the_number(tmp_path: Path) -> None:
    documents = compiled("train", tmp_path)
    long = "description: " + "x" * 150_000
    with pytest.raises(PipelineError, match=r"would be 15\d kB.*at most 131 kB"):
        check_size(documents, {"recipe_text": long})
    executor = documents[0]["deploymentSpec"]["executors"]["exec-sft"]["container"]
    executor["env"].append({"name": "LONG", "value": "x" * 1_000_000})
    with pytest.raises(PipelineError, match=r"train of tiny would be a workflow of [6-9]\.\d MB \(11 tasks\)"):
        check_size(documents, {})


def test_size_grows_with_what_a_step_is_given(tmp_path: Path) -> None:
    documents = compiled("rollback", tmp_path)
    short, long = (size_of(documents, reason="x" * count) for count in (0, 1000))
    grown = {
        task.name: more.status_bytes - task.status_bytes for task, more in zip(short.tasks, long.tasks, strict=True)
    }
    # Six copies in the nodes of the step, and two in the inputs of the driver of the whole.
    assert grown["rollback/exit-handler-1/restore-previous"] == 6000
    assert grown["rollback"] == 2000


def sizes_of_first_step(documents: list[dict[str, Any]]) -> str:
    containers = [executor["container"] for executor in documents[0]["deploymentSpec"]["executors"].values()]
    found = [item["value"] for container in containers for item in container.get("env", []) if item["name"] == SIZES]
    assert len(found) <= 1
    return found[0] if found else ""


def test_the_first_pod_computes_what_the_whole_pipeline_would_give(
    uploaded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sizes_of_first_step(uploaded)
    if "recipe" not in uploaded[0]["root"]["inputDefinitions"]["parameters"]:
        assert not text
        return
    monkeypatch.setattr("manyeyes.kubeflow.sizes.MOST_BYTES", 0)
    names = ", ".join(f"benchmark-{number}" for number in range(80))
    many = f"evaluation.benchmarks=[easy-vqa, {names}]"
    for given in (*({"recipe": recipe} for recipe in list_recipes()), {"recipe": "tiny", "recipe_overrides": many}):
        exact = size_of(uploaded, **given).total_bytes / 1e6
        with pytest.raises(PipelineError) as refused:
            check_growth(text, given, what="a run")
        about = float(re.findall(r"about ([\d.]+) MB", refused.value.found)[0])
        assert -0.06 < about - exact < 0.08 * exact + 0.06, given


def test_a_run_from_the_form_that_is_too_large_ends_before_its_first_step_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIZES, sizes_of_first_step(compiled("evaluate", tmp_path)))
    page = LocalArtifact(str(tmp_path / "report"))
    form = dict.fromkeys(("recipe_text", "recipe_overrides", "data_md5", "data_remote"), "")
    many = " ".join(f"benchmark-{number}" for number in range(120))
    arguments = {**form, "recipe": "tiny", "evaluate_model": "m", "evaluate_benchmarks": many, "report": page}
    with pytest.raises(SystemExit) as ended:
        component.run_component("plan_evaluation", arguments)
    assert ended.value.code == 2
    said = json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))
    assert re.fullmatch(
        r"this run would be a workflow of about [6-9]\.\d MB \(2 encoders, 2 of them prealigned, 120 benchmarks\)",
        said["found"],
    )
    assert said["needed"].startswith("at most 6 MB")
    assert "fewer benchmarks" in said["do"]
