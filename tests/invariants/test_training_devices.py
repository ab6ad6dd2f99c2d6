"""Training on GPUs, without one: no tensor on the CPU meets one on the device, and none is reduced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed, nn

from manyeyes.recipe import Recipe, change_recipe
from manyeyes.training import loop, stage
from manyeyes.training.processes import Processes, training_processes
from manyeyes.training.stage import StageReport, read_stage_report
from tests.pretended_cuda import CUDA, DevicesMeetError, pretended_cuda
from tests.training_ranks import run_two
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe, toy_snapshot

PARTS = [{"dataset": "toy-train", "turns": turns, "image_dropout": 0.2} for turns in ("independent", "chained")]
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0}


@contextmanager
def one_gpu() -> Iterator[None]:
    @contextmanager
    def alone() -> Iterator[Processes]:
        yield Processes(rank=0, size=1, device=CUDA)

    with pretended_cuda(), patch.object(stage, "training_processes", alone):
        yield


@contextmanager
def gpus() -> Iterator[None]:
    """What ``torchrun`` starts on a machine with GPUs; their collectives run over gloo."""
    join = distributed.init_process_group

    def init(backend: str, **more: Any) -> None:
        assert backend == "nccl"
        join("gloo", **{name: value for name, value in more.items() if name != "device_id"})

    @contextmanager
    def joined() -> Iterator[Processes]:
        with ExitStack() as stack:
            with (
                patch.object(torch.cuda, "is_available", lambda: True),
                patch.object(torch.cuda, "set_device"),
                patch.object(distributed, "init_process_group", init),
            ):
                place = stack.enter_context(training_processes())
            yield place

    with pretended_cuda(), patch.object(stage, "training_processes", joined):
        yield


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    here = torch.ones(3)
    with pretended_cuda() as cuda:
        there = torch.arange(3.0, device=cuda)
        assert there.device == cuda
        assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        assert (there.cpu() + here).tolist() == [1, 2, 3]
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: here.add_(there),
            lambda: torch.where(there > 0, there, here),
            lambda: nn.functional.linear(there, torch.ones(2, 3)),
            lambda: nn.functional.embedding(torch.tensor([0]), there[:, None]),
            lambda: here[torch.tensor([0], device=cuda)],
        ):
            with pytest.raises(DevicesMeetError):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()


def test_every_stage_trains_on_a_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    plain = toy_recipe(mixture=PARTS)
    data = plain.model_dump(mode="json")
    data["stages"]["sft"]["lora"] = LORA
    adapted = Recipe.model_validate(data)

    def run(name: str) -> list[StageReport]:
        places = {"snapshot": tmp_path / "data", "inputs": tmp_path / name, "work_dir": tmp_path / name / "work"}
        return [
            run_toy_stage(step, recipe=recipe, out=tmp_path / name / out, **places)
            for step, recipe, out in (
                ("prealign", plain, "left"),
                ("pretrain", plain, "pretrain"),
                ("sft", plain, "sft"),
                ("sft", adapted, "adapted"),
            )
        ]

    on_cpu = run("cpu")
    with one_gpu():
        on_gpu = run("gpu")
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        assert [point.loss for point in found.history] == pytest.approx([p.loss for p in expected.history], rel=1e-3)


def test_layers_are_compiled_on_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_snapshot(tmp_path / "data")
    compiled: list[object] = []
    monkeypatch.setattr(stage, "compile_layers", compiled.append)

    def run(name: str) -> int:
        recipe = toy_recipe(torch_compile=True, max_steps=1)
        places = {"snapshot": tmp_path / "data", "inputs": tmp_path, "work_dir": tmp_path / f"work-{name}"}
        run_toy_stage("pretrain", recipe=recipe, out=tmp_path / name, encoder_checkpoints={}, **places)
        return len(compiled)

    assert run("cpu") == 0
    with one_gpu():
        assert run("gpu") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: no stage is trained on one")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_compile": True},
        {"packing": {"tokens": 256}},
        {"precision": "bf16", "checkpoint_language_model": True},
        {"lora": LORA},
        {"lora": {**LORA, "quantize": "nf4"}},
    ],
    ids=["plain", "compiled", "packed", "bf16", "adapters", "4 bits"],
)
def test_a_stage_on_a_real_gpu_learns_what_the_cpu_learns(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_snapshot(tmp_path / "data")
    recipe = change_recipe(toy_recipe(), {f"stages.sft.{field}": value for field, value in changes.items()})

    def run(name: str) -> list[float]:
        places = {"snapshot": tmp_path / "data", "inputs": tmp_path, "work_dir": tmp_path / f"work-{name}"}
        report = run_toy_stage("sft", recipe=recipe, out=tmp_path / name, checkpoint=None, **places)
        return [point.loss for point in report.history]

    on_gpu = run("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu == pytest.approx(run("cpu"), rel=2e-2)


def test_a_killed_stage_goes_on_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_snapshot(tmp_path / "data")
    monkeypatch.setattr(loop, "PROGRESS_EVERY_S", 0)

    def kill(progress: loop.Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    def run(name: str, **more: Any) -> StageReport:
        recipe = toy_recipe(epochs=2, checkpoint_every_s=1e-6)
        places = {"snapshot": tmp_path / "data", "inputs": tmp_path, "work_dir": tmp_path / f"work-{name}"}
        with one_gpu(), every_step_saved():
            return run_toy_stage("prealign", recipe=recipe, out=tmp_path / name, **places, **more)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", on_progress=kill)
    resumed = run("killed")
    assert resumed.resumed_from_step == 2
    assert resumed.checkpoint_digest == whole.checkpoint_digest


def run_on_gpus(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT=str(port))
    with gpus():
        run_toy_stage("prealign", **kwargs)


@pytest.mark.slow
def test_two_gpus_learn_what_one_process_learns(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    recipe = toy_recipe(epochs=2, schedule={"kind": "constant", "warmup_ratio": 0})
    shared = {"recipe": recipe, "snapshot": tmp_path / "data", "inputs": tmp_path}
    run_toy_stage("prealign", out=tmp_path / "one", work_dir=tmp_path / "work-one", **shared)
    run_two(run_on_gpus, {**shared, "out": tmp_path / "two", "work_dir": tmp_path / "work-two"})
    one, two = read_stage_report(tmp_path / "one"), read_stage_report(tmp_path / "two")
    assert [point.loss for point in two.history] == pytest.approx([point.loss for point in one.history], rel=1e-4)
