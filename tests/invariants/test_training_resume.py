"""A stage that is killed and started again ends with the very weights of one that never was."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from manyeyes.errors import LockedError
from manyeyes.recipe import StageName
from manyeyes.training.stage import read_stage_report
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot

# Many short steps: there is time to kill between them.
STEPS = 72
CHANGES: dict[str, Any] = {"epochs": 24}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshot and every stage's result of a run that was never killed."""
    folder = tmp_path_factory.mktemp("unbroken")
    toy_snapshot(folder / "data")
    for stage, name in (("prealign", "left"), ("pretrain", "pretrain"), ("sft", "sft")):
        run_toy_stage(
            stage,  # type: ignore[arg-type]
            recipe=toy_recipe(**CHANGES),
            snapshot=folder / "data",
            inputs=folder,
            out=folder / name,
            work_dir=folder / "work",
        )
    return folder


def start(stage: StageName, folder: Path, work_dir: Path, out: Path) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_toys"])
    process = context.Process(
        target=run_toy_stage,
        args=(stage,),
        kwargs={
            "recipe": toy_recipe(**CHANGES),
            "snapshot": folder / "data",
            "inputs": folder,
            "out": out,
            "work_dir": work_dir,
        },
    )
    process.start()
    return process


def wait_for_step(work_dir: Path, process: ForkServerProcess, *, after: int) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = [int(path.name.removeprefix("step-")) for path in work_dir.glob("*/step-*")]
        if max(steps, default=0) > after:
            return max(steps)
        assert process.is_alive(), "the stage ended before it could be killed"
        time.sleep(0.002)
    raise AssertionError("no running checkpoint appeared")


@pytest.mark.parametrize(("stage", "result"), [("prealign", "left"), ("pretrain", "pretrain"), ("sft", "sft")])
def test_killed_twice_equals_never_killed(stage: StageName, result: str, unbroken: Path, tmp_path: Path) -> None:
    step = 0
    for _ in range(2):
        process = start(stage, unbroken, tmp_path / "work", tmp_path / "out")
        step = wait_for_step(tmp_path / "work", process, after=step + 2)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not (tmp_path / "out").exists(), "a killed stage must leave no result"
    process = start(stage, unbroken, tmp_path / "work", tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    found, expected = read_stage_report(tmp_path / "out"), read_stage_report(unbroken / result)
    assert found.resumed_from_step is not None
    assert step <= found.resumed_from_step < STEPS
    assert found.checkpoint_digest == expected.checkpoint_digest
    assert [point.loss for point in found.history] == [point.loss for point in expected.history]


def test_two_processes_cannot_train_one_stage(unbroken: Path, tmp_path: Path) -> None:
    process = start("sft", unbroken, tmp_path / "work", tmp_path / "out")
    wait_for_step(tmp_path / "work", process, after=0)
    with pytest.raises(LockedError, match=f"process {process.pid} trains this stage"):
        run_toy_stage(
            "sft",
            recipe=toy_recipe(**CHANGES),
            snapshot=unbroken / "data",
            inputs=unbroken,
            out=tmp_path / "other",
            work_dir=tmp_path / "work",
        )
    process.kill()
    process.join()
    assert not (tmp_path / "other").exists()
