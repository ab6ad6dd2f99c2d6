"""Each family loads its publisher's own format and computes what the publisher's network computes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Mlp
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from transformers.models.pix2struct.image_processing_pil_pix2struct import Pix2StructImageProcessorPil

from manyeyes.encoders import ENCODERS, build_encoder, load_encoder_weights
from manyeyes.encoders.encoder import Encoder

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> None:
    """Far from initial values, so that a forgotten norm or bias shows."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.3 if "norm" in name or "bias" in name or "ln" in name else 0.08
            parameter.copy_(
                torch.randn(parameter.shape) * spread + (1.0 if parameter.ndim == 1 and "norm" in name else 0)
            )


def loaded(name: str, path: Path, **kwargs: int) -> Encoder:
    encoder = build_encoder(name, small=True, **kwargs).eval()
    load_encoder_weights(encoder, name, path)
    return encoder


def as_map(tokens: Tensor, grid: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (grid, grid))


def clip_of(image_size: int) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, patch_size=14,
        image_size=image_size, hidden_act="quick_gelu",
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    config = CLIPModel.config_class(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = CLIPModel(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("name", ["clip-l14-224", "clip-l14-336", "clip-l14-448"])
@torch.no_grad()
def test_clip_is_llavas_last_block_but_one(name: str, tmp_path: Path) -> None:
    model = clip_of(56)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    torch.testing.assert_close(loaded(name, tmp_path)(pixels), as_map(hidden[-2][:, 1:], 4), **TOLERANCE)


@torch.no_grad()
def test_clip_takes_a_pickle_as_openai_publishes_it(tmp_path: Path) -> None:
    model = clip_of(56)
    model.save_pretrained(tmp_path / "hub")
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "hub" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    pixels = torch.randn(1, 3, 56, 56)
    first, second = loaded("clip-l14-336", tmp_path / "hub"), loaded("clip-l14-336", tmp_path)
    assert torch.equal(first(pixels), second(pixels))


@torch.no_grad()
def test_eagles_clip_runs_every_block_and_shows_the_patches_no_class_token(tmp_path: Path) -> None:
    model = clip_of(56)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    vision = model.vision_model
    patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    tokens = vision.pre_layrnorm(patches + vision.embeddings.position_embedding.weight[1:])
    for layer in vision.encoder.layers:
        tokens = layer(tokens, None)
    torch.testing.assert_close(loaded("clip-l14-336-eagle", tmp_path)(pixels), as_map(tokens, 4), **TOLERANCE)


@torch.no_grad()
def test_clip_positions_are_resampled_once_bicubic_with_antialiasing(tmp_path: Path) -> None:
    model = clip_of(84)
    model.save_pretrained(tmp_path)
    encoder = loaded("clip-l14-448", tmp_path)
    published = model.vision_model.embeddings.position_embedding.weight
    square = published[1:].T.reshape(1, 32, 6, 6)
    expected = functional.interpolate(square, size=(4, 4), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(encoder.net.pos_embed[0, 1:], expected)
    assert torch.equal(encoder.net.pos_embed[0, 0], published[0])


@torch.no_grad()
def test_siglip_is_transformers_with_exact_gelu(tmp_path: Path) -> None:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=16,
        image_size=64, hidden_act="gelu",
    )  # fmt: skip
    text = SiglipTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        projection_size=32,
    )
    config = SiglipModel.config_class(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = SiglipModel(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    expected = model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(loaded("siglip-l16-384", tmp_path)(pixels), as_map(expected, 4), **TOLERANCE)


@torch.no_grad()
def test_siglip_so400m_loads_open_clips_layout_and_leaves_ragged_pixels_out(tmp_path: Path) -> None:
    trunk = VisionTransformer(
        img_size=60, patch_size=14, embed_dim=32, depth=2, num_heads=2, mlp_ratio=3.7362, class_token=False,
        global_pool="map", num_classes=0,
    ).eval()  # fmt: skip
    randomise(trunk)
    tensors = {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    tensors["text.token_embedding.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    pixels = torch.randn(2, 3, 60, 60)
    features = loaded("siglip-so400m14-384", tmp_path)(pixels)
    torch.testing.assert_close(features, as_map(trunk.forward_features(pixels), 4), **TOLERANCE)
    changed = pixels.clone()
    changed[:, :, 56:, 56:] = 9
    assert torch.equal(features, loaded("siglip-so400m14-384", tmp_path)(changed))


@pytest.mark.parametrize(("name", "width", "swiglu"), [("dinov2-l14-518", 32, False), ("dinov2-g14-378", 48, True)])
@torch.no_grad()
def test_dinov2_is_transformers(name: str, width: int, swiglu: bool, tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56, mlp_ratio=4,
        use_swiglu_ffn=swiglu,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    expected = model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(loaded(name, tmp_path)(pixels), as_map(expected, 4), **TOLERANCE)


@torch.no_grad()
def test_dinov2_loads_the_fused_names_that_the_hub_keeps(tmp_path: Path) -> None:
    first = build_encoder("dinov2-g14-518", small=True).eval()
    randomise(first)
    net, hub = first.net, {}
    hub["embeddings.cls_token"] = net.cls_token
    hub["embeddings.mask_token"] = torch.zeros(1, 48)
    hub["embeddings.position_embeddings"] = net.pos_embed
    for kind in ("weight", "bias"):
        hub[f"embeddings.patch_embeddings.projection.{kind}"] = getattr(net.patch_embed.proj, kind)
        hub[f"layernorm.{kind}"] = getattr(net.norm, kind)
        for index, block in enumerate(net.blocks):
            stem = f"encoder.layer.{index}"
            parts = getattr(block.attn.qkv, kind).chunk(3)
            for part, tensor in zip(("query", "key", "value"), parts, strict=True):
                hub[f"{stem}.attention.attention.{part}.{kind}"] = tensor
            hub[f"{stem}.attention.output.dense.{kind}"] = getattr(block.attn.proj, kind)
            hub[f"{stem}.mlp.weights_in.{kind}"] = getattr(block.mlp.fc1, kind)
            hub[f"{stem}.mlp.weights_out.{kind}"] = getattr(block.mlp.fc2, kind)
            for part in (1, 2):
                hub[f"{stem}.norm{part}.{kind}"] = getattr(getattr(block, f"norm{part}"), kind)
                hub[f"{stem}.layer_scale{part}.lambda1"] = getattr(block, f"ls{part}").gamma
    save_file({key: tensor.detach().clone() for key, tensor in hub.items()}, tmp_path / "model.safetensors")
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(loaded("dinov2-g14-518", tmp_path)(pixels), first(pixels))


@torch.no_grad()
def test_dinov2_positions_are_resampled_with_its_own_offset(tmp_path: Path) -> None:
    published = build_encoder("dinov2-l14-518", small=True, image_size=98)
    save_file(dict(published.net.state_dict()), tmp_path / "model.safetensors")
    square = published.net.pos_embed[0, 1:].T.reshape(1, 32, 7, 7)
    scale = 4.1 / 7
    expected = functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic").flatten(2)[0].T
    found = loaded("dinov2-l14-378", tmp_path).net.pos_embed[0, 1:]
    torch.testing.assert_close(found, expected)
    plain = functional.interpolate(square, size=(4, 4), mode="bicubic").flatten(2)[0].T
    assert (found - plain).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["convnext-l-768", "convnext-xxl-1024"])
@torch.no_grad()
def test_convnext_loads_open_clips_layout(name: str, tmp_path: Path) -> None:
    epsilon = ENCODERS[name].architecture["epsilon"]
    trunk = ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), norm_eps=epsilon, num_classes=5).eval()
    randomise(trunk)
    tensors = {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    tensors["logit_scale"] = torch.ones(())
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(name, tmp_path)(pixels), trunk.forward_features(pixels), **TOLERANCE)
    stages = trunk.forward_intermediates(pixels, indices=4, norm=False, intermediates_only=True)
    grid = 6 if "xxl" in name else 16
    resampled = [functional.interpolate(stage, size=(grid, grid), mode="bilinear") for stage in stages]
    everything = loaded(f"{name}-stages", tmp_path)(pixels)
    torch.testing.assert_close(everything, torch.cat(resampled, dim=1), **TOLERANCE)


@torch.no_grad()
def test_convnext_loads_eagles_and_mini_geminis_names(tmp_path: Path) -> None:
    first = build_encoder("convnext-l-768", small=True).eval()
    state = first.net.state_dict()
    eagle = {
        (key.removesuffix("gamma") + "weight" if key.endswith(".gamma") else key): tensor
        for key, tensor in state.items()
    }
    eagle["head.norm.weight"] = torch.ones(3)
    gemini = {f"model.vision_tower_aux.vision_{key}": tensor for key, tensor in state.items()}
    pixels = torch.randn(1, 3, 64, 64)
    for folder, tensors in (("eagle", eagle), ("gemini", gemini)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        assert torch.equal(loaded("convnext-l-768", tmp_path / folder)(pixels), first(pixels)), folder


@torch.no_grad()
def test_eva02_is_timm_in_open_clips_layout(tmp_path: Path) -> None:
    trunk = Eva(
        img_size=56, patch_size=14, embed_dim=48, depth=2, num_heads=2, mlp_ratio=4 * 2 / 3, qkv_fused=False,
        swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16),
        global_pool="token", num_classes=7,
    ).eval()  # fmt: skip
    randomise(trunk)
    save_file(
        {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    pixels = torch.randn(2, 3, 56, 56)
    expected = as_map(trunk.forward_features(pixels)[:, 1:], 4)
    torch.testing.assert_close(loaded("eva02-l14-336", tmp_path)(pixels), expected, **TOLERANCE)


def timm_detector_block(state: dict[str, Tensor], index: int) -> EvaBlock:
    block = EvaBlock(
        dim=48, num_heads=2, qkv_bias=True, qkv_fused=False, mlp_ratio=128 / 48, swiglu_mlp=True, scale_mlp=True,
        scale_attn_inner=False, num_prefix_tokens=0, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    names = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.ffn_ln": "mlp.norm", "mlp.w3": "mlp.fc2"}
    names |= {"attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias"}
    converted = {}
    for key, tensor in state.items():
        if key.startswith(f"blocks.{index}."):
            key = key.removeprefix(f"blocks.{index}.")
            for old, new in names.items():
                key = key.replace(old, new)
            converted[key] = tensor
    block.load_state_dict(converted)
    return block


@torch.no_grad()
def test_detector_is_timms_eva_block_in_windows(tmp_path: Path) -> None:
    """Neither library has the network; timm has its block and its rotary positions; windows are cut here by hand."""
    name, grid, window = "eva02-l16-det-1024", 4, 3
    source = build_encoder(name, small=True).eval()
    randomise(source)
    state = {key: tensor.clone() for key, tensor in source.net.state_dict().items()}
    # As published: positions of a class token and of 14 x 14 patches, under a detector's names, with rotary tables.
    positions = torch.randn(1, 197, 48) * 0.1
    published = {f"backbone.net.{key}": tensor for key, tensor in state.items()}
    published["backbone.net.pos_embed"] = positions
    published["backbone.net.rope_glb.freqs_cos"] = torch.zeros(4, 4)
    published["backbone.net.blocks.0.attn.rope.freqs_sin"] = torch.zeros(4, 4)
    published["backbone.simfp_2.0.weight"] = torch.zeros(4, 4)
    published["proposal_generator.weight"] = torch.zeros(4, 4)
    (tmp_path / "eva02/det").mkdir(parents=True)
    torch.save({"ema_state": published, "iteration": 3}, tmp_path / "eva02/det/eva02_L_coco_det_sys_o365.pth")
    pixels = torch.randn(2, 3, 64, 64)
    found = loaded(name, tmp_path)(pixels)

    square = positions[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    square = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = (functional.conv2d(pixels, weight, bias, stride=16) + square).permute(0, 2, 3, 1)
    for index in range(3):
        block = timm_detector_block(state, index)
        side = grid if index == 2 else window
        rope = RotaryEmbeddingCat(
            24, in_pixels=False, feat_shape=[side, side], ref_feat_shape=[16, 16], temperature=10_000.0
        ).get_embed()
        normed = block.norm1(tokens)
        padded = torch.zeros(2, 6, 6, 48)
        padded[:, :grid, :grid] = normed
        attended = torch.zeros(2, 6, 6, 48)
        for top in range(0, grid, side):
            for left in range(0, grid, side):
                cut = padded[:, top : top + side, left : left + side].reshape(2, side * side, 48)
                out = block.attn(cut, rope=rope).reshape(2, side, side, 48)
                attended[:, top : top + side, left : left + side] = out
        tokens = tokens + attended[:, :grid, :grid]
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(found, tokens.permute(0, 3, 1, 2), **TOLERANCE)


def sam_of(image_size: int) -> SamModel:
    vision = SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=16, window_size=3,
        global_attn_indexes=[1], output_channels=256,
    )  # fmt: skip
    model = SamModel(SamConfig(vision_config=vision.to_dict())).eval()
    randomise(model.vision_encoder)
    return model


@pytest.mark.parametrize("name", ["sam-l16-1024", "sam-h16-1024"])
@torch.no_grad()
def test_sam_is_transformers(name: str, tmp_path: Path) -> None:
    model = sam_of(64)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    expected = model.vision_encoder(pixels).last_hidden_state
    torch.testing.assert_close(loaded(name, tmp_path)(pixels), expected, **TOLERANCE)


@torch.no_grad()
def test_eagles_sam_keeps_its_seeded_neck_and_folds_cells(tmp_path: Path) -> None:
    model = sam_of(64)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    first = loaded("sam-l16-1024-eagle", tmp_path)
    torch.manual_seed(2)
    second = loaded("sam-l16-1024-eagle", tmp_path)
    assert torch.equal(first(pixels), second(pixels))
    encoder = model.vision_encoder
    tokens = encoder.patch_embed(pixels) + encoder.pos_embed
    for layer in encoder.layers:
        tokens = layer(tokens)
    narrow = tokens @ first.net.neck.conv1.weight[:, :, 0, 0].T
    centred = narrow - narrow.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = torch.nn.PixelUnshuffle(2)(normed.permute(0, 3, 1, 2))
    torch.testing.assert_close(first(pixels), expected, **TOLERANCE)
    # A trained neck is loaded as saved.
    first.net.neck.conv1.weight.mul_(2)
    save_file(dict(first.state_dict()), tmp_path / "trained.safetensors")
    load_encoder_weights(second, "sam-l16-1024-eagle", tmp_path / "trained.safetensors")
    assert torch.equal(first.net.neck.conv1.weight, second.net.neck.conv1.weight)


@torch.no_grad()
def test_sam_relative_positions_follow_the_image_size(tmp_path: Path) -> None:
    sam_of(96).save_pretrained(tmp_path)
    encoder = loaded("sam-l16-1024", tmp_path)
    assert encoder.net.layers[1].attn.rel_pos_h.shape == (7, 16)
    assert encoder.net.layers[0].attn.rel_pos_h.shape == (5, 16)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 256, 4, 4)


@torch.no_grad()
def test_pix2struct_is_the_published_processor_and_network_from_the_same_image(tmp_path: Path) -> None:
    config = Pix2StructVisionConfig(
        hidden_size=32, patch_embed_hidden_size=768, d_ff=48, d_kv=16, num_hidden_layers=2, num_attention_heads=2,
        seq_len=8, dropout_rate=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = Pix2StructVisionModel(config).eval()
    randomise(model)
    tensors = {f"encoder.{key}": tensor for key, tensor in model.state_dict().items()}
    tensors["decoder.embed_tokens.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    processor = Pix2StructImageProcessorPil(max_patches=18, patch_size={"height": 16, "width": 16}, is_vqa=False)
    batch = processor(image, return_tensors="pt")
    assert batch["flattened_patches"].shape == (1, 18, 770)
    published = model(flattened_patches=batch["flattened_patches"], attention_mask=batch["attention_mask"])
    expected = as_map(published.last_hidden_state[:, :16], 4)

    row = ENCODERS["pix2struct-l16-1024"]
    pixels = torch.from_numpy(image).float() / 255
    pixels = ((pixels - torch.tensor(row.mean)) / torch.tensor(row.std)).permute(2, 0, 1)[None]
    encoder = loaded("pix2struct-l16-1024", tmp_path)
    patches = batch["flattened_patches"][:, :16, 2:]
    torch.testing.assert_close(encoder.reader(pixels), patches, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encoder(pixels), expected, rtol=2e-3, atol=2e-3)


def test_pix2struct_of_an_empty_image_is_finite() -> None:
    encoder = build_encoder("pix2struct-l16-1024", small=True).eval()
    assert torch.isfinite(encoder(torch.zeros(1, 3, 72, 72))).all()


@pytest.mark.parametrize(("name", "patch"), [("vit-l16-224-in21k", 16), ("vit-h14-224-in21k", 14)])
@torch.no_grad()
def test_supervised_is_timm_without_its_classifier(name: str, patch: int, tmp_path: Path) -> None:
    size = 4 * patch
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=32, depth=2, num_heads=2, num_classes=11, mlp_layer=Mlp
    ).eval()
    randomise(model)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    pixels = torch.randn(2, 3, size, size)
    expected = as_map(model.forward_features(pixels)[:, 1:], 4)
    torch.testing.assert_close(loaded(name, tmp_path)(pixels), expected, **TOLERANCE)
