"""Running checkpoints: whole or not there, of this training or refused, whatever the disk, a signal or a rank does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from manyeyes.errors import CheckpointError, ProcessLostError, StorageError
from manyeyes.training import running
from manyeyes.training.loop import Progress
from manyeyes.training.processes import Processes, training_processes
from manyeyes.training.running import RunningCheckpoints, RunningState, TokenCounts
from manyeyes.training.stage import StageReport, read_stage_report
from tests.invariants.test_training_errors import MARK, trained_in
from tests.training_ranks import launch_toy, run_two
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe, toy_snapshot

ALONE = Processes(rank=0, size=1, device=torch.device("cpu"))
FACTS = {"stage": "sft", "spec": {"batch_size": 4, "train": {"projector": 0.1}}, "quarantine": ["a#1"], "encoder": None}
# More than a second's: the first word of training comes after one.
EPOCHS = 40
# Of three files a process.
FILE_BYTES = 2000


class KilledError(Exception):
    """What a test ends a stage with."""


def state(step: int) -> RunningState:
    return RunningState(
        step=step,
        seconds=1.0,
        data_wait_s=0.1,
        checkpoint_stall_s=0.0,
        tokens=TokenCounts(real=5),
        first_loss=2.0,
        losses=(0.25, 0.5),
        history=(),
        notes=(),
    )


def make(folder: Path, *, seed: int, facts: dict[str, Any] = FACTS, every_s: float = 1e-9) -> tuple[Any, ...]:
    """Checkpoints, parameters and optimizer of a tiny training after one step."""
    torch.manual_seed(seed)
    parameters = {
        "matrix": nn.Parameter(torch.randn(7, 30)),
        "half": nn.Parameter(torch.randn(5, 9).bfloat16()),
        "scale": nn.Parameter(torch.randn(())),
    }
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    folder.mkdir(exist_ok=True)
    checkpoints = RunningCheckpoints(
        folder, facts=facts, parameters=parameters, optimizer=optimizer, processes=ALONE, every_s=every_s
    )
    return checkpoints, parameters, optimizer


def everything(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    own = [parameter.detach() for parameter in parameters.values()]
    return [
        *own,
        *(optimizer.state[each][moment] for each in parameters.values() for moment in ("exp_avg", "exp_avg_sq")),
    ]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the checkpoints of steps 2 and 3, in several files each."""
    monkeypatch.setattr(running, "_FILE_BYTES", FILE_BYTES)
    checkpoints, *_ = make(tmp_path / "work", seed=1)
    for step in (1, 2, 3):
        checkpoints.save_now(state(step))
    checkpoints.close()
    return tmp_path / "work"


def test_what_is_loaded_is_what_was_saved_and_two_are_kept(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000002", "step-00000003"]
    assert len(list((saved / "step-00000003").glob("*.safetensors"))) > 1
    _, *before = make(saved, seed=1)
    checkpoints, *after = make(saved, seed=2)
    assert not all(map(torch.equal, everything(*before), everything(*after)))
    assert checkpoints.load() == state(3)
    assert all(map(torch.equal, everything(*before), everything(*after)))
    assert all(after[1].state[parameter]["step"].item() == 3 for parameter in after[0].values())
    assert checkpoints.notes == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["rank-00000-00.safetensors", "rank-00000-01.safetensors", "rank-00000.json", "manifest.json"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_that_is_said(
    damage: Callable[[Path], None], name: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved / "step-00000003" / name)
    checkpoints, *_ = make(saved, seed=2)
    found = checkpoints.load()
    assert found == state(2)
    (note,) = checkpoints.notes
    assert "step-00000003 is damaged" in note
    assert name in note or name == "manifest.json" or "list" in note
    assert "goes on from step 2, the one before" in note
    assert note in capsys.readouterr().err
    assert [path.name for path in saved.glob("step-*")] == ["step-00000002"]


def test_when_all_are_damaged_training_begins_anew_and_says_so(saved: Path) -> None:
    for folder in saved.glob("step-*"):
        cut(folder / "rank-00000-00.safetensors")
    checkpoints, *_ = make(saved, seed=2)
    assert checkpoints.load() is None
    assert "training begins anew" in checkpoints.notes[0]
    assert "step-00000002" in checkpoints.notes[0]


def test_a_checkpoint_of_another_training_is_refused_with_every_field_that_differs(saved: Path) -> None:
    other = {**FACTS, "spec": {"batch_size": 8, "train": {"projector": 0.1, "encoders": 0.2}}, "quarantine": []}
    checkpoints, *_ = make(saved, seed=2, facts=other)
    with pytest.raises(CheckpointError) as refused:
        checkpoints.load()
    assert "spec.batch_size is 4" in refused.value.found
    assert "spec.batch_size 8" in refused.value.needed
    assert "spec.train.encoders is not set" in refused.value.found
    assert 'quarantine[0] is "a#1"' in refused.value.found
    assert "encoder " not in refused.value.found
    assert "projector" not in str(refused.value)
    assert "Remove " in refused.value.do
    assert len(list(saved.glob("step-*"))) == 2


def test_a_checkpoint_is_put_off_until_the_last_one_costs_a_twentieth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for the copying, which takes a second."""
    now = 0.0
    monkeypatch.setattr(running.time, "monotonic", lambda: now)
    checkpoints, *_ = make(tmp_path / "work", seed=1, every_s=5)
    copy = checkpoints._copy_own

    def slow() -> Any:
        nonlocal now
        now += 1
        return copy()

    checkpoints._copy_own = slow
    begun = []
    for step in range(100):
        now += 1
        before = checkpoints.stall_s
        checkpoints.follow(checkpoints.flags(), lambda step=step: state(step))
        if checkpoints.stall_s > before:
            begun.append(now)
            running._ended(checkpoints._job)
    assert begun[0] == 6
    assert len(begun) > 3
    assert all(later - earlier >= 1 / running.MOST_STALL for earlier, later in pairwise(begun))
    assert checkpoints.stall_s == len(begun)
    checkpoints.close()


# --- several processes ---------------------------------------------------------------------------------------------


def write_sharded(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with training_processes() as processes:
        mesh = init_device_mesh("cpu", (2,))
        _, plain, source = make(kwargs["folder"], seed=1)
        expected = [tensor.clone() for tensor in everything(plain, source)]
        how = {"matrix": [Shard(0)], "half": [Shard(1)], "scale": [Replicate()]}
        parameters = {
            name: nn.Parameter(distribute_tensor(each.detach(), mesh, how[name])) for name, each in plain.items()
        }
        optimizer = torch.optim.AdamW(parameters.values())
        for name, each in parameters.items():
            optimizer.state[each] = {
                key: distribute_tensor(source.state[plain[name]][key], mesh, how[name])
                for key in ("exp_avg", "exp_avg_sq")
            }
        checkpoints = RunningCheckpoints(
            kwargs["folder"], facts=FACTS, parameters=parameters, optimizer=optimizer, processes=processes, every_s=1
        )
        checkpoints.save_now(state(4))
        with torch.no_grad():
            for tensor in everything(parameters, optimizer):
                tensor.zero_()
        assert checkpoints.load() == state(4)
        assert all(isinstance(each, DTensor) for each in parameters.values())
        read = [tensor.full_tensor() for tensor in everything(parameters, optimizer)]
        assert all(map(torch.equal, read, expected))
        checkpoints.close()
        distributed.barrier()


def test_sharded_parameters_are_saved_by_parts_and_read_by_any_number_of_processes(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    run_two(write_sharded, {"folder": folder})
    _, *before = make(folder, seed=1)
    checkpoints, *after = make(folder, seed=2)
    assert checkpoints.load() == state(4)
    assert all(map(torch.equal, everything(*before), everything(*after)))
    parts = [json.loads((folder / "step-00000004" / f"rank-{rank:05d}.json").read_text())["parts"] for rank in (0, 1)]
    shapes = [{part["name"]: (part["offset"], part["size"]) for part in each} for each in parts]
    assert shapes[0]["parameter/matrix"] == ([0, 0], [4, 30])
    assert shapes[1]["parameter/matrix"] == ([4, 0], [3, 30])
    assert shapes[1]["exp_avg/half"] == ([0, 5], [5, 4])
    assert "parameter/scale" in shapes[0]
    assert "parameter/scale" not in shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_at_the_same_sample(first: int, then: int, tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    whole = launch_toy(tmp_path, processes=first, epochs=EPOCHS)

    def end(_number: int, _frame: object) -> None:
        raise KilledError

    def evict(_: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def run(processes: int, name: str, **more: Any) -> StageReport:
        return launch_toy(
            tmp_path, processes=processes, epochs=EPOCHS, work_dir=tmp_path / "work", out=tmp_path / name, **more
        )

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(KilledError):
            run(first, "evicted", on_progress=evict)
    finally:
        signal.signal(signal.SIGTERM, before)
    resumed = run(then, "resumed")
    assert resumed.resumed_from_step
    losses, expected = ([point.loss for point in each.history] for each in (resumed, whole))
    # Sums in another order round otherwise, which training makes larger with every step from there on.
    soon = resumed.resumed_from_step + 50
    assert losses[:soon] == pytest.approx(expected[:soon], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert resumed.samples == whole.samples


# --- signals -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]


def start_long(folder: Path, processes: int) -> tuple[subprocess.Popen[bytes], int]:
    """A step that trains without saving by itself, once it trains; and at which optimizer step it is."""
    code = (
        "from pathlib import Path; from tests.training_ranks import run_long; "
        f"run_long(Path({str(folder)!r}), processes={processes})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 400
    while not (folder / "at").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, int((folder / "at").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGINT, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)],
)
def test_a_signal_saves_the_step_that_training_is_at(number: signal.Signals, processes: int, tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    process, step = start_long(tmp_path, processes)
    process.send_signal(number)
    code = process.wait(timeout=300)
    assert code == 128 + number
    (saved,) = tmp_path.glob(f"work-{processes}/*/step-*")
    assert int(saved.name.removeprefix("step-")) >= step
    assert not list(saved.parent.glob(".step-*"))

    def stop(progress: Progress) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        launch_toy(tmp_path, processes=processes, epochs=2000, every_s=1e6, on_progress=stop)


def test_one_process_of_two_that_is_told_to_end_makes_both_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    toy_snapshot(tmp_path / "data")

    told: list[int] = []

    def terminate(_: Progress) -> None:
        if not told:
            told.append(trained_in(tmp_path)["1"])
            os.kill(told[0], signal.SIGTERM)

    with pytest.raises(ProcessLostError, match=r"process 2 of 2 was ended by SIGTERM") as lost:
        launch_toy(tmp_path, processes=2, epochs=2000, every_s=1e6, on_progress=terminate)
    assert lost.value.retry
    assert list(tmp_path.glob("work-2/*/step-*"))


# --- a disk that is full -------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_later_costs_no_checkpoint_and_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_snapshot(tmp_path / "data")
    asked: list[Path] = []
    enough = running._check_space

    def full(folder: Path, needed: int) -> None:
        asked.append(folder)
        if len(asked) == 2:
            raise StorageError("0 MB free", "8 MB are needed", "Free some space.")
        enough(folder, needed)

    monkeypatch.setattr(running, "_check_space", full)
    with every_step_saved():
        report = run_toy_stage(
            "prealign",
            recipe=toy_recipe(epochs=3, checkpoint_every_s=1e-6),
            snapshot=tmp_path / "data",
            inputs=tmp_path,
            out=tmp_path / "out",
            work_dir=tmp_path / "work",
        )
    assert len(asked) > 2
    (note,) = report.notes
    assert "0 MB free" in note
    assert "the one before stays" in note
    assert note in capsys.readouterr().err
    assert read_stage_report(tmp_path / "out").notes == report.notes
    assert report.checkpoint_stall_s
