"""Two processes learn what one learns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyeyes.training.stage import read_stage_report
from tests.training_ranks import run_two
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot


def run_as(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    """What torchrun tells each process."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_toy_stage("prealign", **kwargs)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    shared = {
        "recipe": toy_recipe(epochs=2, schedule={"kind": "constant", "warmup_ratio": 0}),
        "snapshot": tmp_path / "data",
        "inputs": tmp_path,
    }
    run_toy_stage("prealign", out=tmp_path / "one", work_dir=tmp_path / "work-one", **shared)
    run_two(run_as, {**shared, "out": tmp_path / "two", "work_dir": tmp_path / "work-two"})
    one, two = read_stage_report(tmp_path / "one"), read_stage_report(tmp_path / "two")
    assert [point.loss for point in two.history] == pytest.approx([point.loss for point in one.history], rel=1e-4)
    alone, together = (load_file(tmp_path / name / "encoder.safetensors") for name in ("one", "two"))
    # Adam turns rounding differences of tiny gradients into steps of the learning rate's size; most stay tiny.
    differences = torch.cat([(alone[name] - together[name]).abs().flatten() for name in alone])
    assert differences.mean() < 1e-6
