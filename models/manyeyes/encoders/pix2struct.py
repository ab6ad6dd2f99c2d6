"""The image encoder of Pix2Struct, which reads text in images; Eagle's OCR expert.

Code: transformers (Apache-2.0). Paper: "Pix2Struct", arXiv:2210.03347. Weights: Google, Apache-2.0. Attention is not
scaled, norms are T5's, the gated layer uses GELU's tanh form, and rows and columns (counted from 1) have embeddings.

The published preprocessing runs on the CPU, in numpy, an image at a time, inside Eagle's forward pass. Here it is part
of the graph: undo the row's normalisation, standardise each image over all its pixels (standard deviation at least
1 / sqrt(values)), resize with an antialiased triangle filter, cut into patches. Resizing is linear and separable, so it
is two matrix products. With 2,048 patches at most, a square image of any size becomes 45 x 45 patches of 16 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

from manyeyes.encoders.clip import MEAN, STD
from manyeyes.encoders.encoder import BlockEncoder, Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.weights import strip_prefix

# Shape suffixes: B batch, N patches, C channels, H W pixels, G patches a side, P pixels a side of a patch.

_PATCH = 16


@dataclass(frozen=True)
class _Architecture:
    """``mean`` and ``std`` are what pixels were normalised with; ``max_patches`` bounds the square of the grid.

    ``head_channels`` is the width of a head, ``width`` over ``heads`` when None.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    max_patches: int
    positions: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    head_channels: int | None = None


class PatchReader(nn.Module):
    """Normalised pixels to the patches that Pix2Struct takes.

    Nothing here is a weight or is saved.
    """

    mean: Tensor
    std: Tensor
    resize: Tensor

    def __init__(self, plan: _Architecture, *, image_size: int, grid: int) -> None:
        super().__init__()
        self.plan = plan
        self.image_size = image_size
        self.grid = grid
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("resize", torch.empty(grid * _PATCH, image_size), persistent=False)
        self.init_non_persistent_buffers()

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Fill the tables; needed again after a model was built on the meta device."""
        if self.resize.is_meta:
            return
        self.mean.copy_(torch.tensor(self.plan.mean).reshape(1, 3, 1, 1))
        self.std.copy_(torch.tensor(self.plan.std).reshape(1, 3, 1, 1))
        # One row of pixels at a time, each with one lit pixel: what comes out is the filter.
        lit = torch.eye(self.image_size)[None, None]
        size = (self.grid * _PATCH, self.image_size)
        self.resize.copy_(functional.interpolate(lit, size=size, mode="bilinear", antialias=True)[0, 0])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, G * G, P * P * 3]``, in fp32."""
        pixels = (pixel_values.float() * self.std.float() + self.mean.float()) * 255
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        deviation = (pixels - mean).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        floor = 1 / math.sqrt(3 * self.image_size**2)
        resize = self.resize.float()
        standard = resize @ ((pixels - mean) / deviation.clamp(min=floor)) @ resize.T
        cut = standard.unflatten(2, (self.grid, _PATCH)).unflatten(4, (self.grid, _PATCH))
        patches: Tensor = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return patches


class Pix2StructEncoder(BlockEncoder):
    """Pix2Struct's image encoder; the feature map is its last block after the norm."""

    net: Pix2StructVisionModel

    def __init__(self, net: Pix2StructVisionModel, plan: _Architecture, *, image_size: int, grid: int) -> None:
        super().__init__(
            net,
            channels=plan.width,
            stride=-(-image_size // grid),
            image_size=image_size,
            width=plan.width,
            grid=grid,
        )
        self.reader = PatchReader(plan, image_size=image_size, grid=grid)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.net.encoder.layer)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Preprocessing, patches, and the embeddings of their rows and columns."""
        embeddings = self.net.embeddings
        patches_BNC = self.reader(pixel_values).to(embeddings.patch_projection.weight.dtype)
        rows = embeddings.row_embedder.weight[1 : self.grid + 1]
        columns = embeddings.column_embedder.weight[1 : self.grid + 1]
        places_NC = (rows[:, None] + columns[None, :]).flatten(0, 1)
        return embeddings.patch_projection(patches_BNC) + places_NC  # type: ignore[no-any-return]

    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        """Run some of the blocks."""
        for layer in self.net.encoder.layer[start:stop]:
            tokens_BNC = self.run_part(partial(_hidden, layer), tokens_BNC)
        return tokens_BNC

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """Norm, and the patches as a map."""
        return self.net.layernorm(tokens_BNC).transpose(1, 2).unflatten(2, (self.grid, self.grid))  # type: ignore[no-any-return]


def _hidden(layer: nn.Module, tokens_BNC: Tensor) -> Tensor:
    hidden: Tensor = layer(tokens_BNC)[0]
    return hidden


def _build(architecture: Mapping[str, object], image_size: int) -> Pix2StructEncoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    config = Pix2StructVisionConfig(
        hidden_size=plan.width,
        patch_embed_hidden_size=3 * _PATCH * _PATCH,
        d_ff=plan.hidden,
        d_kv=plan.head_channels or plan.width // plan.heads,
        num_hidden_layers=plan.depth,
        num_attention_heads=plan.heads,
        dense_act_fn="gelu_new",
        layer_norm_eps=1e-6,
        dropout_rate=0.0,
        attention_dropout=0.0,
        seq_len=plan.positions,
        initializer_range=0.02,
    )
    return Pix2StructEncoder(
        Pix2StructVisionModel(config), plan, image_size=image_size, grid=math.isqrt(plan.max_patches)
    )


def _convert(tensors: TensorMap, _encoder: Encoder) -> TensorMap:
    """From the whole model's keys (``encoder.``) or the image encoder's own; the text decoder is left out."""
    published = strip_prefix(tensors, marker="embeddings.patch_projection.weight") or tensors
    return {
        key: tensor
        for key, tensor in published.items()
        if key.startswith(("embeddings.", "encoder.layer.", "layernorm."))
    }


FAMILY = EncoderFamily(build=_build, convert=_convert)

ROWS: dict[str, EncoderRow] = {
    "pix2struct-l16-1024": EncoderRow(
        family="pix2struct",
        channels=1536,
        stride=23,
        image_size=1024,
        mean=MEAN,
        std=STD,
        parameters=512_812_032,
        pretraining="screenshots to simplified HTML, C4 web pages",
        licence="Apache-2.0",
        source="hub:google/pix2struct-large@main",
        paper="arXiv:2210.03347",
        architecture={
            "width": 1536,
            "depth": 18,
            "heads": 24,
            "hidden": 3968,
            "max_patches": 2048,
            "positions": 4096,
            "mean": MEAN,
            "std": STD,
        },
        small={"width": 32, "depth": 2, "heads": 2, "hidden": 48, "max_patches": 18, "positions": 8},
        files=("model.safetensors", "pytorch_model.bin"),
        features="last block and norm; 45 x 45 whatever the image size; no class token",
        image_sizes=(1024,),
        small_image_size=72,
    ),
}
