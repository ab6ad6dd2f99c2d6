"""What a stage may change and what it may not, whatever the batch looks like."""

from __future__ import annotations

import dataclasses
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from manyeyes.data.mixture import Mixture, Sample
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import CheckpointError, RecipeError, StorageError
from manyeyes.model import build_model, load_checkpoint
from manyeyes.recipe import MixturePart, Recipe, StageName
from manyeyes.training import loop
from manyeyes.training.batches import BatchBuilder, stage_seed
from manyeyes.training.loop import Progress, batch_loss
from manyeyes.training.stage import StageReport, encoder_digest, read_stage_report
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot in ``data`` and the results of prealign and pretrain."""
    folder = tmp_path_factory.mktemp("stages")
    toy_snapshot(folder / "data")
    run(folder, "prealign", folder / "left")
    run(folder, "pretrain", folder / "pretrain")
    return folder


def run(
    folder: Path, stage: StageName, out: Path, *, recipe: Recipe | None = None, work: str = "work", **more: object
) -> StageReport:
    return run_toy_stage(
        stage,
        recipe=recipe or toy_recipe(),
        snapshot=folder / "data",
        inputs=folder,
        out=out,
        work_dir=out.parent / work,
        **more,
    )


def sft_part(recipe: Recipe) -> MixturePart:
    assert recipe.stages.sft is not None
    return recipe.stages.sft.mixture[0]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_checkpoint(checkpoint)[0].state_dict()


def test_pretrain_changes_the_projector_and_nothing_else(folder: Path) -> None:
    after = weights(folder / "pretrain")
    built, _ = build_model(toy_recipe().model, snapshot_path=folder / "data", seed=0)
    language_model = {name: tensor for name, tensor in built.state_dict().items() if name.startswith("language_model")}
    assert language_model
    for name, tensor in language_model.items():
        assert torch.equal(after[name], tensor), name
    prealigned = load_file(folder / "left" / "encoder.safetensors")
    assert prealigned
    for name, tensor in prealigned.items():
        assert torch.equal(after[f"encoders.left.{name}"], tensor), name


def test_sft_freezes_what_train_does_not_name(folder: Path, tmp_path: Path) -> None:
    train = {"encoders.right": 1e-3, "projector": 1e-3}
    report = run(folder, "sft", tmp_path / "sft", recipe=toy_recipe(train=train))
    before, after = weights(folder / "pretrain"), weights(tmp_path / "sft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if not name.startswith(("encoders.right.", "projector."))} == set()
    assert {name.split(".")[0] for name in changed} == {"encoders", "projector"}
    assert set(report.trainable_parameters) == {"encoders.right", "projector"}


def test_loss_falls(folder: Path, tmp_path: Path) -> None:
    report = run(folder, "sft", tmp_path / "sft", recipe=toy_recipe(epochs=6))
    assert report.final_loss < 0.8 * report.first_loss
    assert report.samples == 72
    assert report.steps == 18


def test_micro_batches_accumulate_to_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, "sft", tmp_path / "whole", recipe=toy_recipe(max_steps=1, batch_size=8))
    parts = run(folder, "sft", tmp_path / "parts", recipe=toy_recipe(max_steps=1, batch_size=8, micro_batch_size=1))
    assert parts.first_loss == pytest.approx(whole.first_loss, rel=1e-5)
    assert parts.history[0].grad_norm == pytest.approx(whole.history[0].grad_norm, rel=1e-4)


class FirstPairs:
    """A mixture whose records are cut to their first exchange."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __len__(self) -> int:
        return len(self._mixture)

    def sample(self, epoch: int, index: int) -> Sample:
        return dataclasses.replace(self._mixture.sample(epoch, index), order=(0,))


def test_shared_prefix_gives_the_loss_of_whole_conversations(folder: Path) -> None:
    """With one exchange a record, independent and chained are the same text, and must be the same loss."""
    recipe = toy_recipe()
    model, processor = build_model(recipe.model, snapshot_path=folder / "data", seed=0)
    snapshot = open_folder(folder / "data")
    part = sft_part(recipe).model_copy(update={"image_dropout": 0.3})
    losses, counts = [], []
    for turns in ("independent", "chained"):
        mixture = FirstPairs(Mixture([part.model_copy(update={"turns": turns})], snapshot, seed=3))
        batch = BatchBuilder(mixture, processor).build(range(12))  # type: ignore[arg-type]
        assert (batch.chains is None) == (turns == "independent")
        losses.append(batch_loss(model, batch, device=torch.device("cpu")).item())
        counts.append(batch.num_supervised)
    assert counts[0] == counts[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_mixed_batch_gives_each_sample_its_own_image(folder: Path) -> None:
    recipe = toy_recipe()
    model, processor = build_model(recipe.model, snapshot_path=folder / "data", seed=0)
    snapshot = open_folder(folder / "data")
    part = sft_part(recipe)
    parts = [part, part.model_copy(update={"turns": "chained"})]
    builder = BatchBuilder(Mixture(parts, snapshot, seed=1), processor)
    positions = range(24)
    together = builder.build(positions)
    assert together.chains is not None
    assert together.prefixes is not None
    device = torch.device("cpu")
    alone = sum(batch_loss(model, builder.build([position]), device=device).item() for position in positions)
    assert batch_loss(model, together, device=device).item() == pytest.approx(alone, rel=1e-5)


def test_step_without_any_image_trains_on(folder: Path, tmp_path: Path) -> None:
    part = {"dataset": "toy-train", "turns": "independent", "image_dropout": 1.0}
    report = run(folder, "prealign", tmp_path / "left", recipe=toy_recipe(mixture=[part]))
    assert [point.grad_norm for point in report.history] == [0.0, 0.0, 0.0]
    assert report.first_loss > 0


def test_progress_tells_where_the_stage_is(folder: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(folder, "sft", tmp_path / "sft", on_progress=seen.append)
    assert seen[-1].step == seen[-1].steps == 3
    assert seen[-1].eta_s == 0
    assert seen[-1].samples_per_s > 0


def test_finished_stage_is_handed_out_and_not_trained_again(folder: Path, tmp_path: Path) -> None:
    first = run(folder, "sft", tmp_path / "first")
    seen: list[Progress] = []
    again = run(folder, "sft", tmp_path / "second", on_progress=seen.append)
    assert again == first
    assert seen == []
    assert weights(tmp_path / "second").keys() == weights(tmp_path / "first").keys()


def test_other_data_code_or_recipe_is_another_stage(folder: Path, tmp_path: Path) -> None:
    first = run(folder, "sft", tmp_path / "a")
    others = [
        run(folder, "sft", tmp_path / "b", quarantine=frozenset({"toy-train#3"})),
        run(folder, "sft", tmp_path / "c", recipe=toy_recipe(max_steps=2)),
    ]
    assert len({first.stage_digest, *(other.stage_digest for other in others)}) == 3
    same = run(folder, "sft", tmp_path / "d", recipe=toy_recipe(checkpoint_every_s=5.0))
    assert same.stage_digest == first.stage_digest


def test_quarantined_sample_is_left_out(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "sft", tmp_path / "sft", quarantine=frozenset({"toy-train#3", "toy-train#4"})).samples == 10


def test_result_without_pretrain_is_built_from_the_recipe(folder: Path, tmp_path: Path) -> None:
    run(folder, "sft", tmp_path / "sft", checkpoint=None, encoder_checkpoints={"left": folder / "left"})
    assert read_stage_report(tmp_path / "sft").stage == "sft"


def test_nan_stops_the_stage_with_advice(folder: Path, tmp_path: Path) -> None:
    rates = {"train": {"language_model": 10}, "weight_decay": 10}  # each step multiplies the weights by -99
    recipe = toy_recipe(**rates, epochs=8, max_grad_norm=1e9, schedule={"kind": "constant"})
    with pytest.raises(RecipeError, match="Lower the learning rates") as stopped:
        run(folder, "sft", tmp_path / "sft", recipe=recipe)
    assert 'record "toy/' in stopped.value.found
    assert not (tmp_path / "sft").exists()


def test_a_loss_that_is_no_number_names_the_samples_of_its_micro_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*arguments: Any, **more: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return batch_loss(*arguments, **more) * (float("nan") if calls == 7 else 1)

    monkeypatch.setattr(loop, "batch_loss", poisoned)
    # Four micro-batches a step: the seventh is the third of the second step.
    with pytest.raises(RecipeError, match=r"loss nan .* at step 2") as stopped:
        run(folder, "sft", tmp_path / "sft", recipe=toy_recipe(micro_batch_size=1))
    spec = toy_recipe().stages.sft
    assert spec is not None
    seed = stage_seed(toy_recipe(), "sft", None)
    sample = Mixture(spec.mixture, open_folder(folder / "data"), seed=seed).sample(0, 6)
    assert stopped.value.found.endswith(f'with record "{sample.record.id}" of toy-train')


@pytest.mark.parametrize("kind", ["gpu", "python", "torch on a cpu"])
def test_memory_that_runs_out_names_step_samples_and_fields(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Tensor:
        if kind == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if kind == "python":
            raise MemoryError
        return torch.empty(2**58)

    monkeypatch.setattr(loop, "batch_loss", full)
    with pytest.raises(RecipeError, match="out of memory at step 1 ") as stopped:
        run(folder, "sft", tmp_path / "sft", recipe=toy_recipe(micro_batch_size=2, checkpoint_encoders=True))
    assert re.search(r'record "toy/\d+" of toy-train \(\d+ tokens, 1 images or tiles\)', stopped.value.found)
    assert "lower micro_batch_size (2)" in stopped.value.do
    assert "checkpoint_language_model" in stopped.value.do
    assert "checkpoint_encoders" not in stopped.value.do


def test_another_error_of_torch_is_not_taken_for_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object, **__: object) -> Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "batch_loss", defect)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(folder, "sft", tmp_path / "sft")


def test_a_process_is_called_slow_when_it_takes_far_longer_than_the_others() -> None:
    assert loop.slow_process([3.0]) == ""
    assert loop.slow_process([1.0, 1.4]) == ""
    assert loop.slow_process([1.0, 3.0]) == "process 2 of 2 takes 3.0 times as long as the others"
    assert loop.slow_process([1.0, 1.2, 4.0, 0.8]) == "process 3 of 4 takes 4.0 times as long as the others"


@pytest.mark.parametrize(
    ("stage", "encoder", "message"),
    [
        ("prealign", "rigth", 'Did you mean "right"'),
        ("prealign", None, "prealign trains left, right"),
        ("sft", "left", "Leave encoder out"),
    ],
)
def test_wrong_encoder_is_refused_by_name(
    stage: StageName, encoder: str | None, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(folder, stage, tmp_path / "out", encoder=encoder)


def test_damaged_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "left"
    shutil.copytree(folder / "left", copy)
    data = bytearray((copy / "encoder.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "encoder.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="Run prealign again"):
        encoder_digest(copy)


def test_encoder_of_another_name_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='holds encoder "left"'):
        run(folder, "pretrain", tmp_path / "out", encoder_checkpoints={"right": folder / "left"})


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The kernel refuses to let any file grow beyond 1 MB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_disk_that_fills_up_leaves_nothing_half_written(folder: Path, tmp_path: Path, small_files_only: None) -> None:
    with pytest.raises(StorageError):
        run(folder, "sft", tmp_path / "sft", recipe=toy_recipe(checkpoint_every_s=1e-6, epochs=20))
    assert not (tmp_path / "sft").exists()
    assert [path.name for path in (tmp_path / "work").glob("*/*")] == ["lock"]


def test_too_little_space_is_noticed_before_writing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match="1 MB free"):
        run(folder, "sft", tmp_path / "sft", recipe=toy_recipe(checkpoint_every_s=1e-6, epochs=20))
