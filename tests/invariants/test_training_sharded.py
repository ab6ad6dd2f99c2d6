"""Processes that hold parts of a model, or the whole each, learn what one process learns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from manyeyes.recipe import Recipe, StageName
from manyeyes.training.loop import train
from manyeyes.training.stage import StageReport, read_stage_report
from tests.invariants.test_layouts_training import recipe_of
from tests.training_ranks import free_port, run_ranks
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot

# Records without their image, questions that share a prefix, conversations: processes differ in what they compute.
MIXTURE = [
    {"dataset": "toy-train", "turns": "independent", "image_dropout": 0.4},
    {"dataset": "toy-train", "turns": "chained", "max_samples": 3},
]


@dataclass(frozen=True)
class Case:
    """A stage, and what its recipe says besides."""

    stage: StageName
    changes: Mapping[str, Any]
    model: str | None = None

    def recipe(self, sharding: str) -> Recipe:
        changes = {"checkpoint_every_s": 1e6, "max_steps": 2, **self.changes, "sharding": sharding}
        recipe = toy_recipe(mixture=MIXTURE) if self.model is None else recipe_of(self.model)
        values = recipe.model_dump(mode="json")
        values["stages"][self.stage] |= changes
        return Recipe.model_validate(values)


CASES = {
    "sft": Case("sft", {}),
    "pretrain": Case("pretrain", {"micro_batch_size": 1}),
    "prealign": Case("prealign", {}),
    "packed": Case("sft", {"packing": {"tokens": 96}}),
    "adapters": Case("sft", {"lora": {"rank": 2, "alpha": 4}, "checkpoint_language_model": True}),
    "looks again": Case("sft", {"batch_size": 4}, model="cambrian"),
}
WHOLE = ("sft", "adapters")


def train_case(folder: Path, name: str, sharding: str, processes: int) -> StageReport:
    case = CASES[name]
    given: dict[str, Any] = {"encoder_checkpoints": {}} if case.stage == "pretrain" else {}
    if case.stage == "sft":
        given = {"checkpoint": None}
    return run_toy_stage(
        case.stage,
        recipe=case.recipe(sharding),
        snapshot=folder / "data",
        inputs=folder,
        out=folder / f"{name}-{sharding}-{processes}",
        work_dir=folder / f"work-{name}-{sharding}-{processes}",
        **given,
    )


def train_as(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    """Train every case as one of several processes; writes what its parameters were."""
    size = kwargs["processes"]
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    kinds: list[str] = []

    def watched(*args: Any, parameters: Mapping[str, torch.nn.Parameter], **more: Any) -> Any:
        kinds.append(" and ".join(sorted({type(parameter).__name__ for parameter in parameters.values()})))
        parts = [each for each in parameters.values() if isinstance(each, DTensor)]
        assert all(each.to_local().shape[0] <= -(-each.shape[0] // size) for each in parts)
        return train(*args, parameters=parameters, **more)

    with patch("manyeyes.training.stage.train", watched):
        for (name, sharding), meeting in kwargs["runs"]:
            os.environ["MASTER_PORT"] = str(meeting)
            train_case(kwargs["folder"], name, sharding, size)
    (kwargs["folder"] / f"kinds-{size}-{rank}.json").write_text(json.dumps(kinds), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process, and by two and four that hold parts, some by ones that hold the whole."""
    folder = tmp_path_factory.mktemp("sharded")
    toy_snapshot(folder / "data")
    for name in CASES:
        train_case(folder, name, "full", 1)
    for size in (2, 4):
        runs = [(name, "full") for name in CASES] + [(name, "none") for name in WHOLE]
        met = [(run, free_port()) for run in runs]
        run_ranks(size, train_as, {"folder": folder, "processes": size, "runs": met})
        for rank in range(size):
            kinds = json.loads((folder / f"kinds-{size}-{rank}.json").read_text(encoding="utf-8"))
            assert kinds == ["DTensor"] * len(CASES) + ["Parameter"] * len(WHOLE)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("run", [(name, "full") for name in CASES] + [(name, "none") for name in WHOLE], ids="-".join)
def test_several_processes_have_the_losses_of_one(run: tuple[str, str], processes: int, trained: Path) -> None:
    name, sharding = run
    one, several = (
        read_stage_report(trained / folder).history for folder in (f"{name}-full-1", f"{name}-{sharding}-{processes}")
    )
    assert len(one) == 2
    assert [point.loss for point in several] == pytest.approx([point.loss for point in one], rel=1e-5)
    assert several[0].grad_norm == pytest.approx(one[0].grad_norm, rel=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_a_result_written_from_parts_is_whole(name: str, processes: int, trained: Path) -> None:
    file = "encoder.safetensors" if CASES[name].stage == "prealign" else "model.safetensors"
    one, parts = (load_file(trained / f"{name}-full-{size}" / file) for size in (1, processes))
    assert list(one) == list(parts)
    assert all(one[key].shape == parts[key].shape and one[key].dtype == parts[key].dtype for key in one)
    # Adam turns rounding differences of tiny gradients into steps of the learning rate's size; most stay tiny.
    assert torch.cat([(one[key] - parts[key]).abs().flatten() for key in one]).mean() < 1e-6
