"""Mini-Gemini's layout to ours: image bytes in, logits out, against its formulas computed apart from our own code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from manyeyes.converters import mini_gemini
from manyeyes.converters.convert import convert
from manyeyes.converters.logits import prompt_logits
from manyeyes.errors import CheckpointError, SourceError
from tests import published_sizes as sizes
from tests import published_toys as toys
from tests.published_mini_gemini import MiniGeminiToy

TOLERANCE = 1e-4
PICTURE = toys.photograph(90, 61)


def _check(
    toy: MiniGeminiToy, out: Path, *, aspect: str = "pad", prompt: str = toys.PROMPT, factor: float = 1.0
) -> None:
    expected = toy.logits(toys.piece_ids(toy.folder, prompt), factor * toy.image_tokens(PICTURE, aspect=aspect))
    found = prompt_logits(out, prompt=prompt, images=[PICTURE])
    assert found.logits.shape == expected.shape
    np.testing.assert_allclose(found.logits, expected, atol=TOLERANCE, rtol=0)


def _heads(folder: Path, *, listed: bool = False) -> Path:
    file, fields = folder.parent / "encoders.json", {"num_attention_heads": 3}
    file.write_text(json.dumps([fields, {}] if listed else {"clip": fields}), encoding="utf-8")
    return file


@pytest.mark.parametrize("aspect", ["pad", None])
def test_mini_gemini_with_its_towers_gives_its_logits(tmp_path: Path, aspect: str | None) -> None:
    toy = MiniGeminiToy(tmp_path / "mgm")
    source = toy.write(image_aspect_ratio=aspect)
    report = convert(source, tmp_path / "out", encoder_configs=_heads(source))
    assert report.system == "mini-gemini"
    assert report.encoders == {"clip": "checkpoint", "convnext": "checkpoint"}
    assert set(report.left) == {
        f"model.vision_tower.vision_tower.vision_model.{key}"
        for key in toy.clip.state_dict()
        if key.startswith(("post_layernorm.", "encoder.layers.2."))
    }
    _check(toy, tmp_path / "out", aspect=aspect or "square")


def test_mini_gemini_hd_in_shards_of_pickles_gives_its_logits(tmp_path: Path) -> None:
    toy = MiniGeminiToy(tmp_path / "mgm", image_grid=2)
    source = toy.write(shards=2, form="bin")
    convert(source, tmp_path / "out", encoder_configs=_heads(source, listed=True))
    assert toy.image_tokens(PICTURE).shape[0] == 5 * 16
    _check(toy, tmp_path / "out")


def test_mini_gemini_without_its_towers_takes_them_from_a_folder(tmp_path: Path) -> None:
    toy = MiniGeminiToy(tmp_path / "mgm")
    source = toy.write(towers=False)
    with pytest.raises(
        SourceError, match=r'"model_zoo/OpenAI/clip-vit-large-patch14-336", which is neither .*--encoders'
    ):
        convert(source, tmp_path / "out")
    report = convert(source, tmp_path / "out", encoders=str(toy.write_towers(tmp_path / "towers")))
    assert report.encoders["convnext"] == str(tmp_path / "towers" / "convnext" / "open_clip_model.safetensors")
    _check(toy, tmp_path / "out")


def test_mini_gemini_on_mixtral_stacks_its_experts(tmp_path: Path) -> None:
    toy = MiniGeminiToy(tmp_path / "mgm")
    torch.manual_seed(9)
    config = MixtralConfig(
        vocab_size=toy.vocab_size,
        hidden_size=toys.WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    toy.language_model = MixtralForCausalLM(config).eval()
    stored = _apart(toy.language_model.state_dict())
    (toy.folder / "config.json").write_text(
        json.dumps(
            toy.config(model_type="mgm_mixtral", intermediate_size=40, num_local_experts=3, num_experts_per_tok=2)
        ),
        encoding="utf-8",
    )
    others = {key: tensor for key, tensor in toy.tensors(towers=True).items() if ".mlp." not in key or "vision" in key}
    save_file({**others, **stored}, toy.folder / "model.safetensors")
    report = convert(toy.folder, tmp_path / "out", encoder_configs=_heads(toy.folder))
    assert report.template == "mini_gemini_mistral"
    _check(toy, tmp_path / "out", prompt=f"[INST] <image>\n{toys.QUESTION} [/INST]")


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's experts as the published files have them."""
    stored = {}
    for layer in range(2):
        here, there = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        stored[there + "gate.weight"] = state[here + "gate.weight"].clone()
        for expert in range(3):
            gate, up = state[here + "experts.gate_up_proj"][expert].chunk(2)
            stored[f"{there}experts.{expert}.w1.weight"] = gate.clone()
            stored[f"{there}experts.{expert}.w3.weight"] = up.clone()
            stored[f"{there}experts.{expert}.w2.weight"] = state[here + "experts.down_proj"][expert].clone()
    return stored


def _round_to_half(toy: MiniGeminiToy) -> None:
    modules = (toy.language_model, toy.clip, toy.convnext)
    for tensor in [*(tensor for module in modules for tensor in module.parameters()), *toy.own.values()]:
        tensor.data = tensor.data.bfloat16().float()


def test_mini_gemini_on_gemma_shares_its_head_and_multiplies_visual_tokens_too(tmp_path: Path) -> None:
    toy = MiniGeminiToy(tmp_path / "mgm")
    torch.manual_seed(10)
    config = GemmaConfig(
        vocab_size=toy.vocab_size,
        hidden_size=toys.WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        initializer_range=0.2,
    )
    toy.language_model = GemmaForCausalLM(config).eval()
    _round_to_half(toy)
    own = {"model_type": "mgm_gemma", "intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 12}
    own |= {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
    (toy.folder / "config.json").write_text(json.dumps(toy.config(**own)), encoding="utf-8")
    tensors = {key: tensor.bfloat16() for key, tensor in toy.tensors(towers=True).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, toy.folder / "model.safetensors")
    report = convert(toy.folder, tmp_path / "out", encoder_configs=_heads(toy.folder))
    assert report.template == "mini_gemini_gemma"
    turn = f"<start_of_turn>user\n<image>\n{toys.QUESTION}<end_of_turn>\n<start_of_turn>model\n"
    # Transformers 4, on which it was trained, multiplies whatever enters Gemma; transformers 5 embeddings alone.
    _check(toy, tmp_path / "out", prompt=turn, factor=toys.WIDTH**0.5)


def test_a_tower_whose_heads_nothing_tells_asks_for_them(tmp_path: Path) -> None:
    source = MiniGeminiToy(tmp_path / "mgm").write()
    with pytest.raises(CheckpointError, match=r"number of heads, which no tensor tells. Pass --encoder-config"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fields_of_no_encoder_are_refused(tmp_path: Path) -> None:
    source, file = MiniGeminiToy(tmp_path / "mgm").write(), tmp_path / "encoders.json"
    file.write_text('{"num_attention_heads": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"one object an encoder, such as .*, or a list of them"):
        convert(source, tmp_path / "out", encoder_configs=file)
    file.write_text('[{"num_attention_heads": 3}, {}, {}]', encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r'--encoder-config has "2"; the encoders of this checkpoint are clip, con'
    ):
        convert(source, tmp_path / "out", encoder_configs=file)


def test_tiles_without_the_whole_image_are_refused(tmp_path: Path) -> None:
    source = MiniGeminiToy(tmp_path / "mgm", image_grid=2).write(image_global=False)
    with pytest.raises(CheckpointError, match=r"config\.json has image_global False"):
        convert(source, tmp_path / "out", encoder_configs=_heads(source))


@pytest.mark.parametrize("image_grid", [1, 2])
def test_mini_gemini_7b_at_its_true_size_needs_no_configuration_of_its_towers(tmp_path: Path, image_grid: int) -> None:
    config = {
        **sizes.VICUNA_7B,
        "model_type": "mgm",
        "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
        "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
        "mm_projector_type": "mlp2x_gelu",
        "image_size_aux": 768 * image_grid,
        "image_grid": image_grid,
        "image_global": image_grid > 1,
        "image_aspect_ratio": "pad",
        "mm_use_im_patch_token": False,
    }
    stored = sizes.llama_shapes(sizes.VICUNA_7B)
    stored |= {"model.mm_projector.0.weight": (4096, 1024), "model.mm_projector.0.bias": (4096,)}
    stored |= {"model.mm_projector.2.weight": (4096, 4096), "model.mm_projector.2.bias": (4096,)}
    for part, channels in (("query", 1024), ("aux", 2880), ("val", 2880)):
        own = f"model.vlm_uni_{part}_projector."
        stored |= {own + "0.weight": (channels,), own + "0.bias": (channels,)}
        stored |= {own + "1.weight": (1024, channels), own + "1.bias": (1024,)}
    with torch.device("meta"):
        clip = sizes.clip_l14_336()
        convnext = ConvNeXt(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536), num_classes=0)
    for key, shape in sizes.shapes_under("", clip).items():
        stored["model.vision_tower.vision_tower.vision_model." + key.removeprefix("vision_model.")] = shape
    for key, shape in sizes.shapes_under("vision_", convnext).items():
        if key.startswith(("vision_stem.", "vision_stages.")):
            stored["model.vision_tower_aux." + key] = shape
    plan, _ = sizes.resolve(mini_gemini.SYSTEM, config, stored, tmp_path)
    assert [(entry.row, entry.image_size, dict(entry.architecture)) for entry in plan.encoders] == [
        ("clip-l14-336", 336, {}),
        ("convnext-l-768-stages", 768 * image_grid, {}),
    ]
    assert plan.fusion.grid == 24
