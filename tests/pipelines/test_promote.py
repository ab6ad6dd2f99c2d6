"""The compiled promote and rollback pipelines, against a registry with two versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from kfp import components

from manyeyes.kubeflow.pipeline import PIPELINES
from manyeyes.kubeflow.run import read_form
from manyeyes.registry.versions import read_aliases
from tests.evaluation_fakes import make_snapshot
from tests.pipelines.checkout import ROOT, make_checkout
from tests.registry_store import IMAGES, make_candidate, put, store_uri


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_is_loaded_with_its_own_form(name: str) -> None:
    """kfp takes a step of the pipeline's name for the whole: its inputs are then what the pipeline asks for."""
    path = ROOT / "pipelines" / "compiled" / f"{name}.yaml"
    loaded = components.load_component_from_file(str(path)).component_spec.inputs
    form = read_form(path)
    assert {key: spec.optional for key, spec in loaded.items()} == {
        key: definition.get("isOptional", False) for key, definition in form.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_champion_moves_there_and_back(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = store_uri(tmp_path_factory)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    name = "from-the-ui"
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    put(name, make_candidate(tmp_path / "good", snapshot))
    put(name, make_candidate(tmp_path / "bad", snapshot, floor=101))
    checkout = make_checkout(tmp_path / "checkout", MLFLOW_TRACKING_URI=uri)
    (checkout.path / "pipelines").mkdir()
    (checkout.path / "pipelines" / "compiled").symlink_to(ROOT / "pipelines" / "compiled")
    promotion = (
        "run",
        "promote",
        "--registry-model",
        name,
        "--param",
        "registry_version=2",
        "--param",
        "reason=a demo",
    )

    code, output = checkout.run(*promotion)
    assert code == 2, output
    assert "gate=failed" in output
    assert read_aliases(name) == {"challenger": 1, "champion": 1}

    code, output = checkout.run(*promotion, "--param", "force=true")
    assert code == 0, output + checkout.log()[-6000:]
    assert "champion from version 1 to version 2" in output
    assert read_aliases(name) == {"challenger": 1, "champion": 2, "previous": 1}
    report = checkout.summary().report
    assert report is not None
    assert "previous from none to version 1" in Path(report).read_text(encoding="utf-8")

    code, output = checkout.run("run", "rollback", "--registry-model", name, "--param", "reason=it is over")
    assert code == 0, output + checkout.log()[-6000:]
    assert read_aliases(name) == {"challenger": 1, "champion": 1, "previous": 2}
    # A step that came from a cache would have moved nothing.
    code, output = checkout.run("run", "rollback", "--registry-model", name, "--param", "reason=it is over")
    assert code == 0, output
    assert read_aliases(name) == {"challenger": 1, "champion": 2, "previous": 1}
