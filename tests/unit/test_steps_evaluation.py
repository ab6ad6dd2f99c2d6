"""Finding, fetching and scoring a model that somebody names; merging scorecards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from components.plan_evaluation.component import plan_evaluation as component
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import BundleError, CheckpointError, EvaluationError, RegistryError
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.evaluation.report.writing import read_report
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.harness.base import Reporter
from manyeyes.harness.inputs import parse_pinned
from manyeyes.registry.pull import ModelLocation, fetch_model, locate_model
from manyeyes.runtime.bundle_contents import DECODER
from manyeyes.steps import merge_scorecards as merging
from manyeyes.steps import plan_evaluation as planning
from manyeyes.steps import resolve_data as pinning
from manyeyes.steps.plan_evaluation import ask_benchmarks
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors
from tests.pinned_toys import opened
from tests.pipelines.checkout import push
from tests.registry_store import make_bundle
from tests.trial_toys import IMAGES, SECOND, add_second_benchmark


def digest_of(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["digest"])


def test_bundle_in_a_folder_is_found_and_fetched(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "one")
    found = locate_model(str(bundle))
    assert found == ModelLocation("bundle", str(bundle), digest_of(bundle))
    assert locate_model(f"file://{bundle}") == found
    fetch_model(found, tmp_path / "fetched")
    assert digest_of(tmp_path / "fetched") == digest_of(bundle)
    for file in bundle.rglob("*.*"):
        assert (tmp_path / "fetched" / file.relative_to(bundle)).read_bytes() == file.read_bytes()


def test_bundle_that_changed_after_it_was_found_is_refused(tmp_path: Path) -> None:
    found = locate_model(str(make_bundle(tmp_path / "bundle", "one")))
    make_bundle(tmp_path / "other", "two")
    shutil.copytree(tmp_path / "other", tmp_path / "bundle", dirs_exist_ok=True)
    with pytest.raises(BundleError, match="when this run began"):
        fetch_model(found, tmp_path / "fetched")


def test_bundle_with_a_missing_file_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "one")
    found = locate_model(str(bundle))
    (bundle / DECODER).unlink()
    with pytest.raises(CheckpointError, match=r"decoder_model_merged\.onnx"):
        fetch_model(found, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_manifest_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    manifest = {"digest": "d", "files": {"../secret": "s"}}
    (tmp_path / "model" / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    found = locate_model(str(tmp_path / "model"))
    assert found.kind == "torch"
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        fetch_model(found, tmp_path / "fetched")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", CheckpointError, "no model is named"),
        ("./nowhere", CheckpointError, "none of that name"),
        ("gs://bucket/model", CheckpointError, "s3://bucket/prefix"),
        ("no such/model/at all", RegistryError, "NAME@ALIAS"),
    ],
)
def test_model_that_is_nowhere_is_refused(
    text: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(error, match=message):
        locate_model(text)


def test_folder_without_a_manifest_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither manifest\.json nor checkpoint\.json"):
        locate_model(str(tmp_path))
    (tmp_path / "manifest.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BundleError, match="no manifest"):
        locate_model(str(tmp_path))


def test_a_plan_asks_other_benchmarks_and_hands_each_step_its_slice(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_second_benchmark(monkeypatch)
    location = ModelLocation("torch", "s3://models/x", "m" * 64)
    monkeypatch.setattr(planning, "locate_model", lambda _: location)
    monkeypatch.setattr(planning, "_champion", lambda *_: "")
    monkeypatch.setattr(pinning, "code_digest", lambda: "c" * 64)
    values = planning.plan_evaluation(
        Reporter("plan"),
        evaluate_model="x",
        evaluate_benchmarks=SECOND,
        recipe=make_recipe().canonical_json(),
        data_md5=push(snapshot.path, tmp_path / "remote"),
        data_remote=str(tmp_path / "remote"),
    ).values
    assert tuple(values) == component.python_func.__annotations__["return"]._fields
    assert parse_pinned(values["merge_scorecards"]).recipe.evaluation.benchmarks == (SECOND,)
    with pytest.raises(RuntimeError, match=r"score_benchmark reads evaluation\.benchmarks"):
        assert parse_pinned(values["score_benchmark"]).recipe.evaluation.benchmarks
    assert yaml.safe_load(values["fetch_model"]) == {"code_digest": "c" * 64, "recipe": {}, "step": "fetch_model"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def score(folder: Path, snapshot: Snapshot, benchmarks: list[str], *, model: str = "m" * 64) -> Path:
    evaluate(
        RuleAnswerer(rule_with_errors(IMAGES, range(3))),
        opened(ask_benchmarks(make_recipe(), benchmarks), "evaluate", snapshot).recipe,
        snapshot=snapshot,
        out_dir=folder,
        code_digest="c" * 64,
        model_digest=model,
    )
    return folder


def test_merged_scorecard_is_that_of_all_benchmarks_at_once(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_second_benchmark(monkeypatch)
    both = ["easy-vqa", SECOND]
    recipe = ask_benchmarks(make_recipe(), both)
    monkeypatch.setattr(merging, "parse_pinned", lambda _: opened(recipe, "merge_scorecards", snapshot))
    parts = [score(tmp_path / name, snapshot, [name]) for name in reversed(both)]
    whole = score(tmp_path / "whole", snapshot, both)
    result = merging.merge_scorecards(
        Reporter("merge"),
        scorecards=parts,
        pinned="",
        scorecard=tmp_path / "merged",
    )

    def without_times(folder: Path) -> dict[str, object]:
        card = read_scorecard(folder / "scorecard.json").model_dump()
        for figures in card["benchmarks"].values():
            # Together, the second benchmark asks what the first one asked.
            figures["seconds"] = figures["questions_per_s"] = figures["from_cache"] = 0
        return card

    assert without_times(tmp_path / "merged") == without_times(whole)
    assert read_outcomes(tmp_path / "merged" / "items.parquet") == read_outcomes(whole / "items.parquet")
    assert result.html == (tmp_path / "merged" / "report.html").read_text(encoding="utf-8")
    for text in ("easy-VQA test", "easy-VQA again", "Mean", "2 benchmarks"):
        assert text in result.html, text
    (run,) = read_report(tmp_path / "merged" / "report.json").reproduction.runs
    assert sorted(run.benchmarks) == sorted(both)


def test_scorecards_that_do_not_belong_together_are_refused(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_second_benchmark(monkeypatch)
    first = read_scorecard(score(tmp_path / "a", snapshot, ["easy-vqa"]) / "scorecard.json")
    second = read_scorecard(score(tmp_path / "b", snapshot, [SECOND], model="n" * 64) / "scorecard.json")
    with pytest.raises(EvaluationError, match="different models"):
        merging.merge([first, second], names=["easy-vqa", SECOND], recipe="r", recipe_digest="d")
    with pytest.raises(EvaluationError, match="one of each"):
        merging.merge([first, first], names=["easy-vqa", SECOND], recipe="r", recipe_digest="d")
