"""What a stage may say beside rates and mixture: adapters, template, fit, resolution, a number of samples, betas."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, LlamaConfig, MambaConfig, PreTrainedConfig

from manyeyes.data.mixture import Mixture
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import CheckpointError, RecipeError
from manyeyes.model import build_model, build_skeleton, load_checkpoint
from manyeyes.model.language_model import decoder_of
from manyeyes.recipe import LoraSpec, MixturePart, change_recipe
from manyeyes.storage import hash_file
from manyeyes.training import loop
from manyeyes.training.adapters import adapters_alone, add_adapters, merge_adapters, save_adapter
from manyeyes.training.batches import processor_of_stage
from manyeyes.training.optimizer import build_optimizer, freeze_others
from manyeyes.training.stage import ADAPTER, read_stage_report
from tests.model_toys import toy_images
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe, toy_snapshot

ROOT = Path(__file__).parents[2]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a snapshot in ``data`` and a checkpoint in ``pretrain``."""
    folder = tmp_path_factory.mktemp("options")
    toy_snapshot(folder / "data")
    recipe = toy_recipe(max_steps=1)
    run_toy_stage(
        "pretrain",
        recipe=recipe,
        snapshot=folder / "data",
        inputs=folder,
        out=folder / "pretrain",
        work_dir=folder / "work",
        encoder_checkpoints={},
    )
    return folder


def sft(
    folder: Path,
    name: str,
    *,
    on_progress: Callable[[loop.Progress], None] | None = None,
    checkpoint: Path | None = None,
    **changes: object,
) -> Path:
    run_toy_stage(
        "sft",
        recipe=change_recipe(toy_recipe(), {f"stages.sft.{field}": value for field, value in changes.items()}),
        snapshot=folder / "data",
        inputs=folder,
        out=folder / name,
        work_dir=folder / f"work-{name}",
        on_progress=on_progress,
        checkpoint=checkpoint or folder / "pretrain",
    )
    return folder / name


def test_fresh_adapters_change_nothing_and_merged_ones_change_nothing_either(pretrained: Path) -> None:
    model, _ = load_checkpoint(pretrained / "pretrain")
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    names = set(model.state_dict())
    add_adapters(model, LoraSpec(rank=4, alpha=8), seed=1)
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 7 * model.config.text_config.num_hidden_layers
    assert torch.equal(model(input_ids=ids).logits, before)
    for module in adapted:
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    moved = model(input_ids=ids).logits
    assert (moved - before).abs().max() > 1e-2
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=ids).logits, moved, rtol=0, atol=1e-5)


def test_only_adapters_train_and_the_head_has_none(pretrained: Path) -> None:
    model, _ = load_checkpoint(pretrained / "pretrain")
    add_adapters(model.requires_grad_(False), LoraSpec(rank=4, alpha=8), seed=1)
    groups = adapters_alone(model.parameter_groups())
    trained = freeze_others(groups, {"language_model": 1e-3})
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trained)
    inside = {
        name for name, module in decoder_of(model.language_model).named_modules() if isinstance(module, LoraLayer)
    }
    assert not any("lm_head" in name for name in inside)


def test_a_stage_with_lora_changes_linear_layers_alone_and_saves_a_plain_checkpoint(pretrained: Path) -> None:
    out = sft(pretrained, "lora", lora=LORA, max_steps=2)
    before, after = (load_checkpoint(path)[0].state_dict() for path in (pretrained / "pretrain", out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "language_model" in name}
    assert changed
    assert all("_proj.weight" in name for name in changed)


@pytest.fixture(scope="module")
def adapted(pretrained: Path) -> Path:
    """The result of a stage with adapters that have learned something."""
    return sft(pretrained, "adapted", lora=LORA, train={"projector": 1e-3, "language_model": 0.05}, epochs=3)


# peft 0.21 asks for a property that transformers 5.23 renamed; gone once peft uses the new name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@torch.no_grad()
def test_a_reader_who_follows_the_page_has_the_logits_of_the_merged_checkpoint_from_peft(
    pretrained: Path, adapted: Path
) -> None:
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lora.md").read_text(encoding="utf-8"), re.DOTALL)
    read: dict[str, Any] = {"language_model": pretrained / "data" / "pretrained" / "lm", "result": adapted}
    exec(block, read)
    ids = read["tokenizer"]("what colour is it?", return_tensors="pt").input_ids
    merged = load_checkpoint(adapted)[0].language_model
    torch.testing.assert_close(read["logits"], merged(ids).logits, rtol=0, atol=1e-5)
    with read["model"].disable_adapter():
        assert (read["model"](ids).logits - read["logits"]).abs().max() > 1e-2
    weights = read["model"].merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    # The whole model answers about images with them as the checkpoint does.
    model, processor = load_checkpoint(adapted)
    batch = processor(images=toy_images(2), text=["what colour is it?", "is there a red shape?"])
    answers = model.generate(**batch, max_new_tokens=8, do_sample=False)
    model.language_model.load_state_dict(weights)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), answers)


def test_the_adapter_folder_is_small_says_what_it_is_and_is_the_same_every_time(
    pretrained: Path, adapted: Path
) -> None:
    report = read_stage_report(adapted)
    assert sorted(file.name for file in (adapted / ADAPTER).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert report.adapter_sha256 == hash_file(adapted / ADAPTER / "adapter_model.safetensors")
    config = json.loads((adapted / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, names)
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == ("LORA", "CAUSAL_LM", None)
    tensors = safetensors.torch.load_file(adapted / ADAPTER / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == report.trainable_parameters["language_model"]
    again = sft(pretrained, "again", lora=LORA, train={"projector": 1e-3, "language_model": 0.05}, epochs=3)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / ADAPTER / name).read_bytes() == (adapted / ADAPTER / name).read_bytes()


def test_a_stage_that_starts_from_a_checkpoint_with_an_adapter_takes_the_merged_weights(
    pretrained: Path, adapted: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapted, tmp_path / "without", ignore=shutil.ignore_patterns(ADAPTER))
    digests = {
        read_stage_report(sft(pretrained, f"after-{start.name}", checkpoint=start, max_steps=1)).checkpoint_digest
        for start in (adapted, tmp_path / "without")
    }
    assert len(digests) == 1
    assert not (pretrained / "after-without" / ADAPTER).exists()


def test_prealign_with_adapters_keeps_the_encoder_alone(pretrained: Path) -> None:
    rates = {"encoders": 1e-3, "projector": 1e-3, "language_model": 1e-3}
    run_toy_stage(
        "prealign",
        recipe=change_recipe(toy_recipe(max_steps=1, train=rates), {"stages.prealign.lora": LORA}),
        snapshot=pretrained / "data",
        inputs=pretrained,
        out=pretrained / "left-with-lora",
        work_dir=pretrained / "work-left-with-lora",
    )
    assert not (pretrained / "left-with-lora" / ADAPTER).exists()
    assert read_stage_report(pretrained / "left-with-lora").adapter_sha256 is None


def test_target_names_are_whole_where_their_ends_also_name_layers_without_an_adapter(tmp_path: Path) -> None:
    model = build_skeleton(toy_recipe().model, text_config=LlamaConfig(num_hidden_layers=1, hidden_size=32))
    model.to_empty(device="cpu")
    add_adapters(model, LoraSpec(rank=2, alpha=2), seed=0)
    model.language_model.extra = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})
    save_adapter(model, tmp_path / ADAPTER, base=("owner/name", "abc"))
    config = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert len(config["target_modules"]) == 7
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc")


def test_adapters_are_drawn_from_the_seed_alone(pretrained: Path) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        model, _ = load_checkpoint(pretrained / "pretrain")
        torch.rand(seed)
        before = torch.get_rng_state()
        add_adapters(model, LoraSpec(rank=4, alpha=8), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [module.lora_A["default"].weight for module in model.modules() if isinstance(module, LoraLayer)]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not any(map(torch.equal, drawn(1), drawn(2)))


def test_a_killed_stage_with_lora_goes_on_to_the_same_weights(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PROGRESS_EVERY_S", 0)

    def kill(progress: loop.Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    changes = {"lora": LORA, "epochs": 3, "max_steps": 5, "checkpoint_every_s": 1e-6}
    whole = sft(pretrained, "whole", **changes)
    with every_step_saved(), pytest.raises(KeyboardInterrupt):
        sft(pretrained, "killed", on_progress=kill, **changes)
    resumed = read_stage_report(sft(pretrained, "killed", **changes))
    assert resumed.resumed_from_step == 2
    assert resumed.checkpoint_digest == read_stage_report(whole).checkpoint_digest


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=300), "no linear layer"),
        (MambaConfig(hidden_size=8, state_size=2, num_hidden_layers=1, vocab_size=300), "peft cannot adapt it"),
    ],
)
def test_a_family_that_takes_no_adapters_is_refused(config: PreTrainedConfig, reason: str) -> None:
    model = build_skeleton(toy_recipe().model, text_config=config)
    with pytest.raises(RecipeError, match=reason):
        add_adapters(model, LoraSpec(rank=4, alpha=8), seed=1)


def test_lora_without_a_rate_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"lora needs train\.language_model"):
        change_recipe(toy_recipe(), {"stages.pretrain.lora": LORA})


def test_a_stage_stops_after_max_samples(pretrained: Path) -> None:
    report = read_stage_report(sft(pretrained, "capped", max_samples=6, epochs=3))
    assert (report.samples, report.steps) == (6, 2)


def test_a_stage_may_have_its_own_template_and_fit(pretrained: Path) -> None:
    _, processor = load_checkpoint(pretrained / "pretrain")
    spec = toy_recipe(template="plain", fit="crop").stages.sft
    assert spec is not None
    own = processor_of_stage(processor, spec)
    assert own.template == "plain"
    assert {transform.fit for transform in own.image_transforms.values()} == {"crop"}
    assert (processor.template, {transform.fit for transform in processor.image_transforms.values()}) == (
        "vicuna_v1",
        {"pad"},
    )
    plain = toy_recipe().stages.sft
    assert plain is not None
    assert processor_of_stage(processor, plain) is processor


def test_a_checkpoint_keeps_the_models_template_whatever_the_stage_used(pretrained: Path) -> None:
    out = sft(pretrained, "template", template="mistral", max_steps=1)
    assert load_checkpoint(out)[1].template == "vicuna_v1"


def test_a_part_that_the_fusion_lacks_is_refused_with_those_it_has(pretrained: Path) -> None:
    with pytest.raises(RecipeError, match=r"this model's fusion has nothing to train"):
        sft(pretrained, "part", train={"fusion.projections": 1e-3})


def test_recorded_turns_keep_their_order_and_shuffled_ones_do_not(pretrained: Path) -> None:
    snapshot = open_folder(pretrained / "data")
    orders = {
        order: {
            Mixture([MixturePart(dataset="toy-train", order=order)], snapshot, seed=1).sample(0, index).order
            for index in range(12)
        }
        for order in ("recorded", "shuffled")
    }
    assert orders == {"recorded": {(0, 1)}, "shuffled": {(0, 1), (1, 0)}}


def test_a_small_encoder_has_no_published_weights_and_its_own_image_size() -> None:
    changes = {"model.encoders.0": {"name": "left", "encoder": "clip-l14-336", "small": True, "source": "dir:weights"}}
    with pytest.raises(RecipeError, match="a small size has no weights"):
        change_recipe(toy_recipe(), changes)
    changes["model.encoders.0"]["source"] = "scratch:"
    spec = change_recipe(toy_recipe(), changes).model
    model = build_skeleton(spec, text_config=LlamaConfig(num_hidden_layers=1, hidden_size=32))
    assert model.encoder_sizes["left"] == 56
    assert model.encoder_channels[0] == 32


def test_an_encoder_may_have_its_own_fit(pretrained: Path) -> None:
    recipe = change_recipe(toy_recipe(), {"model.encoders.0.fit": "crop"})
    _, processor = build_model(recipe.model, snapshot_path=pretrained / "data", seed=0)
    assert {name: transform.fit for name, transform in processor.image_transforms.items()} == {
        "left": "crop",
        "right": "pad",
    }


def test_betas_reach_the_optimizer(pretrained: Path) -> None:
    model, _ = load_checkpoint(pretrained / "pretrain")
    groups = model.parameter_groups()
    freeze_others(groups, {"projector": 1e-3})
    for betas in ((0.9, 0.95), (0.9, 0.999)):
        spec = toy_recipe(betas=betas).stages.sft
        assert spec is not None
        assert build_optimizer(groups, {"projector": 1e-3}, spec).defaults["betas"] == betas


def test_a_stage_may_train_the_model_at_another_resolution(pretrained: Path, tmp_path: Path) -> None:
    model = {
        "preprocess": "shared",
        "encoders": [
            {"name": "coarse", "encoder": "vit-tiny-p16-64", "image_size": 32},
            {"name": "fine", "encoder": "efficientnet-lite0", "image_size": 64},
        ],
        "fusion": {"strategy": "patch-info-mining", "grid": 2, "options": {"image_grid": 2}},
        "layout": {"tiling": "grid", "whole": ["fine"]},
    }
    changes = {f"model.{field}": value for field, value in model.items()}
    normal = {"fusion.options": {}, "layout": None, "shared": {"image_size": 48}}
    rates = {"projector": 1e-3}
    recipe = change_recipe(
        toy_recipe(max_steps=1, train=rates), {**changes, "stages.prealign": None, "stages.pretrain.model": normal}
    )
    for stage in ("pretrain", "sft"):
        run_toy_stage(
            stage,
            recipe=recipe,
            snapshot=pretrained / "data",
            inputs=tmp_path,
            out=tmp_path / stage,
            work_dir=tmp_path / "work",
            **({"encoder_checkpoints": {}} if stage == "pretrain" else {}),
        )
    (first, low), (second, high) = (load_checkpoint(tmp_path / stage) for stage in ("pretrain", "sft"))
    assert (first.config.layout, second.config.layout.tiling) == (None, "grid")
    assert (low.image_transforms["shared"].size, high.image_transforms["shared"].size) == (48, 64)
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("projector.") for name in changed)


def test_what_a_stage_changes_in_the_model_must_be_there(pretrained: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages.sft.model changes model.fusion.gird"):
        change_recipe(toy_recipe(), {"stages.sft.model": {"fusion.gird": 3}})
    with pytest.raises(CheckpointError, match=r"every tensor of the model and no other"):
        sft(pretrained, "deeper", model={"projector.depth": 3})


def test_prealign_of_an_encoder_does_not_depend_on_its_company(pretrained: Path) -> None:
    def digest(**changes: object) -> str:
        report = run_toy_stage(
            "prealign",
            recipe=change_recipe(
                toy_recipe(max_steps=1), {f"model.{field}": value for field, value in changes.items()}
            ),
            snapshot=pretrained / "data",
            inputs=pretrained,
            out=pretrained / "alone",
            work_dir=pretrained / "work-alone",
        )
        return report.stage_digest

    left = {"name": "left", "encoder": "vit-tiny-p16-64", "image_size": 32}
    right = {"name": "right", "encoder": "vit-tiny-p16-64", "image_size": 48}
    alone = digest()
    assert digest(encoders=[left, right], fusion={"strategy": "sequence-append", "grid": 2}) == alone
    assert digest(fusion={"grid": 1}) != alone
    assert digest(encoders=[{**left, "image_size": 48}, right]) != alone
