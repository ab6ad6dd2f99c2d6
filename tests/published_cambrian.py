"""Cambrian-1: small checkpoints in its layout, and its formulas, computed apart from our own code.

Transformers' Llama, CLIP and DINOv2 and timm's ConvNeXt and vision transformer stand in for the parts that the
published code takes as they are; preprocessing, positions, windows, masks, samplers, newlines, splice and the looks
back from inside the language model are written out, in the published form for inference.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from tests import published_toys as toys

NAMES = (
    "siglip/CLIP-ViT-SO400M-14-384",
    "openai/clip-vit-large-patch14-336",
    "facebook/dinov2-giant-res84",
    "clip-convnext-XXL-multi-stage-res128",
)
SIDES, GRID, WIDTH, HEADS, DEPTH = (4, 4, 4, 16), 4, 32, 16, 2
SIGLIP_SIZE, DINO_SIZE, DINO_LEARNED, CONVNEXT_SIZE = 73, 84, 56, 128
CHANNELS = (40, toys.TOWER_WIDTH, 36, 60)
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = (HALF, (toys.MEAN, toys.STD), IMAGENET, (toys.MEAN, toys.STD))
FILLS = ((122, 116, 104), (122, 116, 104), (123, 116, 103), (122, 116, 104))
START, STRIDE, COUNT, LAYERS = 0, 1, 2, 2


class CambrianToy:
    """A Cambrian-1: files and formulas.

    Args:
        folder: Where its files go.
        query_sides: Side of the grid of each group of queries.
        looks_back: Whether the language model has samplers inside.
    """

    def __init__(self, folder: Path, *, query_sides: Sequence[int] = (GRID,), looks_back: bool = True) -> None:
        self.folder, self.query_sides, self.looks_back = folder, tuple(query_sides), looks_back
        self.vocab_size = toys.write_sentencepiece(folder)
        self.language_model = toys.make_llama(self.vocab_size)
        self.clip = toys.make_clip()
        torch.manual_seed(13)
        self.siglip = _shaken(
            VisionTransformer(
                img_size=SIGLIP_SIZE,
                patch_size=14,
                embed_dim=40,
                depth=2,
                num_heads=4,
                mlp_ratio=1.6,
                class_token=False,
                global_pool="map",
                num_classes=0,
            )
        )
        self.dinov2 = _shaken(
            Dinov2Model(
                Dinov2Config(
                    hidden_size=36,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    image_size=DINO_LEARNED,
                    patch_size=14,
                    use_swiglu_ffn=True,
                    layer_norm_eps=1e-6,
                )
            )
        )
        self.convnext = _shaken(ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), norm_eps=1e-5, num_classes=3))
        self.own = self._make_connector()

    def _make_connector(self) -> dict[str, Tensor]:
        groups, hidden = len(self.query_sides), toys.WIDTH
        own = {
            "vision_query": torch.randn(groups, WIDTH),
            "image_newline": torch.randn(hidden),
            "mm_projector.0.weight": 0.2 * torch.randn(hidden, WIDTH * groups),
            "mm_projector.0.bias": torch.randn(hidden),
            "mm_projector.2.weight": 0.3 * torch.randn(hidden, hidden),
            "mm_projector.2.bias": torch.randn(hidden),
        }
        for place, channels in enumerate(CHANNELS):
            own |= {
                f"mm_projector_aux_{place}.0.weight": 0.2 * torch.randn(WIDTH, channels),
                f"mm_projector_aux_{place}.0.bias": torch.randn(WIDTH),
                f"mm_projector_aux_{place}.2.weight": 0.3 * torch.randn(WIDTH, WIDTH),
                f"mm_projector_aux_{place}.2.bias": torch.randn(WIDTH),
                f"mm_projector_aux_{place}.3.weight": 1 + 0.2 * torch.randn(WIDTH),
                f"mm_projector_aux_{place}.3.bias": 0.2 * torch.randn(WIDTH),
            }
        for group, side in enumerate(self.query_sides):
            for layer in range(DEPTH):
                windows = [own_side // side for own_side in SIDES]
                own |= _make_block(f"vision_sampler_{group}.layers.{layer}.", WIDTH, windows)
        if self.looks_back:
            for place in range(COUNT):
                windows = [own_side // GRID for own_side in SIDES]
                own |= _make_block(f"vision_sampler_layers.{place}.layers.0.", hidden, windows)
        return own

    def config(self, **changes: Any) -> dict[str, Any]:
        """``config.json`` as the published checkpoints have it."""
        return {
            "architectures": ["CambrianLlamaForCausalLM"],
            "model_type": "cambrian_llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": toys.WIDTH,
            "intermediate_size": 56,
            "num_attention_heads": 4,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocab_size,
            "connector_depth": DEPTH,
            "connector_only": not self.looks_back,
            "image_aspect_ratio": "pad",
            "image_position": toys.piece_ids(self.folder, toys.PROMPT).index(-200),
            "image_token_len": GRID**2,
            "mm_projector_type": "sva",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower_aux_list": list(NAMES),
            "mm_vision_tower_aux_token_len_list": [side**2 for side in SIDES],
            "num_of_vision_sampler_layers": COUNT,
            "num_query_group": len(self.query_sides),
            "query_num_list": [side**2 for side in self.query_sides],
            "start_of_vision_sampler_layers": START,
            "stride_of_vision_sampler_layers": STRIDE,
            "tokenizer_model_max_length": 2048,
            "torch_dtype": "float32",
            "unfreeze_mm_vision_tower": False,
            "use_mm_proj": True,
            "vision_hidden_size": WIDTH,
            **changes,
        }

    def write(self, **changes: Any) -> Path:
        """Write config and weights beside the tokenizer."""
        (self.folder / "config.json").write_text(json.dumps(self.config(**changes)), encoding="utf-8")
        tensors = {key: tensor.clone() for key, tensor in self.language_model.state_dict().items()}
        tensors |= {f"model.{key}": tensor for key, tensor in self.own.items()}
        toys.write_weights(self.folder, tensors, shards=2, form="safetensors")
        return self.folder

    def write_towers(self, folder: Path) -> Path:
        """A folder each, as its publisher has it."""
        toys.make_clip(folder / "clip-vit-large-patch14-336")
        self.dinov2.save_pretrained(folder / "dinov2")
        for name, tower, file in (
            ("siglip", self.siglip, "open_clip_pytorch_model.bin"),
            ("convnext", self.convnext, "open_clip_model.safetensors"),
        ):
            (folder / name).mkdir()
            tensors = {f"visual.trunk.{key}": tensor for key, tensor in tower.state_dict().items()}
            tensors["text.token_embedding.weight"] = torch.ones(3, 2)
            if file.endswith(".bin"):
                torch.save(tensors, folder / name / file)
            else:
                save_file(tensors, folder / name / file)
        return folder

    def write_facts(self, file: Path, **more: dict[str, Any]) -> Path:
        """A file for ``--encoder-config``: what open_clip's files do not tell."""
        facts = {"siglip": {"num_heads": 4, "image_size": SIGLIP_SIZE}, NAMES[3]: {"norm_eps": 1e-5}, **more}
        file.write_text(json.dumps(facts), encoding="utf-8")
        return file

    def pixels(self, data: bytes, place: int) -> Tensor:
        """What the encoder at a place of the list takes, ``[1, 3, size, size]``."""
        return _padded_pixels(data, place, (SIGLIP_SIZE, toys.SIZE, DINO_SIZE, CONVNEXT_SIZE)[place])

    def _features(self, data: bytes) -> list[Tensor]:
        """Every tower's ``[1, token_len, channels]``."""
        siglip, clip, dinov2, convnext = (self.pixels(data, place) for place in range(len(NAMES)))
        maps, hidden = [], self.convnext.stem(convnext)
        for stage in self.convnext.stages:
            hidden = stage(hidden)
            maps.append(_bilinear(hidden, SIDES[3]))
        return [
            _resized(self.siglip.forward_features(siglip), SIDES[0]),
            _resized(self.clip(clip, output_hidden_states=True).hidden_states[-2][:, 1:], SIDES[1]),
            _resized(self._dinov2_features(dinov2), SIDES[2]),
            torch.cat(maps, dim=1).flatten(2).transpose(1, 2),
        ]

    def _dinov2_features(self, pixels: Tensor) -> Tensor:
        # DINOv2's own resampling of positions: the scale is (wanted + 0.1) / learned.
        state = dict(self.dinov2.state_dict())
        key, learned, wanted = "embeddings.position_embeddings", DINO_LEARNED // 14, DINO_SIZE // 14
        patches = state[key][:, 1:].reshape(1, learned, learned, -1).permute(0, 3, 1, 2)
        scale = (wanted + 0.1) / learned
        patches = functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
        state[key] = torch.cat([state[key][:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        config = Dinov2Config.from_dict({**self.dinov2.config.to_dict(), "image_size": DINO_SIZE})
        tower = Dinov2Model(config).eval()
        tower.load_state_dict(state)
        return tower(pixels).last_hidden_state[:, 1:]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], data: bytes) -> np.ndarray:
        """``[T, V]`` of ids in which -200 stands for the image."""
        own, size = self.own, Image.open(io.BytesIO(data)).size
        projected = []
        for place, features in enumerate(self._features(data)):
            name = f"mm_projector_aux_{place}"
            hidden = functional.gelu(_linear(features, own, f"{name}.0"))
            projected.append(_norm(_linear(hidden, own, f"{name}.2"), own, f"{name}.3"))
        context = projected[0].mean(1)
        groups = []
        for group, side in enumerate(self.query_sides):
            windows, masks = _windows(projected, side, size)
            hidden = own["vision_query"][group].expand(side * side, -1)
            for layer in range(DEPTH):
                hidden = _block(hidden, context, windows, masks, own, f"vision_sampler_{group}.layers.{layer}.")
            group_map = hidden.T.reshape(1, -1, side, side)
            groups.append(_bilinear(group_map, GRID)[0].flatten(1).T)
        hidden = functional.gelu(_linear(torch.cat(groups, dim=1), own, "mm_projector.0"))
        tokens = _linear(hidden, own, "mm_projector.2").reshape(GRID, GRID, -1)
        kept = torch.arange(GRID * GRID).reshape(GRID, GRID)
        tokens, kept = _unpad(tokens, size), _unpad(kept, size)
        newline = own["image_newline"].expand(tokens.shape[0], 1, -1)
        image = torch.cat([tokens, newline], dim=1).flatten(0, 1)
        table, start = self.language_model.get_input_embeddings(), list(ids).index(-200)
        rows = [image if token == -200 else table(torch.tensor([token])) for token in ids]
        places = [
            start + row * (kept.shape[1] + 1) + column
            for row in range(kept.shape[0])
            for column in range(kept.shape[1])
        ]
        windows, masks = _windows(projected, GRID, size)
        windows = [window[kept.flatten()] for window in windows]
        masks = [mask[kept.flatten()] for mask in masks]
        hooks = []
        for sampler in range(COUNT if self.looks_back else 0):

            def look(_module: Any, _given: Any, output: Any, sampler: int = sampler) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                name = f"vision_sampler_layers.{sampler}.layers.0."
                hidden[0, places] = _block(hidden[0, places], context, windows, masks, own, name)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            layer = self.language_model.model.layers[START + sampler * STRIDE]
            hooks.append(layer.register_forward_hook(look))
        logits = self.language_model(inputs_embeds=torch.cat(rows)[None]).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        return logits


def _shaken(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.data if parameter.ndim == 1 else 0)
    return module.eval()


def _make_block(prefix: str, query: int, windows: Sequence[int]) -> dict[str, Tensor]:
    block = {
        "proj_context.weight": 0.3 * torch.randn(WIDTH, WIDTH),
        "proj_in.weight": 0.2 * torch.randn(WIDTH, query + WIDTH),
        "proj_out.linear_1.weight": 0.3 * torch.randn(WIDTH, WIDTH),
        "proj_out.linear_2.weight": 0.3 * torch.randn(query, WIDTH),
        "norm.weight": 1 + 0.2 * torch.randn(WIDTH),
        "norm.bias": 0.2 * torch.randn(WIDTH),
        "cross_attn.o_proj.weight": 0.3 * torch.randn(WIDTH, WIDTH),
    }
    names = ["q_proj", *(f"{letter}_proj_{place}" for letter in "kv" for place in range(len(windows)))]
    for name in names:
        block |= {
            f"cross_attn.{name}.0.weight": 1 + 0.2 * torch.randn(WIDTH),
            f"cross_attn.{name}.0.bias": 0.2 * torch.randn(WIDTH),
            f"cross_attn.{name}.1.weight": 0.4 * torch.randn(WIDTH, WIDTH),
        }
    for place, side in enumerate(windows):
        if side > 1:
            block[f"pos_embed_{place}"] = torch.randn(side * side, WIDTH)
    return {prefix + key: tensor for key, tensor in block.items()}


def _block(
    query: Tensor,
    context: Tensor,
    windows: Sequence[Tensor],
    masks: Sequence[Tensor],
    own: dict[str, Tensor],
    prefix: str,
) -> Tensor:
    """One layer for queries ``[Q, C]`` over windows ``[Q, K_k, C]``, True where a key may be seen."""
    part = {key.removeprefix(prefix): tensor for key, tensor in own.items() if key.startswith(prefix)}
    looked = context @ part["proj_context.weight"].T
    hidden = torch.cat([query, looked.expand(len(query), -1)], dim=1) @ part["proj_in.weight"].T
    keys, values = [], []
    for place, window in enumerate(windows):
        window = window + part.get(f"pos_embed_{place}", 0)
        for kind, joined in (("k", keys), ("v", values)):
            name = f"cross_attn.{kind}_proj_{place}"
            joined.append(_norm(window, part, f"{name}.0") @ part[f"{name}.1.weight"].T)
    asked = _norm(hidden, part, "cross_attn.q_proj.0") @ part["cross_attn.q_proj.1.weight"].T
    head = WIDTH // HEADS
    asked, key, value = (
        tensor.reshape(len(query), -1, HEADS, head).transpose(1, 2)
        for tensor in (asked, torch.cat(keys, dim=1), torch.cat(values, dim=1))
    )
    scores = asked @ key.transpose(-1, -2) / head**0.5
    scores = scores.masked_fill(~torch.cat(list(masks), dim=1)[:, None, None], float("-inf"))
    attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(len(query), WIDTH)
    hidden = _norm(hidden + attended @ part["cross_attn.o_proj.weight"].T, part, "norm")
    grown = functional.gelu(hidden @ part["proj_out.linear_1.weight"].T)
    return query + grown @ part["proj_out.linear_2.weight"].T


def _windows(projected: Sequence[Tensor], side: int, size: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    windows, masks = [], []
    for own_side, features in zip(SIDES, projected, strict=True):
        cells = own_side // side
        cut = features[0].reshape(side, cells, side, cells, WIDTH).permute(0, 2, 1, 3, 4)
        seen = torch.zeros(own_side, own_side, dtype=torch.bool)
        _unpad(seen, size)[:] = True
        seen = seen.reshape(side, cells, side, cells).permute(0, 2, 1, 3).reshape(side * side, cells * cells)
        seen[~seen.any(1)] = True
        windows.append(cut.reshape(side * side, cells * cells, WIDTH))
        masks.append(seen)
    return windows, masks


def _unpad(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """What of a square grid shows the image; a view."""
    (width, height), grid = size, cells.shape[0]
    if width > height:
        padding = (grid - int(height * (grid / width))) // 2
        return cells[padding : grid - padding]
    padding = (grid - int(width * (grid / height))) // 2
    return cells[:, padding : grid - padding]


def _padded_pixels(data: bytes, place: int, size: int) -> Tensor:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), FILLS[place])
    square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    mean, std = STATISTICS[place]
    values = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
    return torch.from_numpy(((values - np.array(mean)) / np.array(std)).astype(np.float32)).permute(2, 0, 1)[None]


def _resized(tokens: Tensor, side: int) -> Tensor:
    own_side = round(tokens.shape[1] ** 0.5)
    feature = tokens.transpose(1, 2).reshape(1, -1, own_side, own_side)
    return _bilinear(feature, side).flatten(2).transpose(1, 2)


def _bilinear(feature: Tensor, side: int) -> Tensor:
    if feature.shape[-1] == side:
        return feature
    return functional.interpolate(feature, size=(side, side), mode="bilinear", align_corners=False)


def _linear(given: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return functional.linear(given, own[f"{name}.weight"], own[f"{name}.bias"])


def _norm(given: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return functional.layer_norm(given, given.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])


def dinov2_of_transformers_4(tower: Dinov2Model) -> dict[str, Tensor]:
    """Its tensors as the release that Cambrian-1 used names them."""
    names = {
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".mlp.down_proj.": ".mlp.weights_out.",
    }
    state, stored = dict(tower.state_dict()), {}
    for key in list(state):
        if ".mlp.gate_proj." in key:
            joined = torch.cat([state.pop(key), state.pop(key.replace("gate_proj", "up_proj"))])
            stored[key.replace("gate_proj", "weights_in")] = joined
    for key, tensor in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        stored[key] = tensor
    return stored
