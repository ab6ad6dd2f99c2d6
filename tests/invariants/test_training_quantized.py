"""A frozen language model in 4 bits: adapters learn on it, and what comes out is what was trained."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import safetensors.torch
import torch
from torch import nn

from manyeyes.errors import RecipeError
from manyeyes.model import ManyEyesForConditionalGeneration, load_checkpoint
from manyeyes.recipe import LoraSpec, change_recipe
from manyeyes.training import loop
from manyeyes.training.adapters import add_adapters, merge_adapters, quantize_layers
from manyeyes.training.stage import StageReport, read_stage_report
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe, toy_snapshot

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QLORA = {"rank": 4, "alpha": 8, "quantize": "nf4"}
IDS = torch.arange(4, 24)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a snapshot in ``data``, a checkpoint in ``pretrain`` and one trained in 4 bits in ``qlora``."""
    folder = tmp_path_factory.mktemp("quantized")
    toy_snapshot(folder / "data")
    run_toy_stage(
        "pretrain",
        recipe=toy_recipe(max_steps=1),
        snapshot=folder / "data",
        inputs=folder,
        out=folder / "pretrain",
        work_dir=folder / "work",
        encoder_checkpoints={},
    )
    sft(folder, "qlora")
    return folder


def sft(
    folder: Path, name: str, *, on_progress: Callable[[loop.Progress], None] | None = None, **changes: Any
) -> StageReport:
    fields = {"lora": QLORA, "train": {"projector": 1e-3, "language_model": 0.05}, "epochs": 3, **changes}
    return run_toy_stage(
        "sft",
        recipe=change_recipe(toy_recipe(), {f"stages.sft.{field}": value for field, value in fields.items()}),
        snapshot=folder / "data",
        inputs=folder,
        out=folder / name,
        work_dir=folder / f"work-{name}",
        on_progress=on_progress,
    )


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix as NF4 with quantised constants has it."""
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(codes, state)
    return found


def quantized(folder: Path, dtype: torch.dtype = torch.float32) -> ManyEyesForConditionalGeneration:
    model, _ = load_checkpoint(folder / "pretrain")
    add_adapters(model.requires_grad_(False), LoraSpec(rank=4, alpha=8), seed=1)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    quantize_layers(model, dtype=dtype, device=CPU)
    return model.train()


def held(model: ManyEyesForConditionalGeneration) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def test_layers_with_adapters_take_half_a_byte_a_number_and_no_others_change(folder: Path) -> None:
    plain, model = load_checkpoint(folder / "pretrain")[0], quantized(folder)
    layers = held(model)
    assert len(layers) == 7 * model.config.text_config.num_hidden_layers
    for name, layer in layers.items():
        weight = plain.get_submodule(name.replace(".base_layer", "")).weight
        assert layer.weight.nbytes == weight.numel() // 2
        assert not layer.weight.requires_grad
    others = {name: value for name, value in plain.state_dict().items() if "_proj.weight" not in name}
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in others.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_is_the_one_that_was_trained_and_the_unrounded_weights_give_another(
    folder: Path, dtype: torch.dtype
) -> None:
    model = quantized(folder, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        trained = model(input_ids=IDS).logits.detach()
    merge_adapters(model)
    assert not held(model)
    merged = model(input_ids=IDS).logits
    other, _ = load_checkpoint(folder / "pretrain")
    add_adapters(other, LoraSpec(rank=4, alpha=8), seed=1)
    torch.manual_seed(0)
    for name, parameter in other.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    merge_adapters(other)
    # What rounding to 4 bits does, and what computing in bf16 does.
    far = (other(input_ids=IDS).logits - trained).abs().mean()
    near = (merged - trained).abs().mean()
    assert near < (1e-5 if dtype == torch.float32 else 0.25 * far)
    assert far > 1e-2


def test_a_stage_in_4_bits_saves_rounded_weights_and_its_adapters_in_full_precision(folder: Path) -> None:
    report = read_stage_report(folder / "qlora")
    assert report.final_loss < report.first_loss
    before, after = (load_checkpoint(folder / name)[0].state_dict() for name in ("pretrain", "qlora"))
    assert before.keys() == after.keys()
    adapters = safetensors.torch.load_file(folder / "qlora" / "adapter" / "adapter_model.safetensors")
    for name, weight in before.items():
        key = f"base_model.model.{name.removeprefix('language_model.').removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapters:
            change = 2.0 * adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
            torch.testing.assert_close(after[name], rounded(weight) + change, rtol=0, atol=1e-6)
        elif name.startswith("language_model."):
            assert torch.equal(after[name], weight)
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.float32}


# peft 0.21 asks for a property that transformers 5.23 renamed; gone once peft uses the new name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@torch.no_grad()
def test_a_reader_who_follows_the_page_has_the_logits_of_the_merged_checkpoint_from_peft(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some CPUs have a way of their own with 4 bits, which computes in bf16.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    _, block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lora.md").read_text(encoding="utf-8"), re.DOTALL)
    read: dict[str, Any] = {"language_model": folder / "data" / "pretrained" / "lm", "result": folder / "qlora"}
    exec(block, read)
    expected = load_checkpoint(folder / "qlora")[0].language_model(IDS).logits
    torch.testing.assert_close(read["model"](IDS).logits, expected, rtol=0, atol=1e-4)


def test_a_killed_stage_in_4_bits_goes_on_to_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PROGRESS_EVERY_S", 0)

    def kill(progress: loop.Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with every_step_saved(), pytest.raises(KeyboardInterrupt):
        sft(folder, "killed", on_progress=kill, checkpoint_every_s=1e-6)
    resumed = sft(folder, "killed", checkpoint_every_s=1e-6)
    assert resumed.resumed_from_step == 2
    assert resumed.checkpoint_digest == read_stage_report(folder / "qlora").checkpoint_digest


def test_4_bits_and_not_make_two_stages(folder: Path) -> None:
    changes = {"max_steps": 1, "epochs": 1}
    digests = {
        sft(folder, str(kind), lora={**QLORA, "quantize": kind}, **changes).stage_digest for kind in ("nf4", None)
    }
    assert len(digests) == 2


def test_a_machine_without_bitsandbytes_is_told_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match=r"bitsandbytes cannot be imported.*manyeyes\[qlora\]"):
        sft(folder, "missing")


def test_a_device_that_bitsandbytes_does_not_know_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", refuse)
    with pytest.raises(RecipeError, match=r"cannot do it on cpu \(no kernel\).*leave quantize out"):
        sft(folder, "refused")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora": {**QLORA, "quantize": "int4"}}, r"lora\.quantize.*nf4"),
        ({"lora": {"quantize": "nf4"}}, r"lora\.rank"),
        ({"quantize": "nf4"}, r"quantize"),
        ({"lora": QLORA, "sharding": "full"}, r"sharding is full; each process holds what is in 4 bits whole"),
        ({"lora": QLORA, "train": {"projector": 1e-3}}, r"lora needs train\.language_model"),
    ],
)
def test_4_bits_without_adapters_or_in_parts_are_refused_by_the_recipe(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        change_recipe(toy_recipe(), {f"stages.sft.{field}": value for field, value in fields.items()})
