"""A checkpoint and a recipe given together are of one model, or the fields that differ are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manyeyes.data.snapshot import open_folder
from manyeyes.errors import CheckpointError, RegistryError
from manyeyes.harness.base import Reporter
from manyeyes.harness.inputs import Pinned, parse_pinned
from manyeyes.model import match_checkpoint
from manyeyes.recipe import change_recipe
from manyeyes.steps import export_onnx as export_step
from manyeyes.steps import register as register_step
from tests.model_toys import toy_config, write_language_model
from tests.pinned_toys import opened, pin
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot

OTHERS: dict[str, dict[str, Any]] = {
    "model.projector.depth": {"model.projector": {"depth": 3}},
    "model.projector.kind": {"model.projector": {"kind": "linear"}},
    "model.fusion.grid": {"model.fusion.grid": 1},
    "model.fusion.strategy": {"model.fusion.strategy": "sequence-append"},
    "model.encoders": {"model.encoders.0.name": "middle"},
    "model.encoders.0.encoder": {"model.encoders.0": {"name": "left", "encoder": "clip-l14-224", "small": True}},
    "model.encoders.1.image_size": {"model.encoders.1.image_size": 64},
    "model.encoders.1.small": {"model.encoders.1.small": True},
    "model.encoders.0.fit": {"model.encoders.0.fit": "crop"},
    "model.encoders.0.fill": {"model.encoders.0.fill": [1, 2, 3]},
    "model.shared": {"model.preprocess": "shared"},
    "model.layout": {"model.layout": {"newline": True}},
    "model.chat.template": {"model.chat.template": "plain", "model.chat.system": None},
    "model.chat.system": {"model.chat.system": "Be brief."},
    "model.language_model.max_length": {"model.language_model.max_length": 100},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot in ``data`` and a checkpoint in ``pretrain``."""
    folder = tmp_path_factory.mktemp("matching")
    toy_snapshot(folder / "data")
    stage(folder, "pretrain", folder / "pretrain", encoder_checkpoints={})
    return folder


def stage(folder: Path, name: Any, out: Path, changes: dict[str, Any] | None = None, **more: Any) -> None:
    recipe = change_recipe(toy_recipe(max_steps=1), changes or {})
    run_toy_stage(
        name, recipe=recipe, snapshot=folder / "data", inputs=folder, out=out, work_dir=out.with_name("work"), **more
    )


@pytest.mark.parametrize("field", OTHERS)
def test_a_stage_refuses_a_checkpoint_of_another_model_and_names_the_field(
    field: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        stage(trained, "sft", tmp_path / "sft", OTHERS[field])
    assert f"{field} is " in str(caught.value)
    assert " in the recipe and " in str(caught.value)
    assert not (tmp_path / "sft").exists()


def test_all_fields_are_named_at_once(trained: Path, tmp_path: Path) -> None:
    changes = {**OTHERS["model.projector.depth"], **OTHERS["model.encoders.1.image_size"]}
    with pytest.raises(CheckpointError) as caught:
        stage(trained, "sft", tmp_path / "sft", {**changes, **OTHERS["model.chat.system"]})
    text = str(caught.value)
    assert "model.projector.depth is 3 in the recipe and 2 in the checkpoint" in text
    assert "model.encoders.1.image_size is 64 in the recipe and 32 in the checkpoint" in text
    assert 'model.chat.system is "Be brief." in the recipe and "" in the checkpoint' in text
    assert "model.encoders.1.size" not in text


def test_another_language_model_is_named(trained: Path, tmp_path: Path) -> None:
    other = write_language_model(tmp_path / "lm", toy_config(300, num_hidden_layers=3))
    with pytest.raises(
        CheckpointError, match=r"source \(num_hidden_layers\) is 3 in the recipe and 2 in the checkpoin"
    ):
        stage(trained, "sft", tmp_path / "sft", {"model.language_model.source": f"dir:{other}"})


def test_a_stage_may_still_change_the_model_of_the_stage_before(trained: Path, tmp_path: Path) -> None:
    stage(trained, "sft", tmp_path / "a" / "sft", {"stages.sft.model": {"language_model.max_length": 100}})
    stage(trained, "sft", tmp_path / "b" / "sft", {"stages.pretrain": None})
    # The recipe's model is another, and the stage before says which one it trained.
    changes: dict[str, Any] = {
        "model.language_model.max_length": 100,
        "stages.pretrain.model": {"language_model.max_length": 128},
    }
    stage(trained, "sft", tmp_path / "c" / "sft", changes)
    changes["stages.pretrain.model"] = {"language_model.max_length": 90}
    with pytest.raises(CheckpointError, match=r"max_length is 90 in the recipe and 128 in the checkpoint"):
        stage(trained, "sft", tmp_path / "d" / "sft", changes)


def test_what_a_language_model_was_made_from_need_not_be_there(trained: Path) -> None:
    recipe = change_recipe(toy_recipe(), {"model.language_model.source": "dir:gone"})
    assert match_checkpoint(trained / "pretrain", [recipe.model], snapshot_path=None) == recipe.model


def test_a_bundle_is_not_made_with_the_lineage_of_another_recipe(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = change_recipe(toy_recipe(), OTHERS["model.projector.depth"])
    inputs = opened(recipe, "export_onnx", open_folder(trained / "data"))
    monkeypatch.setattr(export_step, "parse_pinned", lambda _: inputs)
    with pytest.raises(CheckpointError, match=r"model\.projector\.depth is 3 in the recipe"):
        export_step.export_onnx(
            Reporter("e"),
            checkpoint=trained / "pretrain",
            bundle=tmp_path / "bundle",
            parity=tmp_path / "parity",
            pinned="",
        )


def test_a_version_is_not_registered_with_another_recipe_than_its_bundles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = dict.fromkeys(("validation", "scorecard", "bundle_scorecard", "parity", "bundle", "gate"), tmp_path)

    def going_on(*_: object, **__: object) -> None:
        raise FileExistsError

    monkeypatch.setattr("manyeyes.registry.versions.register", going_on)
    made_of = SimpleNamespace(model_dump_json=lambda **_: "{}")
    monkeypatch.setattr("manyeyes.registry.lineage.describe_lineage", lambda *_: made_of)
    monkeypatch.setattr(Pinned, "snapshot", None)
    (tmp_path / "items.parquet").touch()
    recipe = toy_recipe()
    # Of the part of the recipe that the export was given; of the whole recipe, as bundles had it before.
    for digest in (parse_pinned(pin(recipe, "export_onnx")).recipe.digest, recipe.digest):
        monkeypatch.setattr(register_step, "read_manifest", lambda _, digest=digest: {"recipe_digest": digest})
        with pytest.raises(FileExistsError):
            register_step.register(Reporter("r"), registry_model="toy", pinned=pin(recipe, "register"), **folders)
    other = change_recipe(recipe, {"stages.sft.epochs": 9})
    digest = parse_pinned(pin(other, "export_onnx")).recipe.digest
    monkeypatch.setattr(register_step, "read_manifest", lambda _: {"recipe_digest": digest})
    with pytest.raises(RegistryError, match=f"was made with the recipe {digest[:12]}"):
        register_step.register(Reporter("r"), registry_model="toy", pinned=pin(toy_recipe(), "register"), **folders)
