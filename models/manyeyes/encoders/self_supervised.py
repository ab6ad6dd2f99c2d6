"""MAE, I-JEPA and MoCo v3, of Cambrian-1's study of 23 encoders (arXiv:2406.16860).

Code: timm's vision transformer. Papers: "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377;
"Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", arXiv:2301.08243; "An Empirical
Study of Training Self-Supervised Vision Transformers", arXiv:2104.02057. Weights: Meta, CC BY-NC 4.0.

MAE sees the whole image here: nothing is masked and its decoder is left out. I-JEPA has no class token; of Meta's own
file the target encoder is taken. MoCo v3's fixed sine positions are weights like any others.
"""

from __future__ import annotations

from dataclasses import replace

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.vit import build_vit, fit_vit
from manyeyes.encoders.weights import from_transformers_vit, strip_prefix

_LEFT_OUT = ("decoder_", "mask_token")


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From transformers' layout, or timm's with the publisher's prefix (``module.base_encoder.``) or without."""
    published = strip_prefix(tensors, marker="embeddings.patch_embeddings.projection.weight")
    if published:
        return fit_vit(from_transformers_vit(published), encoder)
    state = strip_prefix(tensors, marker="patch_embed.proj.weight") or tensors
    return fit_vit({key: tensor for key, tensor in state.items() if not key.startswith(_LEFT_OUT)}, encoder)


FAMILY = EncoderFamily(build=build_vit, convert=_convert)

_SEEN = "last block and norm; class token seen by the patches, then dropped"
_MAE_LARGE = EncoderRow(
    family="self-supervised",
    channels=1024,
    stride=16,
    image_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    parameters=303_301_632,
    pretraining="masked patches to pixels, ImageNet-1k",
    licence="CC-BY-NC-4.0",
    source="hub:timm/vit_large_patch16_224.mae@main",
    paper="arXiv:2111.06377",
    architecture={"patch_size": 16, "width": 1024, "depth": 24, "heads": 16, "class_token": True},
    small={"width": 32, "depth": 2, "heads": 2},
    entry="model",
    features=_SEEN,
    image_sizes=(224,),
    small_image_size=64,
)
_HUGE = {"patch_size": 14, "width": 1280, "depth": 32, "heads": 16}
_MOCO_LARGE = replace(
    _MAE_LARGE,
    pretraining="contrastive between two views, ImageNet-1k",
    source="hub:nyu-visionx/moco-v3-vit-l@7bf75358d616f39b9716148bf4e3425f3bd35b47",
    paper="arXiv:2104.02057",
    entry="state_dict",
)

ROWS: dict[str, EncoderRow] = {
    "mae-l16-224": _MAE_LARGE,
    "mae-h14-224": replace(
        _MAE_LARGE,
        channels=1280,
        stride=14,
        parameters=630_764_800,
        source="hub:timm/vit_huge_patch14_224.mae@main",
        architecture={**_HUGE, "class_token": True},
        small_image_size=56,
    ),
    "ijepa-h14-224": replace(
        _MAE_LARGE,
        channels=1280,
        stride=14,
        parameters=630_762_240,
        pretraining="features of hidden blocks from those of seen ones, ImageNet-1k",
        # Pinned alike by several public repositories.
        source="hub:facebook/ijepa_vith14_1k@f157467ea509bc356ff9f61fd3c0d840eec5e04e",
        paper="arXiv:2301.08243",
        architecture=_HUGE,
        entry="target_encoder",
        features="last block and norm; there is no class token",
        small_image_size=56,
    ),
    "moco-v3-b16-224": replace(
        _MOCO_LARGE,
        channels=768,
        parameters=85_798_656,
        source="hub:nyu-visionx/moco-v3-vit-b@7d091cd70772c5c0ecf7f00b5f12ca609a99d69d",
        architecture={"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "class_token": True},
    ),
    "moco-v3-l16-224": _MOCO_LARGE,
}
