"""CLIP ViT-L/14, the encoder of LLaVA, Mini-Gemini, Cambrian-1 and (changed) Eagle; and DFN-CLIP.

Code: timm's vision transformer with a norm before the first block and quick GELU. Paper: "Learning Transferable Visual
Models From Natural Language Supervision", arXiv:2103.00020. Weights: OpenAI, MIT.

Which layer: LLaVA (arXiv:2310.03744), Mini-Gemini and Cambrian-1 take the last block but one and drop the class token
afterwards; ablations of LLaVA give it 1 point over the last. Eagle's released code runs all blocks, never shows the
class token to the patches, takes no norm at the end, and runs what it calls 448 at 336 (github.com/NVlabs/Eagle,
issue 22): rows ``...-eagle``. Its paper (arXiv:2408.15998) resamples the positions to 448.

DFN-CLIP, of Cambrian-1's study of 23 encoders (arXiv:2406.16860), is the same network, trained on data that a network
filtered ("Data Filtering Networks", arXiv:2309.17425). Weights: Apple, for research; open_clip's own layout of a vision
transformer, which is not timm's. Cambrian-1 takes the tokens after the last norm.
"""

from __future__ import annotations

from dataclasses import replace

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.vit import build_vit, fit_vit
from manyeyes.encoders.weights import from_transformers_clip, rename, strip_prefix

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_LLAVA = {
    "patch_size": 14,
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "class_token": True,
    "layer": -2,
    "activation": "quick_gelu",
    "epsilon": 1e-5,
    "pre_norm": True,
    "final_norm": False,
}
_EAGLE = {**_LLAVA, "class_token": False, "layer": -1}


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    published = strip_prefix(tensors, marker="embeddings.class_embedding")
    return fit_vit(from_transformers_clip(published) if published else tensors, encoder)


FAMILY = EncoderFamily(build=build_vit, convert=_convert)

_ROW = EncoderRow(
    family="clip",
    channels=1024,
    stride=14,
    image_size=336,
    mean=MEAN,
    std=STD,
    parameters=290_909_184,
    pretraining="contrastive, 400 M image-text pairs (WIT)",
    licence="MIT",
    source="hub:openai/clip-vit-large-patch14-336@ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    paper="arXiv:2103.00020",
    architecture=_LLAVA,
    small={"width": 32, "depth": 3, "heads": 2},
    files=("pytorch_model.bin", "model.safetensors"),
    features="block 23 of 24, no norm; class token seen by the patches, then dropped",
    image_sizes=(336, 448),
    small_image_size=56,
)
_EAGLE_ROW = replace(
    _ROW,
    parameters=303_503_360,
    architecture=_EAGLE,
    features="block 24 of 24, no norm; no class token",
)

ROWS: dict[str, EncoderRow] = {
    "clip-l14-224": replace(
        _ROW,
        image_size=224,
        image_sizes=(224,),
        parameters=290_581_504,
        files=("model.safetensors", "pytorch_model.bin"),
        source="hub:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
    ),
    "clip-l14-336": _ROW,
    "clip-l14-448": replace(_ROW, image_size=448, parameters=291_367_936),
    "clip-l14-336-eagle": _EAGLE_ROW,
    "clip-l14-448-eagle": replace(_EAGLE_ROW, image_size=448, parameters=303_962_112),
}

_DFN_BLOCK = r"transformer\.resblocks\.(\d+)\."
_DFN_RULES = [
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"ln_post\.(weight|bias)", r"norm.\1"),
    (_DFN_BLOCK + r"ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (_DFN_BLOCK + r"attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (_DFN_BLOCK + r"attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_DFN_BLOCK + r"mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_DFN_BLOCK + r"mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
]


def _convert_dfn(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    published = strip_prefix(tensors, marker="conv1.weight")
    if published:
        tensors = rename(published, _DFN_RULES)
        for key in ("cls_token", "pos_embed"):
            if key in tensors:
                tensors[key] = tensors[key].reshape(1, -1, tensors[key].shape[-1])
    return fit_vit(tensors, encoder)


DFN_FAMILY = EncoderFamily(build=build_vit, convert=_convert_dfn)

_DFN_ARCHITECTURE = {
    "patch_size": 14,
    "heads": 16,
    "class_token": True,
    "activation": "quick_gelu",
    "epsilon": 1e-5,
    "pre_norm": True,
}
_DFN_LARGE = EncoderRow(
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
    architecture={**_DFN_ARCHITECTURE, "width": 1024, "depth": 24},
    small={"width": 32, "depth": 2, "heads": 2},
    files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    features="last block and norm; class token seen by the patches, then dropped",
    image_sizes=(224,),
    small_image_size=56,
)

DFN_ROWS: dict[str, EncoderRow] = {
    "dfn-clip-l14-224": _DFN_LARGE,
    "dfn-clip-h14-378": replace(
        _DFN_LARGE,
        channels=1280,
        image_size=378,
        image_sizes=(378,),
        parameters=631_371_520,
        pretraining="contrastive, DFN-5B (a network filtered the pairs)",
        source="hub:apple/DFN5B-CLIP-ViT-H-14-378@01b771ed0d1395ca5ffdd279897d665ebe00dfd2",
        architecture={**_DFN_ARCHITECTURE, "width": 1280, "depth": 32},
    ),
}
