"""Stable-Diffusion features: diffusers' own networks give them, and its folders load."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from manyeyes.encoders import ENCODERS, build_encoder, load_encoder_weights
from manyeyes.encoders.stable_diffusion import StableDiffusionEncoder
from manyeyes.errors import SourceError

NAME = "stable-diffusion-v21-512"


def write_published(folder: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The three networks as diffusers saves them, at the sizes of the row's small form."""
    plan = ENCODERS[NAME].small
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=plan["widths"],
        attention_head_dim=plan["heads"],
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        use_linear_projection=True,
    ).eval()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=plan["latent_widths"],
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
    )
    text = CLIPTextModel(config).eval()
    for module in (unet, vae, text):
        randomise(module)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    return unet, vae, text


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)


@torch.no_grad()
def published_features(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel, pixels: Tensor, noise: Tensor
) -> Tensor:
    """Cambrian-1's recipe with diffusers' own scheduler and forward pass."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents = vae.config.scaling_factor * vae.encode(pixels).latent_dist.mode()
    noised = scheduler.add_noise(latents, noise.expand_as(latents), torch.tensor([250]))
    empty = torch.tensor([[49406, 49407, *[0] * 75]])
    prompt = text(empty).last_hidden_state.expand(len(pixels), -1, -1)
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _block, _inputs, out: seen.append(out)) for block in unet.up_blocks]
    unet(noised, 250, encoder_hidden_states=prompt)
    for hook in hooks:
        hook.remove()
    maps = [functional.interpolate(out, size=(4, 4), mode="bilinear", align_corners=False) for out in seen]
    return torch.cat(maps, dim=1)


def loaded(path: Path) -> StableDiffusionEncoder:
    encoder = build_encoder(NAME, small=True).eval()
    load_encoder_weights(encoder, NAME, path)
    assert isinstance(encoder, StableDiffusionEncoder)
    return encoder


@torch.no_grad()
def test_features_are_those_of_diffusers_with_the_same_noise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet, vae, text = write_published(tmp_path)
    encoder = loaded(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    expected = published_features(unet, vae, text, pixels, encoder.noise.noise)
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autoencoder_with_old_names_of_attention_loads_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_published(tmp_path)
    expected = loaded(tmp_path)(torch.ones(1, 3, 64, 64))
    file = tmp_path / ENCODERS[NAME].parts["vae."]
    renamed = {}
    for key, tensor in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if "attentions" in key:
                key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    assert any("proj_attn" in key for key in renamed)
    save_file(renamed, file)
    assert torch.equal(loaded(tmp_path)(torch.ones(1, 3, 64, 64)), expected)


@torch.no_grad()
def test_trained_encoder_loads_without_a_text_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = build_encoder(NAME, small=True).eval()
    save_file({key: tensor.contiguous() for key, tensor in first.state_dict().items()}, tmp_path / "model.safetensors")
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(tmp_path)(pixels), first(pixels))


def test_folder_without_the_text_encoder_says_what_is_missing(tmp_path: Path) -> None:
    write_published(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"text_encoder/model\.safetensors is not there"):
        loaded(tmp_path)


def test_without_diffusers_the_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    with pytest.raises(SourceError, match="not installed") as caught:
        build_encoder(NAME, small=True)
    assert "manyeyes[drawing]" in caught.value.do
