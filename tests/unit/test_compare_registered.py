"""``manyeyes compare`` with registered models: what is kept with a version is enough."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.errors import RegistryError
from manyeyes.evaluation.compare import ModelComparison
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.steps.evaluate import find_champion
from tests.evaluation_fakes import make_snapshot
from tests.registry_store import IMAGES, make_candidate, put, store_uri


def test_two_registered_versions_are_compared_by_name(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    put("compared", make_candidate(tmp_path / "first", snapshot, wrong=range(6)))
    put("compared-with", make_candidate(tmp_path / "second", snapshot))
    arguments = ["--out", str(tmp_path / "out"), "--data", str(snapshot.path)]
    result = CliRunner().invoke(cli, ["compare", "compared/1", "compared-with", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = ModelComparison.model_validate_json((tmp_path / "out" / "compare.json").read_bytes())
    assert (written.first.name, written.second.name) == ("compared/1", "compared-with/1")
    assert written.first.kind == "bundle"
    assert written.benchmarks["easy-vqa"].only_second == 24
    with pytest.raises(RegistryError, match="compared"):
        CliRunner().invoke(cli, ["compare", "compared/9", "compared", *arguments], catch_exceptions=False)


def test_a_report_finds_the_champion_and_its_scorecard(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    candidate = make_candidate(tmp_path / "first", snapshot, wrong=range(6))
    put("reported", candidate)
    found = find_champion("reported")
    assert found.name == "reported version 1"
    assert found.scorecard == read_scorecard(candidate.bundle_scorecard)
    assert find_champion("reported-by-nobody").reason == "reported-by-nobody has no champion yet."
