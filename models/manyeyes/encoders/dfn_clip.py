"""CLIP trained on data that a network filtered (DFN), of Cambrian-1's study of 23 encoders (arXiv:2406.16860).

Code: timm's vision transformer with a norm before the first block and quick GELU. Paper: "Data Filtering Networks",
arXiv:2309.17425. Weights: Apple, for research; open_clip's own layout of a vision transformer, which is not timm's.
Cambrian-1 takes the tokens after the last norm.
"""

from __future__ import annotations

from dataclasses import replace

from manyeyes.encoders.clip import MEAN, STD
from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.vit import build_vit, fit_vit
from manyeyes.encoders.weights import rename, strip_prefix

_BLOCK = r"transformer\.resblocks\.(\d+)\."
_RULES = [
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"ln_post\.(weight|bias)", r"norm.\1"),
    (_BLOCK + r"ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (_BLOCK + r"attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
]


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    published = strip_prefix(tensors, marker="conv1.weight")
    if published:
        tensors = rename(published, _RULES)
        for key in ("cls_token", "pos_embed"):
            if key in tensors:
                tensors[key] = tensors[key].reshape(1, -1, tensors[key].shape[-1])
    return fit_vit(tensors, encoder)


FAMILY = EncoderFamily(build=build_vit, convert=_convert)

_ARCHITECTURE = {
    "patch_size": 14,
    "heads": 16,
    "class_token": True,
    "activation": "quick_gelu",
    "epsilon": 1e-5,
    "pre_norm": True,
}
_LARGE = EncoderRow(
    family="dfn-clip",
    channels=1024,
    stride=14,
    image_size=224,
    mean=MEAN,
    std=STD,
    parameters=303_179_776,
    pretraining="contrastive, DFN-2B (a network filtered the pairs)",
    licence="Apple, research only",
    source="hub:apple/DFN2B-CLIP-ViT-L-14@main",
    paper="arXiv:2309.17425",
    architecture={**_ARCHITECTURE, "width": 1024, "depth": 24},
    small={"width": 32, "depth": 2, "heads": 2},
    files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    features="last block and norm; class token seen by the patches, then dropped",
    image_sizes=(224,),
    small_image_size=56,
)

ROWS: dict[str, EncoderRow] = {
    "dfn-clip-l14-224": _LARGE,
    "dfn-clip-h14-378": replace(
        _LARGE,
        channels=1280,
        image_size=378,
        image_sizes=(378,),
        parameters=631_371_520,
        pretraining="contrastive, DFN-5B (a network filtered the pairs)",
        source="hub:apple/DFN5B-CLIP-ViT-H-14-378@01b771ed0d1395ca5ffdd279897d665ebe00dfd2",
        architecture={**_ARCHITECTURE, "width": 1280, "depth": 32},
    ),
}
