"""Versions that wait for approval, and what speaks against a champion that has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import RecipeError, RegistryError
from manyeyes.harness.base import Reporter
from manyeyes.recipe import load_recipe
from manyeyes.registry.approval import audit, check_approved
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import Approvals, approve, champion_evidence, promote, pull, read_aliases, reject
from manyeyes.steps.promote_version import promote_version
from tests.cli_calls import call
from tests.evaluation_fakes import make_snapshot
from tests.registry_moves import check_explained
from tests.registry_store import IMAGES, Candidate, make_candidate, put, store_uri

TWO_OTHERS = Approvals(count=2, four_eyes=True)


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, list[Candidate]]:
    snapshot = make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)
    folder = tmp_path_factory.mktemp("candidates")
    return snapshot, [make_candidate(folder / name, snapshot) for name in ("one", "two")]


def as_user(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LOGNAME", name)


def test_a_version_waits_until_two_others_approved_it(
    candidates: tuple[Snapshot, list[Candidate]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, (snapshot, (first, second)) = "two-others", candidates
    as_user(monkeypatch, "trainer")
    assert put(name, first, approvals=TWO_OTHERS).aliases == ("challenger",)
    assert put(name, first, approvals=TWO_OTHERS).aliases == ("challenger",)  # the pipeline again: nothing new
    with pytest.raises(RegistryError, match="trainer registered two-others/1"):
        approve(name, 1, reason="mine")
    as_user(monkeypatch, "ada")
    assert approve(f"{name}/1", reason="fine").aliases == ("challenger",)
    for again in (lambda: approve(name, 1, reason="fine"), lambda: promote(name, 1, force=True, reason="now")):
        with pytest.raises(RegistryError, match=r"ada approved two-others/1 already.*2 persons"):
            again()
    as_user(monkeypatch, "bob")
    with pytest.raises(RegistryError, match="reason is empty"):
        promote(name, 1)
    # Kubeflow's UI does the same.
    step = promote_version(Reporter("test"), model=name, version="challenger", reason="good on charts")
    assert step.values["moves"] == ["champion from none to version 1"]
    assert [(r.action, r.by.name) for r in check_explained(name).records] == [
        ("register", "trainer"),
        ("challenge", "trainer"),
        ("approve", "ada"),
        ("approve", "bob"),
    ]
    assert pull(name, out_dir=tmp_path / "approved", require_approved=True).is_dir()
    with pytest.raises(RegistryError, match="does not wait for approval"):
        approve(name, 1, reason="late")

    # The champion changes while version 2 waits: the gate compared it with another one.
    evidence = champion_evidence(name, work_dir=tmp_path)
    waiting = make_candidate(tmp_path / "waiting", snapshot, bundle=second.bundle, champion=evidence)
    as_user(monkeypatch, "trainer")
    assert put(name, waiting, approvals=Approvals()).aliases == ("challenger",)
    third = make_candidate(tmp_path / "three", snapshot, champion=evidence)
    assert put(name, third).aliases == ("challenger", "champion")
    as_user(monkeypatch, "ada")
    with pytest.raises(RegistryError, match=r"champion of .* is version 3 now; the gate compared version 2 with ver"):
        approve(name, 2, reason="fine")
    anew = champion_evidence(name, work_dir=tmp_path)
    judged = make_candidate(tmp_path / "anew", snapshot, bundle=second.bundle, champion=anew)
    assert put(name, judged, approvals=Approvals()).aliases == ("challenger",)
    assert approve(name, 2, reason="fine").aliases == ("challenger", "champion")
    assert read_aliases(name) == {"challenger": 2, "champion": 2, "previous": 3}
    check_explained(name)


def test_a_rejected_version_stays_rejected(
    candidates: tuple[Snapshot, list[Candidate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, candidate = "rejected", candidates[1][0]
    put(name, candidate, approvals=Approvals())
    with pytest.raises(RegistryError, match="reason is empty"):
        reject(name, 1, reason=" ")
    as_user(monkeypatch, "ada")
    assert reject(name, 1, reason="reads dates wrong").aliases == ()
    assert put(name, candidate, approvals=Approvals()).aliases == ()
    for again in (approve, promote):
        with pytest.raises(RegistryError, match=r"was rejected by ada on .*: reads dates wrong"):
            again(name, 1, reason="after all")
    with pytest.raises(RegistryError, match="does not wait for approval"):
        reject(name, 1, reason="again")


def test_a_champion_that_came_around_the_history_is_found_and_refused(
    candidates: tuple[Snapshot, list[Candidate]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    name = "audited"
    put(name, candidates[1][0], approvals=Approvals())
    assert call(monkeypatch, "registry", "audit", name) == 0
    connect().client.set_registered_model_alias(name, "champion", "1")
    assert call(monkeypatch, "registry", "audit", name) == 1
    said = capsys.readouterr().out
    assert "moved by other means than ManyEyes, after record 2" in said
    assert "champion from none to 1" in said
    assert "version 1, which needs approval and has none" in said
    with pytest.raises(RegistryError, match="audited/1 is not approved"):
        check_approved(connect(), name, 1)
    assert call(monkeypatch, "pull", name, str(tmp_path / "out"), "--require-approved") == 2
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, "approve", f"{name}/1", "--reason", "looked at afterwards") == 0
    check_approved(connect(), name, 1)
    (left,) = audit(connect(), name)
    assert "moved by other means, between" in left  # what happened stays in the history


def test_a_recipe_says_that_versions_wait() -> None:
    changes = {"registry.promotion": "approval", "registry.approvals": 2, "registry.four_eyes": True}
    assert load_recipe("tiny", overrides=changes).registry.approvals == 2
    plain = load_recipe("tiny")
    assert load_recipe("tiny", overrides={"registry.promotion": "automatic"}).digest == plain.digest
    for wrong in ({"registry.approvals": 2}, {"registry.promotion": "approval", "registry.approvals": 3}):
        with pytest.raises(RecipeError, match="registry"):
            load_recipe("tiny", overrides=wrong)
