from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from manyeyes.cli.pipeline import PIPELINES, compile_pipeline
from manyeyes.recipe import list_recipes
from tests.pipelines.checkout import ROOT


@pytest.mark.parametrize("name", PIPELINES)
def test_committed_pipeline_is_current(name: str, tmp_path: Path) -> None:
    fresh = compile_pipeline(name, tmp_path / f"{name}.yaml", root=ROOT)
    committed = ROOT / "pipelines" / "compiled" / f"{name}.yaml"
    assert committed.read_text() == fresh.read_text(), "run: manyeyes pipeline compile"


def test_form_of_train_is_short_and_offers_the_recipes() -> None:
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text())
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 12
    assert parameters["recipe"]["literals"] == list_recipes()
    assert all(parameter["description"] for parameter in parameters.values())


def test_only_what_depends_on_the_world_outside_is_never_cached() -> None:
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text())
    groups = [spec["root"]["dag"], *(part["dag"] for part in spec["components"].values() if "dag" in part)]
    tasks = {name: task for group in groups for name, task in group["tasks"].items()}
    leaves = {name for name, task in tasks.items() if "dag" not in spec["components"][task["componentRef"]["name"]]}
    uncached = {name for name in leaves if not tasks[name]["cachingOptions"].get("enableCache")}
    assert uncached == {"resolve-data", "gate", "register"}


def test_later_steps_take_what_their_cache_key_needs_and_nothing_that_changes_between_runs() -> None:
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text())
    for name, component in spec["components"].items():
        if "executorLabel" not in component or name == "comp-resolve-data":
            continue
        parameters = set(component["inputDefinitions"]["parameters"])
        assert {"recipe_json", "recipe_digest", "data_md5", "data_remote", "code_digest"} <= parameters, name
        assert parameters <= {
            *("recipe_json", "recipe_digest", "data_md5", "data_remote", "code_digest"),
            *("encoder", "kind", "registry_model"),
        }, name


def test_components_name_the_image_of_this_version() -> None:
    from manyeyes import __version__

    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text())
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    assert images == {f"manyeyes-steps:{__version__}"}
