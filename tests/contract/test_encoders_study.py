"""The rest of Cambrian-1's 23 encoders: publishers' formats and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BeitConfig, DPTConfig, DPTForDepthEstimation, IJepaConfig, IJepaModel

from manyeyes.encoders import build_encoder, load_encoder_weights
from manyeyes.encoders.encoder import Encoder

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)


def loaded(name: str, path: Path) -> Encoder:
    encoder = build_encoder(name, small=True).eval()
    load_encoder_weights(encoder, name, path)
    return encoder


def as_map(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize("name", ["dfn-clip-l14-224", "dfn-clip-h14-378"])
@torch.no_grad()
def test_dfn_clip_loads_open_clips_own_layout(name: str, tmp_path: Path) -> None:
    width = 32
    tensors = {
        "visual.class_embedding": torch.randn(width),
        "visual.positional_embedding": torch.randn(17, width) * 0.1,
        "visual.conv1.weight": torch.randn(width, 3, 14, 14) * 0.05,
        "visual.proj": torch.randn(width, 8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(5),
        "positional_embedding": torch.zeros(5, 5),
    }
    norms, blocks = {part: nn.LayerNorm(width) for part in ("ln_pre", "ln_post")}, []
    for index in range(2):
        block = nn.ModuleDict(
            {
                "ln_1": nn.LayerNorm(width),
                "attn": nn.MultiheadAttention(width, 2, batch_first=True),
                "ln_2": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}),
            }
        )
        randomise(block)
        blocks.append(block)
        tensors |= {f"visual.transformer.resblocks.{index}.{key}": value for key, value in block.state_dict().items()}
    for part, norm in norms.items():
        randomise(norm)
        tensors |= {f"visual.{part}.{key}": value for key, value in norm.state_dict().items()}
    torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")

    pixels = torch.randn(2, 3, 56, 56)
    patches = functional.conv2d(pixels, tensors["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    token = tensors["visual.class_embedding"].expand(2, 1, width)
    hidden = norms["ln_pre"](torch.cat([token, patches], dim=1) + tensors["visual.positional_embedding"])
    for block in blocks:
        normed = block["ln_1"](hidden)
        hidden = hidden + block["attn"](normed, normed, normed, need_weights=False)[0]
        inner = block["mlp"]["c_fc"](block["ln_2"](hidden))
        hidden = hidden + block["mlp"]["c_proj"](inner * torch.sigmoid(1.702 * inner))
    expected = as_map(norms["ln_post"](hidden)[:, 1:])
    torch.testing.assert_close(loaded(name, tmp_path)(pixels), expected, **TOLERANCE)


def vit(**kwargs: object) -> VisionTransformer:
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, **kwargs).eval()
    randomise(model)
    return model


@torch.no_grad()
def test_mae_loads_a_pretraining_file_without_its_decoder(tmp_path: Path) -> None:
    model = vit(num_classes=0)
    tensors = {**model.state_dict(), "mask_token": torch.zeros(1), "decoder_blocks.0.norm1.weight": torch.zeros(2)}
    file = tmp_path / "mae_pretrain_vit_large.pth"
    torch.save({"model": tensors, "epoch": 800}, file)
    pixels = torch.randn(2, 3, 64, 64)
    expected = as_map(model.forward_features(pixels)[:, 1:])
    torch.testing.assert_close(loaded("mae-l16-224", file)(pixels), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["moco-v3-b16-224", "moco-v3-l16-224"])
@torch.no_grad()
def test_moco_takes_the_base_encoder_of_a_training_file(name: str, tmp_path: Path) -> None:
    model, momentum = vit(num_classes=3), vit(num_classes=3)
    tensors = {f"module.base_encoder.{key}": tensor for key, tensor in model.state_dict().items()}
    tensors |= {f"module.momentum_encoder.{key}": tensor for key, tensor in momentum.state_dict().items()}
    tensors["module.predictor.0.weight"] = torch.zeros(2)
    torch.save({"state_dict": tensors, "epoch": 300}, tmp_path / "vit.pth")
    pixels = torch.randn(2, 3, 64, 64)
    expected = as_map(model.forward_features(pixels)[:, 1:])
    torch.testing.assert_close(loaded(name, tmp_path / "vit.pth")(pixels), expected, **TOLERANCE)


@torch.no_grad()
def test_ijepa_is_transformers(tmp_path: Path) -> None:
    config = IJepaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=56, patch_size=14,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    model = IJepaModel(config, add_pooling_layer=False).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    expected = as_map(model(pixels).last_hidden_state)
    torch.testing.assert_close(loaded("ijepa-h14-224", tmp_path)(pixels), expected, **TOLERANCE)


_DEPTH_HEAD = {"neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8, "reassemble_factors": [1, 1]}


@torch.no_grad()
def test_midas_3_0_is_dpts_encoder(tmp_path: Path) -> None:
    config = DPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1], **_DEPTH_HEAD,
    )  # fmt: skip
    model = DPTForDepthEstimation(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    expected = as_map(model.dpt(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(loaded("midas-v3-l16-384", tmp_path)(pixels), expected, **TOLERANCE)


@torch.no_grad()
def test_midas_3_1_is_dpts_beit(tmp_path: Path) -> None:
    backbone = BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64, patch_size=16,
        use_relative_position_bias=True, use_absolute_position_embeddings=False, layer_scale_init_value=0.1,
        out_features=["stage1", "stage2"], reshape_hidden_states=False,
    )  # fmt: skip
    model = DPTForDepthEstimation(DPTConfig(backbone_config=backbone.to_dict(), hidden_size=32, **_DEPTH_HEAD)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    expected = as_map(model.backbone(pixels).feature_maps[-1][:, 1:])
    torch.testing.assert_close(loaded("midas-v31-beit-l16-512", tmp_path)(pixels), expected, **TOLERANCE)
