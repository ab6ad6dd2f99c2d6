"""The steps of the pipeline validate, each as in a pod of its own: what they write is what validate_data writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from manyeyes.data import profile
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.contamination import fingerprints
from manyeyes.data.curation import parts
from manyeyes.data.records import Turn
from manyeyes.data.shards import write_shards
from manyeyes.errors import SnapshotError, ValidationError
from manyeyes.recipe import Recipe, write_recipe_text
from manyeyes.steps.judge_snapshot import judge_snapshot
from manyeyes.steps.plan_validation import plan_validation
from manyeyes.steps.profile_shards import profile_shards
from manyeyes.steps.validate_data import validate_data
from tests.training_toys import toy_recipe, toy_record, write_language_model
from tests.unit.data_samples import lay_out_remote, write_remote
from tests.unit.test_curate_steps import Pods, refuse

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three shards to train on, one to be judged on; a sample without answer, one too long, one with a shared image."""
    base = tmp_path_factory.mktemp("validate")
    records = [toy_record(number) for number in range(60)]
    records[7] = dataclasses.replace(records[7], turns=records[7].turns[:1])
    records[30] = dataclasses.replace(records[30], turns=(records[30].turns[0], Turn("gpt", "red " * 500)))
    test = [dataclasses.replace(toy_record(number), id=f"test/{number}") for number in (5, *range(900, 910))]
    write_shards(records, base / "in" / "toy", "train", rows_per_shard=20)
    write_shards(test, base / "in" / "toy", "test", rows_per_shard=20)
    write_language_model(base / "in" / "pretrained" / "lm")
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(base / "in", provenance={"toy-train": made, "toy-test": made, "lm": made})
    md5, objects = lay_out_remote(base / "in")
    write_remote(base / "remote", objects)
    return {"data_md5": md5, "data_remote": str(base / "remote")}


def recipe(**data: object) -> str:
    values = toy_recipe().model_dump(mode="json")
    values["data"] |= {"eval_datasets": ["toy-test"], **data}
    return write_recipe_text(Recipe.model_validate(values))


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pods:
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    monkeypatch.setattr(parts, "MAX_PARTS", 3)
    return Pods(tmp_path, monkeypatch)


def test_parts_that_are_joined_are_the_whole(
    given: dict[str, str], pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "suite.json"
    suite.write_text(
        '{"name": "mine", "expectations": [{"type": "expect_column_values_to_be_in_set", "severity": "warning", '
        '"kwargs": {"column": "in_eval_set", "value_set": [false]}, '
        '"meta": {"name": "apart", "explanation": "No image is shared."}}]}',
        encoding="utf-8",
    )
    text = recipe(suite=str(suite))
    values = pods(plan_validation, recipe="", recipe_text=text, **given).values
    assert len(values["parts"]) == 3
    facts = []
    for number, part in enumerate(values["parts"]):
        facts.append(tmp_path / "facts" / str(number))
        pods(profile_shards, part=part, pinned=values["validate_data"], facts=facts[-1])
    with monkeypatch.context() as patch:
        patch.setattr(profile, "_read_groups", refuse)
        judged = pods(judge_snapshot, facts=facts, pinned=values["validate_data"], validation=tmp_path / "parts")
    whole = pods(validate_data, pinned=values["validate_data"], validation=tmp_path / "whole")
    assert judged == whole
    assert judged.metrics["quarantined"] == 2
    assert judged.metrics["contaminated_images"] >= 1
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert {"profile.parquet", "quarantine.jsonl", "validation.html", "pairs.jsonl", "contamination.json"} <= {*names}
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_a_stopped_step_found_is_not_found_again(
    given: dict[str, str], tmp_path: Path, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pods(plan_validation, recipe="", recipe_text=recipe(), **given).values
    first = tmp_path / "first"
    pods(profile_shards, part=values["parts"][0], pinned=values["validate_data"], facts=first)
    pods.stay()
    monkeypatch.setattr(profile, "_read_groups", refuse)
    monkeypatch.setattr(fingerprints, "_look_at", refuse)
    pods(profile_shards, part=values["parts"][0], pinned=values["validate_data"], facts=tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").rglob("*.*")) == sorted(
        path.name for path in first.rglob("*.*")
    )


def test_what_fails_says_so_as_in_train(given: dict[str, str], pods: Pods, tmp_path: Path) -> None:
    values = pods(plan_validation, recipe="", recipe_text=recipe(), **given).values
    with pytest.raises(ValidationError, match="every critical expectation"):
        pods(judge_snapshot, facts=[], pinned=values["validate_data"], validation=tmp_path / "out")
    with pytest.raises(SnapshotError, match="toy-tset"):
        pods(plan_validation, recipe="", recipe_text=recipe(eval_datasets=["toy-tset"]), **given)
