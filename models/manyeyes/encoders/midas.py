"""The image encoders of MiDaS 3.0 (DPT-Large) and 3.1 (DPT-BEiT-Large), which estimate depth.

Code: timm (Apache-2.0), a vision transformer and BEiT; the depth head is left out. Papers: "Vision Transformers for
Dense Prediction", arXiv:2103.13413; "MiDaS v3.1", arXiv:2307.14460; "BEiT", arXiv:2106.08254. Weights: Intel,
Apache-2.0 and MIT. In Cambrian-1's study of 23 encoders (arXiv:2406.16860).

DPT-Large's map is its last block after the norm; DPT-BEiT's backbone has none at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from torch import Tensor, nn

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, StackEncoder, TensorMap, check_image_size
from manyeyes.encoders.vit import build_vit, fit_vit
from manyeyes.encoders.weights import VIT_RULES, from_transformers_vit, join, rename, strip_prefix

# Of transformers' DPT and BEiT, which Cambrian-1 ran; timm's, which the weights come from, is 1e-6.
_EPSILON = 1e-12
_LAYER = r"encoder\.layer\.(\d+)\."
_BEIT_RULES = [
    (_LAYER + r"lambda_([12])", r"blocks.\1.gamma_\2"),
    (_LAYER + r"attention\.attention\.([qv])\w+\.bias", r"blocks.\1.attn.\2_bias"),
    (
        _LAYER + r"attention\.attention\.relative_position_bias\.relative_position_bias_table",
        r"blocks.\1.attn.relative_position_bias_table",
    ),
    *VIT_RULES,
]


def _convert_dpt(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From transformers' DPT (``dpt.``), or timm's own keys."""
    published = strip_prefix(tensors, marker="embeddings.cls_token")
    return fit_vit(from_transformers_vit(published) if published else tensors, encoder)


FAMILY = EncoderFamily(build=build_vit, convert=_convert_dpt)


@dataclass(frozen=True)
class _BeitArchitecture:
    patch_size: int
    width: int
    depth: int
    heads: int


class BeitEncoder(StackEncoder):
    """BEiT without its head; the feature map is its last block, with no norm."""

    net: Beit

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches; positions join in every block, relative to each other."""
        patches_BNC = self.net.patch_embed(pixel_values)
        token = self.net.cls_token.expand(patches_BNC.shape[0], -1, -1)
        return torch.cat([token, patches_BNC], dim=1)

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """The patches as a map."""
        return self.as_map(tokens_BNC)


def _build_beit(architecture: Mapping[str, object], image_size: int) -> BeitEncoder:
    plan = _BeitArchitecture(**architecture)  # type: ignore[arg-type]
    check_image_size(image_size, multiple=plan.patch_size)
    net = Beit(
        img_size=image_size,
        patch_size=plan.patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=plan.width,
        depth=plan.depth,
        num_heads=plan.heads,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=1e-5,
        norm_layer=partial(nn.LayerNorm, eps=_EPSILON),
    )
    net.norm = nn.Identity()
    return BeitEncoder(
        net,
        channels=plan.width,
        stride=plan.patch_size,
        image_size=image_size,
        width=plan.width,
        num_prefix_tokens=1,
    )


def _convert_beit(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From transformers' DPT with a BEiT backbone (``backbone.``), or timm's own keys; drops heads."""
    published = strip_prefix(tensors, marker="embeddings.cls_token")
    if published:
        # BEiT's queries and values have biases, its keys none: rules of its own come first.
        tensors = rename(published, _BEIT_RULES)
        tensors = join(tensors, [f"attn.{letter}.weight" for letter in "qkv"], "attn.qkv.weight")
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith(("norm.", "fc_norm.", "head."))}
    wanted = encoder.net.state_dict()
    for key in state:
        if key.endswith("relative_position_bias_table") and key in wanted and wanted[key].shape != state[key].shape:
            state[key] = resize_rel_pos_bias_table(
                state[key], new_window_size=(encoder.grid, encoder.grid), new_bias_shape=wanted[key].shape
            )
    return state


BEIT_FAMILY = EncoderFamily(build=_build_beit, convert=_convert_beit)

_HALF = (0.5, 0.5, 0.5)

ROWS: dict[str, EncoderRow] = {
    "midas-v3-l16-384": EncoderRow(
        family="dpt",
        channels=1024,
        stride=16,
        image_size=384,
        mean=_HALF,
        std=_HALF,
        parameters=303_690_752,
        pretraining="ImageNet-21k, then depth from a mixture of 10 data sets",
        licence="Apache-2.0",
        # transformers 5 pins the same for its depth-estimation pipeline (pipelines/__init__.py).
        source="hub:Intel/dpt-large@bc15f29aa3a80d532f2ed650b5e16ac48d8958f9",
        paper="arXiv:2103.13413",
        architecture={
            "patch_size": 16,
            "width": 1024,
            "depth": 24,
            "heads": 16,
            "class_token": True,
            "epsilon": _EPSILON,
        },
        small={"width": 32, "depth": 2, "heads": 2},
        files=("model.safetensors", "pytorch_model.bin"),
        features="last block and norm; class token seen by the patches, then dropped",
        image_sizes=(384,),
        small_image_size=64,
    ),
    "midas-v31-beit-l16-512": EncoderRow(
        family="beit",
        channels=1024,
        stride=16,
        image_size=512,
        mean=_HALF,
        std=_HALF,
        parameters=304_647_680,
        pretraining="BEiT, ImageNet-21k, then depth from a mixture of 12 data sets",
        licence="MIT",
        source="hub:Intel/dpt-beit-large-512@main",
        paper="arXiv:2307.14460",
        architecture={"patch_size": 16, "width": 1024, "depth": 24, "heads": 16},
        small={"width": 32, "depth": 2, "heads": 2},
        files=("model.safetensors", "pytorch_model.bin"),
        features="last block, no norm; class token seen by the patches, then dropped",
        image_sizes=(512,),
        small_image_size=64,
    ),
}
