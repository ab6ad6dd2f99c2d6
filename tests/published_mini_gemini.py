"""Mini-Gemini: small checkpoints in its layout, and its formulas, computed apart from our own code.

Transformers' Llama, Mixtral and CLIP and timm's ConvNeXt stand in for the parts that the published code takes as they
are; preprocessing, features, mining, projector and splice are written out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from tests import published_toys as toys

CANVAS, WIDTHS, DEPTHS = 128, (8, 12, 16, 24), (1, 1, 2, 1)
DETAIL = sum(WIDTHS)


class MiniGeminiToy:
    """A Mini-Gemini: files and formulas.

    Args:
        folder: Where its files go.
        image_grid: 2 for HD.
    """

    def __init__(self, folder: Path, *, image_grid: int = 1) -> None:
        self.folder, self.image_grid = folder, image_grid
        self.vocab_size = toys.write_sentencepiece(folder)
        self.language_model: PreTrainedModel = toys.make_llama(self.vocab_size)
        self.clip = toys.make_clip()
        torch.manual_seed(7)
        self.convnext = ConvNeXt(depths=DEPTHS, dims=WIDTHS, norm_eps=1e-6, num_classes=0).eval()
        for parameter in self.convnext.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
        width = toys.TOWER_WIDTH
        self.own = {
            "mm_projector.0.weight": 0.2 * torch.randn(toys.WIDTH, width),
            "mm_projector.0.bias": torch.randn(toys.WIDTH),
            "mm_projector.2.weight": 0.3 * torch.randn(toys.WIDTH, toys.WIDTH),
            "mm_projector.2.bias": torch.randn(toys.WIDTH),
        }
        for part, channels in (("query", width), ("aux", DETAIL), ("val", DETAIL)):
            self.own |= {
                f"vlm_uni_{part}_projector.0.weight": 1 + 0.2 * torch.randn(channels),
                f"vlm_uni_{part}_projector.0.bias": 0.2 * torch.randn(channels),
                f"vlm_uni_{part}_projector.1.weight": 0.3 * torch.randn(width, channels),
                f"vlm_uni_{part}_projector.1.bias": 0.3 * torch.randn(width),
            }

    def config(self, **changes: Any) -> dict[str, Any]:
        """``config.json`` as the published checkpoints have it."""
        hd = self.image_grid > 1
        return {
            "architectures": ["MGMLlamaForCausalLM"],
            "model_type": "mgm",
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
            "image_size_aux": CANVAS,
            "image_grid": self.image_grid,
            "image_global": hd,
            "mm_hidden_size": toys.TOWER_WIDTH,
            "mm_hidden_size_aux": DETAIL,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
            "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
            "optimize_vision_tower": False,
            "optimize_vision_tower_aux": False,
            "tokenizer_model_max_length": 4096 if hd else 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": "float32",
            "use_mm_proj": True,
            **changes,
        }

    def tensors(self, *, towers: bool) -> dict[str, Tensor]:
        """All tensors under the published keys."""
        tensors = {key: tensor.clone() for key, tensor in self.language_model.state_dict().items()}
        tensors |= {f"model.{key}": tensor for key, tensor in self.own.items()}
        if towers:
            tensors |= toys.tower_keys(self.clip, "model.vision_tower.vision_tower.")
            for key, tensor in self.convnext.state_dict().items():
                if key.startswith(("stem.", "stages.")):
                    tensors[f"model.vision_tower_aux.vision_{key}"] = tensor
        return tensors

    def write(self, *, towers: bool = True, shards: int = 1, form: str = "safetensors", **changes: Any) -> Path:
        """Write config and weights beside the tokenizer."""
        (self.folder / "config.json").write_text(json.dumps(self.config(**changes)), encoding="utf-8")
        toys.write_weights(self.folder, self.tensors(towers=towers), shards=shards, form=form)
        return self.folder

    def write_towers(self, folder: Path) -> Path:
        """CLIP as transformers saves it and ConvNeXt as open_clip does, a folder each."""
        self.clip.save_pretrained(folder / "clip")
        trunk = {f"visual.trunk.{key}": tensor for key, tensor in self.convnext.state_dict().items()}
        (folder / "convnext").mkdir()
        save_file({**trunk, "logit_scale": torch.ones(1)}, folder / "convnext" / "open_clip_model.safetensors")
        return folder

    def _features(self, pixels: Tensor) -> Tensor:
        return self.clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def _detail(self, pixels: Tensor) -> Tensor:
        maps, hidden = [], self.convnext.stem(pixels)
        for stage in self.convnext.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        size = maps[0].shape[-2:]
        return torch.cat([maps[0], *(_bilinear(own, size[0]) for own in maps[1:])], dim=1)

    def _mine(self, tokens: Tensor, detail: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        cells = detail.shape[-1] // side
        batch, channels = detail.shape[:2]
        windows = detail.permute(0, 2, 3, 1).reshape(batch, side, cells, side, cells, channels).transpose(2, 3)
        windows = windows.reshape(batch, side * side, cells * cells, channels)
        query, key, value = (
            self._normed_linear(part, given) for part, given in (("query", tokens), ("aux", windows), ("val", windows))
        )
        scores = torch.einsum("bnc,bnkc->bnk", query, key) / key.shape[-1] ** 0.5
        return tokens + torch.einsum("bnk,bnkc->bnc", scores.softmax(-1), value)

    def _normed_linear(self, part: str, given: Tensor) -> Tensor:
        own = {key.removeprefix(f"vlm_uni_{part}_projector."): tensor for key, tensor in self.own.items()}
        normed = functional.layer_norm(given, given.shape[-1:], own["0.weight"], own["0.bias"])
        return functional.linear(normed, own["1.weight"], own["1.bias"])

    @torch.no_grad()
    def image_tokens(self, data: bytes, *, aspect: str = "pad") -> Tensor:
        """Image bytes to ``[N, width of the language model]``."""
        large = toys.pixels_of(data, size=CANVAS, aspect=aspect)
        grid, detail = self.image_grid, self._detail(large)
        small = _bilinear(large, toys.SIZE * grid)
        if grid == 1:
            mined = self._mine(self._features(small), detail)[0]
        else:
            side, map_side = toys.SIZE, detail.shape[-1] // grid
            rows = [self._mine(self._features(_bilinear(small, side)), _bilinear(detail, map_side))[0]]
            for row in range(grid):
                for column in range(grid):
                    tile = small[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
                    part = detail[
                        ..., row * map_side : (row + 1) * map_side, column * map_side : (column + 1) * map_side
                    ]
                    rows.append(self._mine(self._features(tile), part)[0])
            mined = torch.cat(rows)
        hidden = functional.linear(mined, self.own["mm_projector.0.weight"], self.own["mm_projector.0.bias"])
        hidden = functional.gelu(hidden)
        return functional.linear(hidden, self.own["mm_projector.2.weight"], self.own["mm_projector.2.bias"])

    @torch.no_grad()
    def logits(self, ids: Sequence[int], image: Tensor) -> np.ndarray:
        """``[T, V]`` of ids in which -200 stands for the image."""
        table = self.language_model.get_input_embeddings()
        rows = [image if token == -200 else table(torch.tensor([token])) for token in ids]
        return self.language_model(inputs_embeds=torch.cat(rows)[None]).logits[0].numpy()


def _bilinear(tensor: Tensor, side: int) -> Tensor:
    return functional.interpolate(tensor, size=(side, side), mode="bilinear", align_corners=False)
