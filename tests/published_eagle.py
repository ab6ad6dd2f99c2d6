"""Eagle: small checkpoints in its layout, and its formulas, computed apart from our own code.

Transformers' Llama, CLIP, SAM and Pix2Struct and timm's ConvNeXt stand in for the experts that the published code takes
as they are; EVA-02, the changes to CLIP and SAM, resizing, concatenation, projector and splice are written out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor
from torch.nn import functional
from transformers import (
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    SamVisionConfig,
)
from transformers.models.pix2struct.image_processing_pil_pix2struct import Pix2StructImageProcessorPil
from transformers.models.sam.modeling_sam import SamVisionEncoder

from tests import published_sizes as sizes
from tests import published_toys as toys

CANVAS, GRID, CLIP_SIZE, PATCHES = 128, 4, 84, 30
X5 = ("clip-448", "convnext-1024", "sam-1024", "det-1024", "pix2struct-1024")
X4 = tuple(name for name in X5 if name != "sam-1024")
EVA_WIDTH, EVA_HEADS, EVA_DEPTH, EVA_WINDOW, EVA_GLOBAL, EVA_HIDDEN = 48, 2, 3, 3, (1,), 40
CHANNELS = {"clip-448": toys.TOWER_WIDTH, "convnext-1024": 24, "sam-1024": 32, "det-1024": 48, "pix2struct-1024": 32}
# What no tensor tells.
FACTS: dict[str, dict[str, Any]] = {
    "clip-448": {"num_attention_heads": 3},
    "convnext-1024": {"image_size": CANVAS, "norm_eps": 1e-5},
    "det-1024": {
        "num_heads": EVA_HEADS,
        "window_size": EVA_WINDOW,
        "window_block_indexes": [block for block in range(EVA_DEPTH) if block not in EVA_GLOBAL],
    },
    "pix2struct-1024": {"num_attention_heads": 2, "max_patches": PATCHES},
}


class EagleToy:
    """An Eagle: files and formulas.

    Args:
        folder: Where its files go.
        experts: Entries of ``mm_vision_tower``.
    """

    def __init__(self, folder: Path, experts: Sequence[str] = X5) -> None:
        self.folder, self.experts = folder, tuple(experts)
        self.vocab_size = toys.write_sentencepiece(folder)
        self.language_model = toys.make_llama(self.vocab_size)
        self.clip = toys.make_clip(size=CLIP_SIZE)
        torch.manual_seed(11)
        self.convnext = _shaken(ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), norm_eps=1e-5, num_classes=3))
        self.sam = _shaken(
            SamVisionEncoder(
                SamVisionConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=CANVAS,
                    patch_size=16,
                    window_size=3,
                    global_attn_indexes=[1],
                    mlp_dim=56,
                )
            )
        )
        self.sam.neck = torch.nn.Identity()
        self.sam_neck = {
            "neck.conv1.weight": 0.3 * torch.randn(8, 32, 1, 1),
            "neck.layer_norm1.weight": 1 + 0.3 * torch.randn(8),
            "neck.layer_norm1.bias": 0.3 * torch.randn(8),
        }
        self.eva = _make_eva()
        self.pix2struct = _shaken(
            Pix2StructVisionModel(
                Pix2StructVisionConfig(
                    hidden_size=32,
                    d_ff=48,
                    d_kv=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    seq_len=9,
                    patch_embed_hidden_size=768,
                )
            )
        )
        fused = sum(CHANNELS[name] for name in self.experts)
        self.projector = {
            "mm_projector.0.weight": 0.1 * torch.randn(toys.WIDTH, fused),
            "mm_projector.0.bias": torch.randn(toys.WIDTH),
            "mm_projector.2.weight": 0.3 * torch.randn(toys.WIDTH, toys.WIDTH),
            "mm_projector.2.bias": torch.randn(toys.WIDTH),
        }

    def config(self, **changes: Any) -> dict[str, Any]:
        """``config.json`` as the published checkpoints have it."""
        return {
            "architectures": ["EagleLlamaForCausalLM"],
            "model_type": "eagle_llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": toys.WIDTH,
            "intermediate_size": 56,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocab_size,
            "image_aspect_ratio": "pad",
            "mm_hidden_size": sum(CHANNELS[name] for name in self.experts),
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": ";".join(self.experts),
            "tokenizer_model_max_length": 2048,
            "torch_dtype": "float32",
            "use_mm_proj": True,
            **changes,
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the published keys."""
        tensors = {key: tensor.clone() for key, tensor in self.language_model.state_dict().items()}
        tensors |= {f"model.{key}": tensor for key, tensor in self.projector.items()}
        towers: dict[str, dict[str, Tensor]] = {
            "clip-448": toys.tower_keys(self.clip, ""),
            # transformers 4 renamed the layer scale while loading, and saved it so.
            "convnext-1024": {
                key.replace(".gamma", ".weight"): tensor for key, tensor in self.convnext.state_dict().items()
            },
            "sam-1024": {**self.sam.state_dict(), **self.sam_neck},
            "det-1024": self.eva,
            "pix2struct-1024": dict(self.pix2struct.state_dict()),
        }
        for place, name in enumerate(self.experts):
            prefix = f"model.vision_tower.vision_towers.{place}.vision_tower."
            tensors |= {prefix + key: tensor.clone() for key, tensor in towers[name].items()}
        return tensors

    def write(self, *, shards: int = 1, **changes: Any) -> Path:
        """Write config and weights beside the tokenizer."""
        (self.folder / "config.json").write_text(json.dumps(self.config(**changes)), encoding="utf-8")
        toys.write_weights(self.folder, self.tensors(), shards=shards, form="safetensors")
        return self.folder

    def write_facts(self, file: Path, *, without: str | None = None) -> Path:
        """A file for ``--encoder-config``."""
        facts = {name: values for name, values in FACTS.items() if name in self.experts and name != without}
        file.write_text(json.dumps(facts), encoding="utf-8")
        return file

    @torch.no_grad()
    def image_tokens(self, data: bytes) -> Tensor:
        """Image bytes to ``[N, width of the language model]``."""
        pixels = toys.pixels_of(data, size=CANVAS, aspect="pad")
        run = {
            "clip-448": self._clip,
            "convnext-1024": self._convnext,
            "sam-1024": self._sam,
            "det-1024": self._eva,
            "pix2struct-1024": self._pix2struct,
        }
        maps = [_aligned(run[name](pixels), GRID) for name in self.experts]
        tokens = torch.cat(maps, dim=1)[0].flatten(1).T
        hidden = functional.linear(
            tokens, self.projector["mm_projector.0.weight"], self.projector["mm_projector.0.bias"]
        )
        hidden = functional.gelu(hidden)
        return functional.linear(hidden, self.projector["mm_projector.2.weight"], self.projector["mm_projector.2.bias"])

    def _clip(self, pixels: Tensor) -> Tensor:
        # All blocks, the class token left out before the first norm, no norm behind.
        tower = getattr(self.clip, "vision_model", self.clip)
        tokens = tower.pre_layrnorm(tower.embeddings(_aligned(pixels, CLIP_SIZE))[:, 1:])
        for layer in tower.encoder.layers:
            tokens = layer(tokens, None)
        side = CLIP_SIZE // toys.PATCH
        return tokens.transpose(1, 2).reshape(1, -1, side, side)

    def _convnext(self, pixels: Tensor) -> Tensor:
        return self.convnext.stages(self.convnext.stem(pixels))

    def _sam(self, pixels: Tensor) -> Tensor:
        hidden = self.sam(pixels).last_hidden_state.permute(0, 3, 1, 2)
        hidden = functional.conv2d(hidden, self.sam_neck["neck.conv1.weight"])
        mean, variance = hidden.mean(1, keepdim=True), hidden.var(1, keepdim=True, unbiased=False)
        weight, bias = self.sam_neck["neck.layer_norm1.weight"], self.sam_neck["neck.layer_norm1.bias"]
        hidden = weight[:, None, None] * (hidden - mean) / torch.sqrt(variance + 1e-6) + bias[:, None, None]
        return functional.pixel_unshuffle(hidden, 2)

    def _eva(self, pixels: Tensor) -> Tensor:
        eva, grid = self.eva, CANVAS // 16
        tokens = functional.conv2d(pixels, eva["patch_embed.proj.weight"], eva["patch_embed.proj.bias"], stride=16)
        positions = eva["pos_embed"][:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        tokens = tokens + functional.interpolate(positions, size=(grid, grid), mode="bicubic", align_corners=False)
        tokens = tokens.permute(0, 2, 3, 1)
        for block in range(EVA_DEPTH):
            own = {key.removeprefix(f"blocks.{block}."): tensor for key, tensor in eva.items()}
            normed = _norm(tokens, own, "norm1")
            window = grid if block in EVA_GLOBAL else EVA_WINDOW
            tokens = tokens + _windowed(normed, own, window)
            normed = _norm(tokens, own, "norm2")
            gated = functional.silu(_linear(normed, own, "mlp.w1")) * _linear(normed, own, "mlp.w2")
            tokens = tokens + _linear(_norm(gated, own, "mlp.ffn_ln"), own, "mlp.w3")
        return tokens.permute(0, 3, 1, 2)

    def _pix2struct(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (toys.MEAN, toys.STD))
        image = ((pixels * std + mean) * 255)[0].permute(1, 2, 0).numpy()
        processor = Pix2StructImageProcessorPil(
            max_patches=PATCHES, patch_size={"height": 16, "width": 16}, is_vqa=False
        )
        inputs = processor(images=image, return_tensors="pt", input_data_format="channels_last")
        hidden = self.pix2struct(**inputs).last_hidden_state
        side = int(PATCHES**0.5)
        return hidden[:, : side * side].transpose(1, 2).reshape(1, -1, side, side)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], image: Tensor) -> np.ndarray:
        """``[T, V]`` of ids in which -200 stands for the image."""
        table = self.language_model.get_input_embeddings()
        rows = [image if token == -200 else table(torch.tensor([token])) for token in ids]
        return self.language_model(inputs_embeds=torch.cat(rows)[None]).logits[0].numpy()


def _shaken(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.data if parameter.ndim == 1 else 0)
    return module.eval()


def _make_eva() -> dict[str, Tensor]:
    width = EVA_WIDTH
    eva = {
        "patch_embed.proj.weight": 0.1 * torch.randn(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(width),
        "pos_embed": torch.randn(1, 1 + 14 * 14, width),
    }
    for block in range(EVA_DEPTH):
        matrices = {"attn.proj": (width, width), "mlp.w1": (EVA_HIDDEN, width), "mlp.w2": (EVA_HIDDEN, width)}
        matrices["mlp.w3"] = (width, EVA_HIDDEN)
        for name, size in matrices.items():
            eva[f"blocks.{block}.{name}.weight"] = 0.2 * torch.randn(size)
            eva[f"blocks.{block}.{name}.bias"] = 0.2 * torch.randn(size[0])
        for letter in "qkv":
            eva[f"blocks.{block}.attn.{letter}_proj.weight"] = 0.3 * torch.randn(width, width)
        for letter in "qv":
            eva[f"blocks.{block}.attn.{letter}_bias"] = 0.3 * torch.randn(width)
        for name, size in (("norm1", width), ("norm2", width), ("mlp.ffn_ln", EVA_HIDDEN)):
            eva[f"blocks.{block}.{name}.weight"] = 1 + 0.2 * torch.randn(size)
            eva[f"blocks.{block}.{name}.bias"] = 0.2 * torch.randn(size)
    return eva


def rotary(grid: int) -> tuple[Tensor, Tensor]:
    """Published tables, ``[grid * grid, channels of a head]``: places span 0 to 16 whatever the grid."""
    half = EVA_WIDTH // EVA_HEADS // 2
    frequencies = 1.0 / (10000 ** (torch.arange(0, half, 2).float() / half))
    angles = torch.outer(torch.arange(grid) / grid * 16, frequencies).repeat_interleave(2, dim=1)
    both = torch.cat([angles[:, None].expand(grid, grid, half), angles[None].expand(grid, grid, half)], dim=-1).reshape(
        grid * grid, 2 * half
    )
    return both.cos(), both.sin()


def _windowed(map_BHWC: Tensor, own: dict[str, Tensor], window: int) -> Tensor:
    grid = map_BHWC.shape[1]
    margin = -grid % window
    padded = functional.pad(map_BHWC, (0, 0, 0, margin, 0, margin))
    result = torch.empty_like(padded)
    for top in range(0, grid + margin, window):
        for left in range(0, grid + margin, window):
            part = padded[:, top : top + window, left : left + window]
            result[:, top : top + window, left : left + window] = _attend(part.flatten(1, 2), own, window).reshape(
                part.shape
            )
    return result[:, :grid, :grid]


def _attend(tokens: Tensor, own: dict[str, Tensor], grid: int) -> Tensor:
    cosine, sine = rotary(grid)

    def heads(values: Tensor) -> Tensor:
        return values.reshape(1, -1, EVA_HEADS, EVA_WIDTH // EVA_HEADS).transpose(1, 2)

    def turned(values: Tensor) -> Tensor:
        pairs = values.reshape(*values.shape[:-1], -1, 2)
        swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).reshape(values.shape)
        return values * cosine + swapped * sine

    query = turned(heads(tokens @ own["attn.q_proj.weight"].T + own["attn.q_bias"]))
    key = turned(heads(tokens @ own["attn.k_proj.weight"].T))
    value = heads(tokens @ own["attn.v_proj.weight"].T + own["attn.v_bias"])
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return _linear((weights @ value).transpose(1, 2).reshape(tokens.shape), own, "attn.proj")


def _linear(given: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return functional.linear(given, own[f"{name}.weight"], own[f"{name}.bias"])


def _norm(given: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return functional.layer_norm(given, given.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)


def _aligned(tensor: Tensor, side: int) -> Tensor:
    if tensor.shape[-1] == side:
        return tensor
    return functional.interpolate(tensor, size=(side, side), mode="bilinear", align_corners=True)


def published_towers() -> sizes.Shapes:
    """Names and shapes of X5's experts as ``NVEagle/Eagle-X5-7B`` stores them."""
    prefix = "model.vision_tower.vision_towers.{}.vision_tower."
    with torch.device("meta"):
        clip = sizes.clip_l14_336()
        convnext = ConvNeXt(depths=(3, 4, 30, 3), dims=(384, 768, 1536, 3072), num_classes=1024)
        sam = SamVisionEncoder(
            SamVisionConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                global_attn_indexes=[5, 11, 17, 23],
            )
        )
        pix2struct = Pix2StructVisionModel(
            Pix2StructVisionConfig(hidden_size=1536, d_ff=3968, d_kv=64, num_hidden_layers=18, num_attention_heads=24)
        )
    stored = {
        prefix.format(0) + "vision_model." + key.removeprefix("vision_model."): shape
        for key, shape in sizes.shapes_under("", clip).items()
    }
    stored |= {
        key.replace(".gamma", ".weight"): shape for key, shape in sizes.shapes_under(prefix.format(1), convnext).items()
    }
    neck = {"neck.conv1.weight": (256, 1024, 1, 1), "neck.layer_norm1.weight": (256,), "neck.layer_norm1.bias": (256,)}
    stored |= {key: shape for key, shape in sizes.shapes_under(prefix.format(2), sam).items() if ".neck." not in key}
    stored |= {prefix.format(2) + key: shape for key, shape in neck.items()}
    stored |= {prefix.format(3) + key: shape for key, shape in published_eva().items()}
    return stored | sizes.shapes_under(prefix.format(4), pix2struct)


def published_eva() -> sizes.Shapes:
    width, hidden = 1024, 2730
    shapes: sizes.Shapes = {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= {"pos_embed": (1, 197, width), "rope_win.freqs_cos": (256, 64), "rope_glb.freqs_cos": (4096, 64)}
    for block in range(24):
        own = f"blocks.{block}."
        shapes |= {f"{own}attn.{letter}_proj.weight": (width, width) for letter in "qkv"}
        shapes |= {f"{own}attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
        shapes |= {f"{own}{name}.{kind}": (width,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{own}mlp.{name}.weight": (hidden, width) for name in ("w1", "w2")}
        shapes |= {f"{own}mlp.{name}": (hidden,) for name in ("w1.bias", "w2.bias", "ffn_ln.weight", "ffn_ln.bias")}
        shapes |= {f"{own}mlp.w3.weight": (width, hidden), f"{own}mlp.w3.bias": (width,)}
        shapes[f"{own}attn.proj.weight"] = (width, width)
    return shapes
