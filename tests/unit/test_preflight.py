"""Preflight on a small snapshot and a real MLflow store: all that is wrong at once, and nothing that is not."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import MistralConfig

from manyeyes.errors import PreflightError
from manyeyes.harness.base import LocalArtifact, Reporter, run_step
from manyeyes.harness.events import ErrorReport
from manyeyes.recipe import Recipe, change_recipe, load_recipe
from manyeyes.registry.tracking import connect
from manyeyes.steps import preflight as preflight_checks
from manyeyes.steps.preflight import (
    STEP,
    Check,
    Need,
    as_table,
    check_disk,
    check_memory,
    check_sources,
    estimate_recipe,
    find_data,
    preflight,
)
from tests.model_toys import write_language_model
from tests.pipelines.checkout import push
from tests.registry_store import store_uri
from tests.training_toys import toy_recipe, toy_snapshot

NEED = Need(stages={}, disk_gb=2.0, least_disk_gb=1.0)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The md5 of a snapshot, and the folder that DVC pushed it to."""
    base = tmp_path_factory.mktemp("preflight")
    snapshot = toy_snapshot(base / "data")
    return push(snapshot.path, base / "remote"), str(base / "remote")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    values = toy_recipe().model_dump()
    values["evaluation"]["benchmarks"] = ("easy-vqa",)
    values["data"]["eval_datasets"] = ()
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(
    estimates: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    monkeypatch.setenv("MANYEYES_CACHE", str(estimates))
    for name in ("MANYEYES_RUN_LOCK", "MANYEYES_RUN_DIR", "MANYEYES_DEVICE_MEMORY_GB", "MANYEYES_WORKDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_RUN_ID", "MANYEYES_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANYEYES_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def look(recipe: Recipe, remote: tuple[str, str], **more: str) -> tuple[PreflightError | None, str]:
    """What preflight refuses, and its Markdown where it refuses nothing."""
    given = {"data_md5": remote[0], "data_remote": remote[1], **more}
    try:
        result = preflight(Reporter("preflight"), recipe=recipe.canonical_json(), **given)
    except PreflightError as error:
        return error, ""
    return None, result.markdown


def subjects(error: PreflightError | None) -> list[str]:
    assert error is not None
    return [problem["subject"] for problem in error.problems]


def test_all_that_is_wrong_is_said_at_once(recipe: Recipe, remote: tuple[str, str], tmp_path: Path) -> None:
    model = recipe.model.model_dump()
    model["encoders"][0]["source"] = f"dir:{tmp_path}/nowhere"
    model["encoders"][1]["source"] = "package:no-such-package/file#sha256=" + "0" * 64
    wrong = Recipe.model_validate({**recipe.model_dump(), "model": model})
    error, _ = look(wrong, remote, registry_model="a name/with spaces")
    # The toy snapshot has no data set of the benchmark either.
    assert subjects(error) == ["registry name", "data set easy-vqa-test", "encoder left", "encoder right"]
    assert error is not None
    assert error.found.startswith("4 things are wrong: registry name: ")
    assert "pip install no-such-package" in error.do
    assert not error.retry


def test_recipe_that_cannot_be_read_does_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        preflight(
            Reporter("preflight"), recipe="tinny", data_md5="0" * 32, data_remote=str(tmp_path), registry_model="x y"
        )
    assert [problem["subject"] for problem in caught.value.problems] == ["recipe", "registry name", "data"]
    assert 'Did you mean "tiny"?' in caught.value.problems[0]["do"]
    assert "0" * 32 in caught.value.problems[2]["found"]


def test_fusion_option_that_there_is_not_is_found_before_any_training(recipe: Recipe, remote: tuple[str, str]) -> None:
    model = recipe.model.model_dump()
    model["fusion"]["options"] = {"averge": True}
    error, _ = look(Recipe.model_validate({**recipe.model_dump(), "model": model}), remote)
    assert "model" in subjects(error)
    assert error is not None
    assert "averge" in error.found


def test_4_bits_without_the_library_for_them_are_found_before_any_training(
    recipe: Recipe, remote: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = change_recipe(recipe, {"stages.sft.lora": {"rank": 2, "alpha": 2, "quantize": "nf4"}})
    assert "4 bits" not in subjects(look(adapted, remote)[0])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "4 bits" not in subjects(look(recipe, remote)[0])
    error, _ = look(adapted, remote)
    assert "4 bits" in subjects(error)
    assert error is not None
    assert 'pip install "manyeyes[qlora]"' in error.do


def test_packing_with_a_language_model_that_cannot_keep_samples_apart_is_found_before_any_training(
    recipe: Recipe, remote: tuple[str, str], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = write_language_model(tmp_path / "lm", MistralConfig(**sizes, num_key_value_heads=2, sliding_window=16))
    packed = change_recipe(recipe, {"stages.sft.packing": {"tokens": 256}})
    assert "packing" not in subjects(look(packed, remote)[0])
    error, _ = look(change_recipe(packed, {"model.language_model.source": f"dir:{folder}"}), remote)
    assert "packing" in subjects(error)
    assert error is not None
    assert "it slides windows of 16 tokens over samples of up to 128" in error.found


def test_nothing_wrong_leaves_a_run_and_no_probe(
    recipe: Recipe, remote: tuple[str, str], monkeypatch: pytest.MonkeyPatch, estimates: Path
) -> None:
    monkeypatch.setattr(preflight_checks, "_datasets", lambda _: ["toy-train"])
    error, markdown = look(recipe, remote)
    assert error is None
    assert "| fine | data set toy-train | 12 records |" in markdown
    assert "| warning | memory of sft | the memory of the nodes that train is not known here |" in markdown
    client = connect().client
    (run,) = client.search_runs(
        [connect(create=True).experiment_id], "tags.`manyeyes.step` = 'preflight'", max_results=1
    )
    assert run.info.status == "FINISHED"
    assert "nothing wrong" in run.data.tags["manyeyes.figure"]
    assert client.list_artifacts(run.info.run_id) == []
    assert client.search_registered_models("name LIKE 'manyeyes-preflight-%'") == []
    # torch is not loaded for a recipe that was estimated before.
    assert list((estimates / "facts").glob("*.json"))
    monkeypatch.setattr("manyeyes.estimate.skeleton.count_facts", lambda *_, **__: pytest.fail("estimated again"))
    assert look(recipe, remote)[0] is None


def test_failure_is_one_table_in_the_notes_error_json_and_the_steps_run(
    recipe: Recipe, remote: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = {name: LocalArtifact(str(tmp_path / "task" / name)) for name in ("metrics", "report", "notes")}
    with pytest.raises(SystemExit) as stop:
        run_step(
            STEP,
            **shown,
            recipe=recipe.canonical_json(),
            data_md5=remote[0],
            data_remote=remote[1],
            registry_model="x y",
        )
    assert stop.value.code == 2
    record = ErrorReport.model_validate_json((tmp_path / "task" / "error.json").read_text(encoding="utf-8"))
    assert [problem.subject for problem in record.problems] == ["registry name", "data set easy-vqa-test"]
    notes = Path(shown["notes"].path).read_text(encoding="utf-8")
    assert '| registry name | registry_model is "x y" |' in notes
    log = capfd.readouterr().err
    assert log.index("wrong    registry name") < log.index("fine     MLflow")
    runs = connect().client.search_runs(
        [connect(create=True).experiment_id], "tags.`manyeyes.step` = 'preflight'", max_results=1
    )
    assert runs[0].info.status == "FAILED"
    assert ErrorReport.model_validate_json(runs[0].data.tags["manyeyes.error"]) == record


def test_mlflow_that_does_not_answer_is_one_problem_among_others(
    recipe: Recipe, remote: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    error, _ = look(recipe, remote, registry_model="x y")
    assert subjects(error)[:2] == ["MLflow", "registry name"]
    assert error is not None
    assert error.retry


def test_damaged_manifest_in_the_remote_is_found(remote: tuple[str, str], tmp_path: Path) -> None:
    data = find_data(*remote)
    assert data.manifest.datasets["toy-train"].rows == 12
    assert json.loads(data.read("pretrained/lm/config.json"))["model_type"] == "llama"
    file = data.files["manifest.json"]
    path = Path(remote[1]) / "files" / "md5" / file.md5[:2] / file.md5[2:]
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    try:
        with pytest.raises(preflight_checks.SnapshotError, match="damaged copy of manifest"):
            find_data(*remote)
    finally:
        path.write_bytes(before)


def test_parts_of_the_snapshot_and_of_the_hub_are_looked_for(
    recipe: Recipe, remote: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = recipe.model.model_dump()
    model["encoders"][0]["source"] = "hub:openai/clip-vit-large-patch14-336@" + "0" * 40
    model["language_model"]["source"] = "snapshot:pretrained/ml"
    checks = check_sources(Recipe.model_validate({**recipe.model_dump(), "model": model}), find_data(*remote))
    assert [check.state for check in checks] == ["problem", "ok", "problem"]
    assert "HF_HUB_OFFLINE" in checks[0].do
    assert 'Did you mean "pretrained/lm"?' in checks[2].do


def memory_of(devices: str, capacity: str, monkeypatch: pytest.MonkeyPatch, **fields: object) -> dict[str, Check]:
    published = load_recipe("mini-gemini-2b", overrides={f"stages.sft.{name}": value for name, value in fields.items()})
    monkeypatch.setenv("MANYEYES_DEVICES", devices)
    monkeypatch.setenv("MANYEYES_DEVICE_MEMORY_GB", capacity)
    checks = check_memory(published, estimate_recipe(published, None))
    return {check.subject.removeprefix("memory of "): check for check in checks}


def test_stage_that_does_not_fit_is_refused_with_the_nearest_change_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {check.state for check in memory_of("pretrain=2,sft=2", "80", monkeypatch).values()} == {"ok"}
    found = memory_of("pretrain=2,sft=2", "80", monkeypatch, micro_batch_size=64)
    assert (found["pretrain"].state, found["sft"].state) == ("ok", "problem")
    assert found["sft"].needed.endswith("whatever the micro-batch")
    assert "on each of 2 devices" in found["sft"].needed
    assert '--set "stages.sft.micro_batch_size=16"' in found["sft"].do
    assert "devices of this size" in found["sft"].do
    # What no micro-batch changes is too much for one: others, or adapters.
    alone = memory_of("pretrain=1,sft=1", "45", monkeypatch)["sft"]
    assert alone.state == "problem"
    assert "lora={rank: 64, alpha: 16}" in alone.do
    assert "quantize: nf4" in memory_of("pretrain=1,sft=1", "14", monkeypatch)["sft"].do
    adapters = memory_of("pretrain=1,sft=1", "14", monkeypatch, lora={"rank": 64, "alpha": 16}, micro_batch_size=1)
    assert '--set "stages.sft.lora.quantize=nf4"' in adapters["sft"].do
    changed = memory_of("pretrain=1,sft=1", "45", monkeypatch, lora={"rank": 64, "alpha": 16}, micro_batch_size=1)[
        "sft"
    ]
    assert changed.state == "ok", changed


def test_machine_without_a_gpu_is_warned_where_only_the_batch_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    published = load_recipe("mini-gemini-2b", overrides={"stages.sft.micro_batch_size": 64})
    need = estimate_recipe(published, None)
    monkeypatch.setattr(preflight_checks, "device_memory", lambda: (110.0, preflight_checks._NO_GPU))
    check = check_memory(published, need)[-1]
    assert check.state == "warning"
    assert "micro_batch_size" in check.do
    monkeypatch.setattr(preflight_checks, "device_memory", lambda: (10.0, preflight_checks._NO_GPU))
    assert check_memory(published, need)[-1].state == "problem"
    monkeypatch.setattr(preflight_checks, "device_memory", lambda: None)
    assert {check.state for check in check_memory(published, need)} == {"warning"}


def test_memory_of_this_machine_counts_where_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight_checks.device_memory() is None
    monkeypatch.setenv("MANYEYES_RUN_LOCK", "lock")
    known = preflight_checks.device_memory()
    assert known is not None
    assert known[0] > 0.5
    assert "this machine" in known[1]


@pytest.mark.parametrize(("free_gb", "state"), [(0.5, "problem"), (1.5, "warning"), (2.5, "ok")])
def test_disk_is_compared_with_the_estimate(free_gb: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = preflight_checks.shutil.disk_usage("/")
    monkeypatch.setattr(preflight_checks.shutil, "disk_usage", lambda _: usage._replace(free=int(free_gb * 1e9)))
    assert check_disk(NEED, None)[0].state == "warning"  # steps may write elsewhere
    monkeypatch.setenv("MANYEYES_RUN_LOCK", "lock")
    assert check_disk(NEED, None)[0].state == state


def test_table_begins_with_what_is_wrong() -> None:
    rows = [
        Check("a", "ok", "good"),
        Check("b", "warning", "so"),
        Check("c", "problem", "bad | worse", "good", "Fix."),
    ]
    assert [line.split("|")[2].strip() for line in as_table(rows).markdown().splitlines()[2:]] == ["c", "b", "a"]
    assert "bad \\| worse" in as_table(rows).markdown()
