"""Processes that build batches ahead of training change nothing but when batches are built."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.mixture import Mixture
from manyeyes.data.records import Turn
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import ManyEyesError, ProcessLostError, RecordError
from manyeyes.model import build_processor
from manyeyes.recipe import MixturePart
from manyeyes.training import ahead
from manyeyes.training.ahead import BatchStream, batch_stream, micro_batches
from manyeyes.training.batches import Batch, BatchBuilder
from tests.training_toys import run_toy_stage, toy_recipe, toy_record, toy_snapshot

STEPS = 6
PLAN = partial(micro_batches, batch_size=5, micro_batch_size=2, num_samples=28, rank=0, num_ranks=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers")
    toy_snapshot(path)
    return path


def make_builder(folder: Path, **part: Any) -> BatchBuilder:
    mixed = MixturePart.model_validate({"dataset": "toy-train", "turns": "chained", "image_dropout": 0.3, **part})
    alone = MixturePart(dataset="toy-train", turns="independent")
    mixture = Mixture([mixed, alone], open_folder(folder), seed=3)
    return BatchBuilder(mixture, build_processor(toy_recipe().model, snapshot_path=folder))


def read_all(stream: BatchStream, *, begin: int) -> Iterator[tuple[int, list[Batch]]]:
    stream.go_to(begin)
    for _ in range(begin, STEPS):
        share = stream.next_step()
        yield share.num_supervised, list(share.batches)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for own in inside for tensor in tensors_of(own)]


@pytest.mark.parametrize(("workers", "begin"), [(0, 4), (1, 0), (2, 3)])
def test_batches_depend_on_their_step_alone(workers: int, begin: int, folder: Path) -> None:
    builder = make_builder(folder)
    with batch_stream(builder, PLAN, steps=STEPS, workers=0) as stream:
        expected = list(read_all(stream, begin=0))[begin:]
    with batch_stream(builder, PLAN, steps=STEPS, workers=workers) as stream:
        found = list(read_all(stream, begin=begin))
    assert [count for count, _ in found] == [count for count, _ in expected]
    for (count, batches), (_, wanted) in zip(found, expected, strict=True):
        assert count == sum(batch.num_supervised for batch in batches)
        assert [batch.num_samples for batch in batches] == [batch.num_samples for batch in wanted]
        for batch, other in zip(batches, wanted, strict=True):
            pairs = list(zip(tensors_of(batch), tensors_of(other), strict=True))
            assert pairs
            assert all(torch.equal(one, two) for one, two in pairs)


def test_a_stage_learns_the_same_whoever_builds_its_batches(folder: Path, tmp_path: Path) -> None:
    def run(workers: int) -> tuple[str, list[float]]:
        report = run_toy_stage(
            "prealign",
            recipe=toy_recipe(epochs=2, micro_batch_size=3),
            snapshot=folder,
            inputs=tmp_path,
            out=tmp_path / f"out-{workers}",
            work_dir=tmp_path / f"work-{workers}",
            data_workers=workers,
        )
        assert report.data_wait_s is not None
        assert 0 < report.data_wait_s < report.seconds
        assert all(point.data_wait is not None and 0 <= point.data_wait <= 1 for point in report.history)
        return report.checkpoint_digest, [point.loss for point in report.history]

    assert run(2) == run(0)


def test_only_one_micro_batch_is_in_memory(folder: Path) -> None:
    made: list[weakref.ref[Batch]] = []

    class Spy(BatchBuilder):
        def build(self, positions: Sequence[int]) -> Batch:
            gc.collect()
            assert [batch for batch in made if batch() is not None] == []
            batch = super().build(positions)
            made.append(weakref.ref(batch))
            return batch

    plain = make_builder(folder)
    gc.freeze()  # what other tests left need not be looked through each time
    try:
        with batch_stream(Spy(*plain.__reduce__()[1]), PLAN, steps=STEPS, workers=0) as stream:
            stream.go_to(0)
            for _ in range(STEPS):
                for batch in stream.next_step().batches:
                    assert batch.num_samples
                    del batch
    finally:
        gc.unfreeze()
    assert len(made) == 17


def test_workers_build_no_further_ahead_than_memory_is_given_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def most_ahead() -> int:
        with batch_stream(make_builder(folder), PLAN, steps=STEPS, workers=1) as stream:
            seen = []
            for _ in read_all(stream, begin=0):
                assert stream._workers is not None
                seen.append(sum(task.kind == "build" for task in stream._workers._told))
        return max(seen)

    assert most_ahead() > 1
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 1)
    assert most_ahead() == 1


def test_a_record_that_cannot_be_used_is_the_same_error_from_a_worker(tmp_path: Path) -> None:
    toy_snapshot(tmp_path)
    records = [toy_record(number) for number in range(12)]
    records[5] = dataclasses.replace(records[5], turns=(records[5].turns[0], Turn("gpt", "red " * 500)))
    write_shards(records, tmp_path / "toy", "train", rows_per_shard=100)
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(tmp_path, provenance={"toy-train": made, "lm": made})

    def read(workers: int) -> tuple[int, ManyEyesError]:
        done: list[int] = []
        stream = batch_stream(make_builder(tmp_path), PLAN, steps=STEPS, workers=workers)
        with pytest.raises(RecordError, match="toy/5") as caught, stream as opened:
            done.extend(count for count, _ in read_all(opened, begin=0))
        return len(done), caught.value

    (step, alone), (worker_step, told) = read(0), read(2)
    assert worker_step == step
    assert told.as_dict() == alone.as_dict()
    assert "In data worker" in told.__notes__[0]


def test_a_worker_that_is_killed_is_named_with_its_records(folder: Path) -> None:
    with batch_stream(make_builder(folder), PLAN, steps=STEPS, workers=2) as stream:
        assert stream._workers is not None
        steps = read_all(stream, begin=0)
        next(steps)
        stream._workers._workers[1].process.kill()
        with pytest.raises(ProcessLostError, match=r"data worker 2 of 2 .*SIGKILL.*memory") as lost:
            list(steps)
    assert 'record "toy/' in lost.value.found
    assert "of toy-train" in lost.value.found
    assert "MANYEYES_DATA_WORKERS" in lost.value.do
    assert lost.value.retry


def hold_workers(folder: Path, told: Any) -> None:
    with batch_stream(make_builder(folder), PLAN, steps=STEPS, workers=2) as stream:
        stream.go_to(0)
        stream.next_step()
        assert stream._workers is not None
        told.send([worker.process.pid for worker in stream._workers._workers])
        time.sleep(600)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_a_training_process_that_is_killed(folder: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=hold_workers, args=(folder, theirs))
    process.start()
    workers = ours.recv()
    assert all(lives(worker) for worker in workers)
    process.kill()
    process.join()
    wait_until(lambda: not any(lives(worker) for worker in workers))


@pytest.mark.parametrize("part", [{}, {"turns": "independent"}, {"order": "recorded", "image_dropout": 1.0}])
def test_supervised_tokens_are_counted_without_pixels(
    part: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = make_builder(folder, **part)
    expected = builder.build(range(24)).num_supervised
    monkeypatch.setattr("manyeyes.processor.decode_image", None)
    assert make_builder(folder, **part).count(range(24)) == expected > 0
