"""What a model needs is what torch counts when it runs; what a page says of speed follows from it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from manyeyes.data.mixture import Mixture
from manyeyes.data.snapshot import open_folder
from manyeyes.model import ManyEyesForConditionalGeneration, build_model
from manyeyes.model.language_model import compile_layers, recompute_layers
from manyeyes.training import throughput
from manyeyes.training.batches import Batch, BatchBuilder
from manyeyes.training.loop import batch_loss
from manyeyes.training.throughput import ModelFlops, device_peak, peak_memory
from tests.training_toys import toy_recipe, toy_snapshot

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("throughput")
    toy_snapshot(path)
    return path


def make(folder: Path, *, trained: tuple[str, ...]) -> tuple[ManyEyesForConditionalGeneration, Batch]:
    """One conversation, so that nothing is padding, and a model that trains some groups."""
    recipe = toy_recipe()
    model, processor = build_model(recipe.model, snapshot_path=folder, seed=0)
    for group, parameters in model.parameter_groups().items():
        for _, parameter in parameters:
            parameter.requires_grad_(group.split(".")[0] in trained)
    assert recipe.stages.sft is not None
    part = recipe.stages.sft.mixture[0].model_copy(update={"turns": "chained", "image_dropout": 0.0})
    return model, BatchBuilder(Mixture([part], open_folder(folder), seed=1), processor).build([0])


@pytest.mark.parametrize("trained", [("encoders", "projector", "language_model"), ("projector",)])
def test_operations_are_those_that_torch_counts_but_for_attention_among_tokens(
    folder: Path, trained: tuple[str, ...]
) -> None:
    model, batch = make(folder, trained=trained)
    flops = ModelFlops(model)
    with FlopCounterMode(display=False, depth=1) as counter, sdpa_kernel(SDPBackend.MATH):
        batch_loss(model, batch, device=CPU, flops=flops).backward()
    shape = model.config.get_text_config()
    layers, heads, width = shape.num_hidden_layers, shape.num_attention_heads, shape.hidden_size
    assert heads
    # Of each layer, two products of every token with every other, thrice with their gradients.
    attention = 3 * layers * 2 * 2 * batch.num_tokens**2 * width
    assert batch.num_places == batch.num_tokens
    assert flops.of(batch) == pytest.approx(counter.get_total_flops() - attention, rel=0.01)


def test_frozen_parts_count_without_gradients_of_their_weights(folder: Path) -> None:
    whole, batch = make(folder, trained=("projector", "language_model"))
    frozen, _ = make(folder, trained=("projector",))
    linear = sum(
        module.weight.numel()
        for module in (*whole.language_model.modules(),)
        if isinstance(module, nn.Linear) and module is not whole.get_output_embeddings()
    )
    head = whole.get_output_embeddings().weight.numel()
    more = ModelFlops(whole).of(batch) - ModelFlops(frozen).of(batch)
    assert more == 2 * (linear * batch.num_tokens + head * batch.num_supervised)


def test_images_are_counted_once_for_a_kind_of_batch(folder: Path) -> None:
    model, batch = make(folder, trained=("projector",))
    flops = ModelFlops(model)
    assert flops.of(batch) > 0
    text_alone = flops.of(batch)
    with torch.no_grad():
        batch_loss(model, batch, device=CPU, flops=flops)
    with_images = flops.of(batch)
    assert with_images > text_alone
    with patch.object(throughput, "_Counter", side_effect=AssertionError):
        batch_loss(model, batch, device=CPU, flops=flops)
    assert flops.of(batch) == with_images


def test_counting_changes_no_bit_of_the_loss_or_its_gradients(folder: Path) -> None:
    results = []
    for count in (False, True):
        model, batch = make(folder, trained=("encoders", "projector", "language_model"))
        loss = batch_loss(model, batch, device=CPU, flops=ModelFlops(model) if count else None)
        loss.backward()
        results.append([loss.detach(), *(own.grad for own in model.parameters() if own.grad is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12)]
)
def test_peak_of_a_known_gpu_is_its_data_sheets(name: str, expected: float) -> None:
    device_peak.cache_clear()
    with patch("torch.cuda.get_device_name", return_value=name):
        assert device_peak(torch.device("cuda", 0), torch.bfloat16) == expected
    device_peak.cache_clear()


def test_peak_of_another_device_is_measured() -> None:
    device_peak.cache_clear()
    assert 1e8 < device_peak(CPU, torch.float32) < 1e14


def test_memory_at_its_highest_only_grows() -> None:
    before = peak_memory(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    block += 1
    assert peak_memory(CPU) >= max(before, block.nbytes)


def compute(folder: Path, *, turns: str, backend: str | None) -> list[torch.Tensor]:
    """A batch's loss and gradients, the layers computed again in the backward pass, compiled or not."""
    recipe = toy_recipe()
    model, processor = build_model(recipe.model, snapshot_path=folder, seed=0)
    assert recipe.stages.sft is not None
    part = recipe.stages.sft.mixture[0].model_copy(update={"turns": turns, "image_dropout": 0.0})
    batch = BatchBuilder(Mixture([part], open_folder(folder), seed=1), processor).build([0, 1])
    recompute_layers(model.language_model)
    if backend is not None:
        compile_layers(model.language_model, backend=backend)
    loss = batch_loss(model, batch, device=CPU)
    loss.backward()
    return [loss.detach(), *(own.grad for own in model.parameters() if own.grad is not None)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_layers_give_the_same_loss_and_gradients(folder: Path) -> None:
    plain, compiled = (compute(folder, turns="chained", backend=backend) for backend in (None, "aot_eager"))
    for left, right in zip(plain, compiled, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-6)
