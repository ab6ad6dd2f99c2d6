"""Vision transformers trained on labels alone, as in Cambrian-1's study of 23 encoders (arXiv:2406.16860).

Code and weights: timm (Apache-2.0), ImageNet-21k at 224 pixels. Papers: "An Image is Worth 16x16 Words",
arXiv:2010.11929 (H/14) and "How to train your ViT?", arXiv:2106.10270 (L/16).
"""

from __future__ import annotations

from manyeyes.encoders.encoder import EncoderRow

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
