"""Every row at its true size, on the meta device: parameters, keys, grid and channels are what is published."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from manyeyes.encoders import ENCODERS, BlockEncoder, build_encoder
from manyeyes.encoders.encoder import Encoder


@functools.cache
def true_size(name: str) -> Encoder:
    with torch.device("meta"):
        return build_encoder(name)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def published(build: str) -> int:
    """Parameters of another implementation at its true size, without the parts that no encoder here takes."""
    with torch.device("meta"):
        if build == "siglip-l16":
            config = SiglipVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=16,
                image_size=384, vision_use_head=False,
            )  # fmt: skip
            return count(SiglipVisionModel(config))
        if build == "siglip-so400m14":
            config = SiglipVisionConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
                image_size=384, vision_use_head=False,
            )  # fmt: skip
            return count(SiglipVisionModel(config))
        if build == "dinov2-l14":
            config = Dinov2Config(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518
            )
            return count(Dinov2Model(config))
        if build == "dinov2-g14":
            config = Dinov2Config(
                hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, patch_size=14, image_size=518,
                use_swiglu_ffn=True,
            )  # fmt: skip
            return count(Dinov2Model(config))
        if build == "pix2struct":
            return count(Pix2StructVisionModel(Pix2StructVisionConfig(
                hidden_size=1536, d_ff=3968, num_hidden_layers=18, num_attention_heads=24
            )))  # fmt: skip
        return count(timm.create_model(build, num_classes=0))


# A grid of positions more or less than published: cells times width.
_DETECTOR_POSITIONS = (64 * 64 - 197) * 1024
_CLIP_BLOCK = 12 * 1024**2 + 13 * 1024

# Numbers from papers, model cards or another implementation; what a row leaves out is subtracted.
FACTS: dict[str, float] = {
    "clip-l14-336-eagle": 303e6,
    "clip-l14-336": 303e6 - _CLIP_BLOCK,
    "clip-l14-224": 303e6 - _CLIP_BLOCK,
    "clip-l14-448": 303e6 - _CLIP_BLOCK,
    "clip-l14-448-eagle": 303e6,
    "convnext-xxl-1024": 843e6,
    "convnext-xxl-1024-stages": 843e6,
    "eva02-l16-det-1024": 304e6 + _DETECTOR_POSITIONS,
    "sam-l16-1024-eagle": 307e6,
    "sam-l16-1024": 308.3e6,
    "sam-h16-1024": 637e6,
    "sam-h16-1024-eagle": 637e6,
    "pix2struct-l16-1024": 513e6,
    "dinov2-l14-518": 304.4e6,
    "dinov2-g14-518": 1136.5e6,
    # U-Net without its last norm and convolution, encoding half of the autoencoder.
    "stable-diffusion-v21-512": 865_910_724 - 640 - 11_524 + 34_163_664,
}
OTHERS: dict[str, str] = {
    "siglip-l16-384": "siglip-l16",
    "siglip-so400m14-384": "siglip-so400m14",
    "dinov2-l14-336": "dinov2-l14",
    "dinov2-l14-378": "dinov2-l14",
    "dinov2-l14-518": "dinov2-l14",
    "dinov2-g14-336": "dinov2-g14",
    "dinov2-g14-378": "dinov2-g14",
    "dinov2-g14-518": "dinov2-g14",
    "pix2struct-l16-1024": "pix2struct",
    "eva02-l14-336": "eva02_large_patch14_clip_336",
    "dfn-clip-l14-224": "vit_large_patch14_clip_224",
    "dfn-clip-h14-378": "vit_huge_patch14_clip_378",
    "mae-l16-224": "vit_large_patch16_224",
    "mae-h14-224": "vit_huge_patch14_224",
    "ijepa-h14-224": "vit_huge_patch14_gap_224",
    "moco-v3-b16-224": "vit_base_patch16_224",
    "moco-v3-l16-224": "vit_large_patch16_224",
    "midas-v3-l16-384": "vit_large_patch16_384",
    "midas-v31-beit-l16-512": "beit_large_patch16_512",
    "vit-l16-224-in21k": "vit_large_patch16_224",
    "vit-h14-224-in21k": "vit_huge_patch14_224",
    "convnext-l-512": "convnext_large",
    "convnext-l-768": "convnext_large",
    "convnext-l-1024": "convnext_large",
    "convnext-l-1536": "convnext_large",
    "convnext-l-768-stages": "convnext_large",
    "convnext-l-1536-stages": "convnext_large",
    "convnext-xxl-1024": "convnext_xxlarge",
    "sam-l16-1024": "samvit_large_patch16",
    "sam-h16-1024": "samvit_huge_patch16",
}

# Channels and side of the feature map, as the published models feed them on.
MAPS: dict[str, tuple[int, int]] = {
    "vit-tiny-p16-64": (128, 4),
    "efficientnet-lite0": (112, 14),
    "clip-l14-224": (1024, 16),
    "clip-l14-336": (1024, 24),
    "clip-l14-448": (1024, 32),
    "clip-l14-336-eagle": (1024, 24),
    "clip-l14-448-eagle": (1024, 32),
    "siglip-l16-384": (1024, 24),
    "siglip-so400m14-384": (1152, 27),
    "dinov2-l14-336": (1024, 24),
    "dinov2-l14-378": (1024, 27),
    "dinov2-l14-518": (1024, 37),
    "dinov2-g14-336": (1536, 24),
    "dinov2-g14-378": (1536, 27),
    "dinov2-g14-518": (1536, 37),
    "convnext-l-512": (1536, 16),
    "convnext-l-768": (1536, 24),
    "convnext-l-1024": (1536, 32),
    "convnext-l-1536": (1536, 48),
    "convnext-l-768-stages": (2880, 192),
    "convnext-l-1536-stages": (2880, 384),
    "convnext-xxl-1024": (3072, 32),
    "convnext-xxl-1024-stages": (5760, 96),
    "eva02-l14-336": (1024, 24),
    "eva02-l16-det-1024": (1024, 64),
    "sam-l16-1024": (256, 64),
    "sam-h16-1024": (256, 64),
    "sam-l16-1024-eagle": (1024, 32),
    "sam-h16-1024-eagle": (1024, 32),
    "pix2struct-l16-1024": (1536, 45),
    "vit-l16-224-in21k": (1024, 14),
    "vit-h14-224-in21k": (1280, 16),
    "dfn-clip-l14-224": (1024, 16),
    "dfn-clip-h14-378": (1280, 27),
    "mae-l16-224": (1024, 14),
    "mae-h14-224": (1280, 16),
    "ijepa-h14-224": (1280, 16),
    "moco-v3-b16-224": (768, 14),
    "moco-v3-l16-224": (1024, 14),
    "midas-v3-l16-384": (1024, 24),
    "midas-v31-beit-l16-512": (1024, 32),
    "stable-diffusion-v21-512": (3520, 32),
}

# A few keys of ``Encoder.net`` that published checkpoints of this family (Eagle's for the last three) have as well.
KEYS: dict[str, dict[str, tuple[int, ...]]] = {
    "clip-l14-336": {"pos_embed": (1, 577, 1024), "norm_pre.weight": (1024,), "blocks.22.mlp.fc1.weight": (4096, 1024)},
    "siglip-so400m14-384": {"pos_embed": (1, 729, 1152), "blocks.26.mlp.fc1.weight": (4304, 1152)},
    "dinov2-g14-378": {"pos_embed": (1, 730, 1536), "blocks.39.mlp.fc1.weight": (8192, 1536)},
    "convnext-xxl-1024": {"stem.0.weight": (384, 3, 4, 4), "stages.3.blocks.2.gamma": (3072,)},
    "eva02-l14-336": {"pos_embed": (1, 577, 1024), "blocks.23.mlp.fc1_g.weight": (2730, 1024)},
    "eva02-l16-det-1024": {
        "patch_embed.proj.weight": (1024, 3, 16, 16),
        "blocks.23.attn.q_bias": (1024,),
        "blocks.23.attn.k_proj.weight": (1024, 1024),
        "blocks.23.mlp.ffn_ln.weight": (2730,),
        "blocks.23.mlp.w3.weight": (1024, 2730),
    },
    "sam-l16-1024-eagle": {
        "neck.conv1.weight": (256, 1024, 1, 1),
        "neck.layer_norm1.bias": (256,),
        "layers.5.attn.rel_pos_h": (127, 64),
        "layers.4.attn.rel_pos_h": (27, 64),
    },
    "stable-diffusion-v21-512": {
        "prompt": (1, 77, 1024),
        "unet.time_embedding.linear_1.weight": (1280, 320),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "unet.up_blocks.2.upsamplers.0.conv.weight": (640, 640, 3, 3),
        "vae.encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "vae.quant_conv.weight": (8, 8, 1, 1),
    },
    "pix2struct-l16-1024": {
        "embeddings.row_embedder.weight": (4096, 1536),
        "encoder.layer.17.mlp.wi_0.weight": (3968, 1536),
        "layernorm.weight": (1536,),
    },
}


def test_every_row_is_checked_against_something_published() -> None:
    own = {"vit-tiny-p16-64", "efficientnet-lite0"}  # no publisher; and its published tensors are in a unit test
    assert set(ENCODERS) - own == set(FACTS) | set(OTHERS)
    assert set(ENCODERS) == set(MAPS)


@pytest.mark.parametrize("name", ENCODERS)
def test_row_says_how_many_parameters_there_are(name: str) -> None:
    assert count(true_size(name)) == ENCODERS[name].parameters


@pytest.mark.parametrize("name", FACTS)
def test_parameters_are_those_of_the_facts(name: str) -> None:
    assert count(true_size(name)) == pytest.approx(FACTS[name], rel=0.005)


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_are_those_of_another_implementation(name: str) -> None:
    assert count(true_size(name)) == pytest.approx(published(OTHERS[name]), rel=0.005)


@pytest.mark.parametrize("name", MAPS)
def test_feature_map_is_what_published_models_feed_on(name: str) -> None:
    encoder, row = true_size(name), ENCODERS[name]
    assert (encoder.channels, encoder.grid) == MAPS[name]
    assert (encoder.channels, encoder.stride, encoder.image_size) == (row.channels, row.stride, row.image_size)


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes_are_published_ones(name: str) -> None:
    state = true_size(name).net.state_dict()
    assert {key: tuple(state[key].shape) for key in KEYS[name]} == KEYS[name]


def test_eagles_clip_has_no_class_token_and_every_block() -> None:
    plain, eagle = true_size("clip-l14-336"), true_size("clip-l14-336-eagle")
    assert isinstance(plain, BlockEncoder)
    assert isinstance(eagle, BlockEncoder)
    assert (plain.num_blocks, plain.num_prefix_tokens) == (23, 1)
    assert (eagle.num_blocks, eagle.num_prefix_tokens) == (24, 0)


@pytest.mark.parametrize("name", ENCODERS)
def test_row_is_complete(name: str) -> None:
    row = ENCODERS[name]
    assert row.source.partition(":")[0] in {"hub", "package", "scratch"}
    assert row.source.startswith(("package:", "scratch:")) or "@" in row.source
    assert row.licence
    assert row.pretraining
    assert row.paper.startswith("arXiv:")
    assert row.files
    if row.source.startswith("hub:"):
        assert row.features
        assert row.image_sizes
