"""A stage on two nodes of a TrainJob learns what two processes of one pod learn, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyeyes.errors import SnapshotError
from manyeyes.harness import cluster as cluster_module
from manyeyes.harness import trainjob as trainjob_module
from manyeyes.harness.base import Reporter
from manyeyes.harness.events import Event, watching
from manyeyes.harness.inputs import Pinned, parse_pinned
from manyeyes.harness.stage import train_stage
from manyeyes.harness.trainjob import PLAN
from manyeyes.kubeflow.profiles import Profile, trainjob_plan
from manyeyes.recipe import Recipe
from manyeyes.training.stage import read_stage_report
from tests.pipelines.checkout import push
from tests.training_toys import toy_recipe, toy_snapshot
from tests.trainjob_server import run_nodes, serving


def prepare(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is pinned for a prealign step whose data lies in a remote of ``folder``."""
    toy_snapshot(folder / "data")
    md5 = push(folder / "data", folder / "remote")
    (folder / "validation").mkdir()
    for module in (cluster_module, trainjob_module):
        monkeypatch.setattr(module, "_POLL_S", 0.1)
    monkeypatch.setenv("MANYEYES_THREADS", "2")
    monkeypatch.setenv("MANYEYES_CACHE", str(folder / "cache"))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    pinned = Pinned(recipe, data_md5=md5, data_remote=str(folder / "remote"), code_digest="c" * 64)
    return pinned.of("prealign_encoder", encoder="left").text()


def on_two_nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the step train on two nodes of one process each, and in a work folder of its own."""
    work = str(folder / "work-nodes")
    step = {"launcher": "trainjob", "nodes": 2}
    env = {"MANYEYES_WORKDIR": work, "MANYEYES_PROCESSES": "1", "MANYEYES_THREADS": "1"}
    volumes = [{"path": str(folder), "claim": "shared"}]
    profile = Profile.model_validate(
        {"description": "", "env": env, "volumes": volumes, "steps": {"prealign_encoder": step}}
    )
    monkeypatch.setenv("MANYEYES_WORKDIR", work)
    monkeypatch.setenv(PLAN, trainjob_plan(profile, "prealign_encoder", "image@sha256:0").text())


@pytest.mark.slow
def test_two_nodes_learn_what_two_processes_of_one_pod_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = prepare(tmp_path, toy_recipe(epochs=2), monkeypatch)

    def train(name: str) -> list[Event]:
        events: list[Event] = []
        with watching(events.append):
            train_stage(
                Reporter("prealign"),
                "prealign",
                pinned=pinned,
                validation=tmp_path / "validation",
                out=tmp_path / name,
                encoder="left",
            )
        return events

    monkeypatch.setenv("MANYEYES_WORKDIR", str(tmp_path / "work-pod"))
    monkeypatch.setenv("MANYEYES_PROCESSES", "2")
    train("pod")
    monkeypatch.delenv("MANYEYES_PROCESSES")
    on_two_nodes(tmp_path, monkeypatch)
    with serving(run_nodes, tmp_path) as stand:
        events = train("nodes")
    pod, nodes = (read_stage_report(tmp_path / name) for name in ("pod", "nodes"))
    assert nodes.checkpoint_digest == pod.checkpoint_digest
    assert [point.loss for point in nodes.history] == [point.loss for point in pod.history]
    assert len(stand.made) == 1
    assert [event.figure for event in events if event.figure.startswith("step ")], "it says how far it is"
    assert not list((tmp_path / "work-nodes" / "trainjobs").iterdir()), "nothing is left behind"


@pytest.mark.slow
def test_an_error_of_the_stage_on_nodes_is_the_error_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = prepare(tmp_path, toy_recipe(), monkeypatch)
    md5 = parse_pinned(pinned).data_md5
    pinned = pinned.replace(md5, "d" * 32)
    on_two_nodes(tmp_path, monkeypatch)
    with serving(run_nodes, tmp_path) as stand, pytest.raises(SnapshotError):
        train_stage(
            Reporter("prealign"),
            "prealign",
            pinned=pinned,
            validation=tmp_path / "validation",
            out=tmp_path / "out",
            encoder="left",
        )
    assert stand.deleted
    assert not (tmp_path / "out").exists()
