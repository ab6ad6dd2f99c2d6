"""DINOv2, the self-supervised encoder of Cambrian-1.

Code: timm's vision transformer with layer scale (and, for giant, SwiGLU). Paper: "DINOv2: Learning Robust Visual
Features without Supervision", arXiv:2304.07193. Weights: Meta, Apache-2.0, learned at 518 pixels.

Other sizes resample the positions as DINOv2's own code does: bicubic, with a scale of (grid + 0.1) / 37. Plain
resampling to the target size moves embeddings by 0.022 and features by 0.017, and Cambrian-1 (arXiv:2406.16860), which
runs giant at 378, was trained with the former.
"""

from __future__ import annotations

from dataclasses import replace

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.vit import build_vit, fit_vit
from manyeyes.encoders.weights import join, join_qkv, rename, strip_prefix

_RULES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.([qkv])\w+\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.o_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.(gate|up)_proj\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (r"encoder\.layer\.(\d+)\.mlp\.(?:weights_out|down_proj)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
]


def dinov2_keys(tensors: TensorMap) -> TensorMap:
    """From transformers' layout (attention and SwiGLU fused or, since 5.x, apart), or timm's own, to timm's names."""
    published = strip_prefix(tensors, marker="embeddings.cls_token")
    if published:
        tensors = join_qkv(rename(published, _RULES))
        for kind in ("weight", "bias"):
            tensors = join(tensors, [f"mlp.gate.{kind}", f"mlp.up.{kind}"], f"mlp.fc1.{kind}")
    return tensors


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    return fit_vit(dinov2_keys(tensors), encoder, method="offset")


FAMILY = EncoderFamily(build=build_vit, convert=_convert)

_LARGE = EncoderRow(
    family="dinov2",
    channels=1024,
    stride=14,
    image_size=518,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    parameters=304_367_616,
    pretraining="self-distillation and masked patches, LVD-142M",
    licence="Apache-2.0",
    source="hub:facebook/dinov2-large@47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
    paper="arXiv:2304.07193",
    architecture={
        "patch_size": 14,
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "class_token": True,
        "layer_scale": 1.0,
    },
    small={"width": 32, "depth": 2, "heads": 2},
    features="last block and norm; class token seen by the patches, then dropped",
    image_sizes=(336, 378, 518),
    small_image_size=56,
)
_GIANT = replace(
    _LARGE,
    channels=1536,
    parameters=1_136_479_232,
    source="hub:facebook/dinov2-giant@611a9d42f2335e0f921f1e313ad3c1b7178d206d",
    architecture={
        "patch_size": 14,
        "width": 1536,
        "depth": 40,
        "heads": 24,
        "class_token": True,
        "layer_scale": 1.0,
        "swiglu": True,
        # Gate and value together: 2/3 of 4 times the width each, as a multiple of 8.
        "mlp_ratio": 16 / 3,
    },
    small={"width": 48, "depth": 2, "heads": 2},
)

ROWS: dict[str, EncoderRow] = {
    "dinov2-l14-336": replace(_LARGE, image_size=336, parameters=303_555_584),
    "dinov2-l14-378": replace(_LARGE, image_size=378, parameters=303_712_256),
    "dinov2-l14-518": _LARGE,
    "dinov2-g14-336": replace(_GIANT, image_size=336, parameters=1_135_261_184),
    "dinov2-g14-378": replace(_GIANT, image_size=378, parameters=1_135_496_192),
    "dinov2-g14-518": _GIANT,
}
