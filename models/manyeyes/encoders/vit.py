"""Plain vision transformers, as timm builds them.

Code: timm (Apache-2.0). Paper: "An Image is Worth 16x16 Words", arXiv:2010.11929. CLIP, SigLIP and DINOv2 are this
network with other options; their files say which, and translate their publishers' keys. The rows here were trained on
labels alone, as in Cambrian-1's study of 23 encoders (arXiv:2406.16860). Their weights: timm, ImageNet-21k at 224
pixels; paper of L/16: "How to train your ViT?", arXiv:2106.10270.

Position embeddings are resampled for another image size once, when weights are loaded: what is saved afterwards has the
new size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, StackEncoder, TensorMap, check_image_size
from manyeyes.errors import SourceError

Method = Literal["antialias", "plain", "offset"]


def resample_positions(positions: Tensor, *, grid: int, num_prefix_tokens: int, method: Method) -> Tensor:
    """Bicubic resampling of a square grid of position embeddings, in fp32.

    Args:
        positions: ``[1, P + n * n, C]``; P prefix tokens come first and stay as they are.
        grid: Side wanted.
        num_prefix_tokens: P.
        method: ``antialias`` as Eagle and timm do, ``plain`` without antialiasing as EVA-02's detector does, ``offset``
            as DINOv2's own code does: the scale is (grid + 0.1) / n, which moves every sample a little.

    Returns:
        ``[1, P + grid * grid, C]``; the input itself when it fits.

    Raises:
        SourceError: The patches do not form a square.
    """
    prefix, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise SourceError(
            f"{patches.shape[1]} position embeddings", "they must form a square", "Use weights of this very network."
        )
    if side == grid:
        return positions
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if method == "offset":
        scale = (grid + 0.1) / side
        square = functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    else:
        square = functional.interpolate(
            square, size=(grid, grid), mode="bicubic", align_corners=False, antialias=method == "antialias"
        )
    resampled = square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(positions.dtype)
    return torch.cat([prefix, resampled], dim=1)


@dataclass(frozen=True)
class _Architecture:
    """What a row may say.

    ``depth`` is the published depth and ``layer`` the block whose output is taken, counted from the end: at -2 the
    last block is not built. ``pre_norm`` norms the tokens that enter the first block, ``final_norm`` those that leave
    the last. ``layer_scale`` is the initial factor on each branch, absent when None. ``swiglu`` packs gate and value
    into one layer. With ``ragged`` the image need not be whole patches: what is left over at the right and at the
    bottom is not seen.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    class_token: bool = False
    layer: int = -1
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-6
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: float | None = None
    swiglu: bool = False
    ragged: bool = False


class VitEncoder(StackEncoder):
    """A vision transformer without its head; the feature map is its last layer, after the norm where there is one."""

    net: VisionTransformer

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches, class token, positions."""
        tokens_BNC: Tensor = self.net.norm_pre(self.net._pos_embed(self.net.patch_embed(pixel_values)))
        return tokens_BNC

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """Norm, and the patches as a map."""
        return self.as_map(self.net.norm(tokens_BNC))


def build_vit(architecture: Mapping[str, object], image_size: int) -> VitEncoder:
    """Make a vision transformer, freshly initialised.

    Args:
        architecture: Fields of ``_Architecture``.
        image_size: Pixels a side; a multiple of the patch size, unless ``ragged``.

    Raises:
        ShapeError: Not such a multiple.
    """
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    if not plan.ragged:
        check_image_size(image_size, multiple=plan.patch_size)
    net = VisionTransformer(
        img_size=image_size,
        patch_size=plan.patch_size,
        embed_dim=plan.width,
        depth=plan.depth + plan.layer + 1,
        num_heads=plan.heads,
        mlp_ratio=plan.mlp_ratio,
        mlp_layer=SwiGLUPacked if plan.swiglu else Mlp,
        act_layer=nn.SiLU if plan.swiglu else plan.activation,
        norm_layer=partial(nn.LayerNorm, eps=plan.epsilon),
        init_values=plan.layer_scale,
        pre_norm=plan.pre_norm,
        final_norm=plan.final_norm,
        class_token=plan.class_token,
        num_classes=0,
        global_pool="",
    )
    return VitEncoder(
        net,
        channels=plan.width,
        stride=plan.patch_size,
        image_size=image_size,
        width=plan.width,
        num_prefix_tokens=net.num_prefix_tokens,
        grid=image_size // plan.patch_size,
    )


def fit_vit(tensors: TensorMap, encoder: Encoder, *, method: Method = "antialias") -> TensorMap:
    """Bring tensors that have this network's keys to this encoder's size.

    Drops heads, blocks that the row does not run, a norm that it does not take and a class token that it never sees;
    resamples position embeddings that were learned at another image size.

    Args:
        tensors: With timm's keys.
        encoder: Built by ``build_vit``.
        method: How positions are resampled.
    """
    net = encoder.net
    prefix = int(net.num_prefix_tokens)  # type: ignore[arg-type]
    depth = len(net.blocks)  # type: ignore[arg-type]
    dropped = ["head.", "fc_norm.", "attn_pool.", "head_dist.", "pre_logits."]
    if isinstance(net.norm, nn.Identity):
        dropped.append("norm.")
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith(tuple(dropped))}
    state = {key: tensor for key, tensor in state.items() if _block(key) < depth}
    published_prefix = 1 if "cls_token" in state else 0
    positions = state.get("pos_embed")
    if published_prefix > prefix:
        del state["cls_token"]
        if positions is not None:
            positions = positions[:, published_prefix:]
    if positions is not None:
        state["pos_embed"] = resample_positions(positions, grid=encoder.grid, num_prefix_tokens=prefix, method=method)
    return state


def _block(key: str) -> int:
    first, _, rest = key.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else -1


FAMILY = EncoderFamily(build=build_vit, convert=fit_vit)

_HALF = (0.5, 0.5, 0.5)
_FEATURES = "last block and norm; class token seen by the patches, then dropped"

ROWS: dict[str, EncoderRow] = {
    "vit-l16-224-in21k": EncoderRow(
        family="vit",
        channels=1024,
        stride=16,
        image_size=224,
        mean=_HALF,
        std=_HALF,
        parameters=303_301_632,
        pretraining="classification, ImageNet-21k (AugReg)",
        licence="Apache-2.0",
        source="hub:timm/vit_large_patch16_224.augreg_in21k@main",
        paper="arXiv:2106.10270",
        architecture={"patch_size": 16, "width": 1024, "depth": 24, "heads": 16, "class_token": True},
        small={"width": 32, "depth": 2, "heads": 2},
        features=_FEATURES,
        image_sizes=(224,),
        small_image_size=64,
    ),
    "vit-h14-224-in21k": EncoderRow(
        family="vit",
        channels=1280,
        stride=14,
        image_size=224,
        mean=_HALF,
        std=_HALF,
        parameters=630_764_800,
        pretraining="classification, ImageNet-21k",
        licence="Apache-2.0",
        source="hub:timm/vit_huge_patch14_224.orig_in21k@main",
        paper="arXiv:2010.11929",
        architecture={"patch_size": 14, "width": 1280, "depth": 32, "heads": 16, "class_token": True},
        small={"width": 32, "depth": 2, "heads": 2},
        features=_FEATURES,
        image_sizes=(224,),
        small_image_size=56,
    ),
}
