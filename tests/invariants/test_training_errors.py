"""What ends one training process ends all of them, soon, with the error that it had."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import Turn
from manyeyes.data.shards import write_shards
from manyeyes.errors import PipelineError, RecordError
from manyeyes.training import stage
from manyeyes.training.batches import BatchBuilder
from manyeyes.training.loop import Progress
from tests.ports import free_port
from tests.training_ranks import launch_toy, run_rank
from tests.training_toys import toy_record, toy_snapshot

ROOT = Path(__file__).resolve().parents[2]
MARK = "TRAINED_IN"


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ids in the order in which they are trained on."""
    folder = tmp_path_factory.mktemp("order")
    toy_snapshot(folder / "data")
    mixtures = []

    class Spy(BatchBuilder):
        def __init__(self, mixture, *arguments, **more):  # type: ignore[no-untyped-def]
            mixtures.append(mixture)
            super().__init__(mixture, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "BatchBuilder", Spy)
        launch_toy(folder, processes=1)
    return [mixtures[0].sample(0, position).record.id for position in range(12)]


def spoil(folder: Path, bad: str) -> None:
    """A snapshot whose record ``bad`` is longer than the model takes."""
    toy_snapshot(folder / "data")
    records = [toy_record(number) for number in range(12)]
    long = (Turn("human", "<image>\n" + "what colour is it? " * 100), Turn("gpt", "red"))
    records = [dataclasses.replace(record, turns=long) if record.id == bad else record for record in records]
    write_shards(records, folder / "data" / "toy", "train", rows_per_shard=100)
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(folder / "data", provenance={"toy-train": made, "lm": made})


def trained_in(folder: Path) -> dict[str, int]:
    """Processes that live and train there, by rank."""
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ranks = [variable.removeprefix("RANK=") for variable in variables if variable.startswith("RANK=")]
        if f"{MARK}={folder}" in variables and ranks:
            found[ranks[0]] = int(environ.parent.name)
    return found


@pytest.mark.slow
def test_a_record_that_cannot_be_used_is_named_whoever_meets_it(
    order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    spoil(tmp_path, order[2])
    with pytest.raises(RecordError, match=order[2]) as alone:
        launch_toy(tmp_path, processes=1)
    with pytest.raises(RecordError) as together:
        launch_toy(tmp_path, processes=3)
    assert str(together.value) == str(alone.value)
    assert together.value.as_dict() == alone.value.as_dict()
    assert trained_in(tmp_path) == {}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_is_named_with_its_signal(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    toy_snapshot(tmp_path / "data")

    def kill(_: Progress) -> None:
        os.kill(trained_in(tmp_path)[rank], signal.SIGKILL)

    with pytest.raises(PipelineError, match=rf"process {int(rank) + 1} of 2 .*SIGKILL.*memory") as lost:
        launch_toy(tmp_path, processes=2, epochs=2000, on_progress=kill)
    assert lost.value.retry
    assert trained_in(tmp_path) == {}


def by_hand(folder: Path, fault: str) -> list[list[str] | None]:
    port = free_port()
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FAULT": fault}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_ranks"])
    started = [
        context.Process(target=run_rank, args=(folder, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    files = [folder / f"rank-{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in files]


@pytest.mark.parametrize("fault", ["full disk", "full disk of the second"])
def test_a_disk_that_takes_no_first_running_checkpoint_ends_all(fault: str, tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    first, second = by_hand(tmp_path, fault)
    assert first == ["StorageError", "0 MB free; 8 MB are needed. Free some space."]
    assert second == first


def test_a_slow_process_is_named_on_the_progress_line(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    first, _ = by_hand(tmp_path, "slow")
    assert first is not None
    assert first[0] == "done"
    assert first[1].startswith("process 2 of 2 takes ")


def test_a_defect_of_another_process_arrives_as_itself(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    assert by_hand(tmp_path, "defect") == [["KeyError", "'a defect'"]] * 2


def test_a_process_that_was_killed_is_missed_by_the_others(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    ended, killed = by_hand(tmp_path, "killed")
    assert killed is None
    assert ended is not None
    assert ended[0] == "ProcessLostError"
    assert "process 2 of 2" in ended[1]
    assert "out of memory" in ended[1]


@pytest.mark.slow
def test_torchrun_ends_with_the_error_of_the_process_that_had_it(order: list[str], tmp_path: Path) -> None:
    spoil(tmp_path, order[1])
    with pytest.raises(RecordError) as alone:
        launch_toy(tmp_path, processes=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.training_ranks", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, check=False)
    assert ended.returncode != 0
    for rank in range(2):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        assert told == ["RecordError", str(alone.value)]
