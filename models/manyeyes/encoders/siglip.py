"""SigLIP, the first encoder of Cambrian-1.

Code: timm's vision transformer without class token; its attention pool is not used. Paper: "Sigmoid Loss for Language
Image Pre-Training", arXiv:2303.15343. Weights: Google, Apache-2.0.

GELU is exact, as timm builds these two and Cambrian-1 ran them (arXiv:2406.16860); transformers approximates it with
tanh, which moves features by about 1e-3. At 384 pixels SO400M/14 sees 27 x 27 patches; the last 6 pixels of a side are
left over. Cambrian-1 pads with CLIP's mean colour, not with grey.
"""

from __future__ import annotations

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.vit import build_vit, fit_vit
from manyeyes.encoders.weights import from_transformers_clip, strip_prefix


def siglip_keys(tensors: TensorMap) -> TensorMap:
    """From transformers' layout, from open_clip's (``visual.trunk.``), or timm's own, to timm's names."""
    published = strip_prefix(
        {key: tensor for key, tensor in tensors.items() if not key.startswith("text_model.")},
        marker="embeddings.patch_embedding.weight",
    )
    if published:
        return from_transformers_clip(published)
    return strip_prefix(tensors, marker="patch_embed.proj.weight") or tensors


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    return fit_vit(siglip_keys(tensors), encoder)


FAMILY = EncoderFamily(build=build_vit, convert=_convert)

_HALF = (0.5, 0.5, 0.5)
_FEATURES = "last block and norm; there is no class token, the attention pool is left out"

ROWS: dict[str, EncoderRow] = {
    "siglip-l16-384": EncoderRow(
        family="siglip",
        channels=1024,
        stride=16,
        image_size=384,
        mean=_HALF,
        std=_HALF,
        parameters=303_688_704,
        pretraining="sigmoid contrastive, WebLI",
        licence="Apache-2.0",
        source="hub:google/siglip-large-patch16-384@ce005573a40965dfd21fd937fbdeeebf2439fc35",
        paper="arXiv:2303.15343",
        architecture={"patch_size": 16, "width": 1024, "depth": 24, "heads": 16},
        small={"width": 32, "depth": 2, "heads": 2},
        features=_FEATURES,
        image_sizes=(384,),
        small_image_size=64,
    ),
    "siglip-so400m14-384": EncoderRow(
        family="siglip",
        channels=1152,
        stride=14,
        image_size=384,
        mean=_HALF,
        std=_HALF,
        parameters=412_987_248,
        pretraining="sigmoid contrastive, WebLI",
        licence="Apache-2.0",
        source="hub:timm/ViT-SO400M-14-SigLIP-384@ac16108d567c4389e6cd2b11c9b8585f7474435b",
        paper="arXiv:2303.15343",
        architecture={"patch_size": 14, "width": 1152, "depth": 27, "heads": 16, "mlp_ratio": 3.7362, "ragged": True},
        small={"width": 32, "depth": 2, "heads": 2},
        files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"),
        features=_FEATURES,
        image_sizes=(384,),
        small_image_size=60,
    ),
}
