"""One input for all encoders: from image bytes to what each encoder sees, against the formula."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from manyeyes.encoders import encoder_transform
from manyeyes.errors import ShapeError
from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor, build_model
from tests.model_toys import toy_spec, write_language_model

ENCODERS = [
    {"name": "coarse", "encoder": "vit-tiny-p16-64", "image_size": 48},
    {"name": "base", "encoder": "efficientnet-lite0", "image_size": 96, "fill": [10, 200, 30]},
]
FUSION = {"strategy": "channel-concat", "grid": 3}
MEAN, STD = np.full((3, 1, 1), 127 / 255), np.full((3, 1, 1), 128 / 255)
FILL = (10, 200, 30)
MINING: dict[str, Any] = {
    "fusion": {"strategy": "patch-info-mining", "grid": 3, "options": {"image_grid": 2}},
    "layout": {"tiling": "grid", "whole": ["base"]},
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language-model"))


def picture(width: int, height: int, *, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def build(folder: Path, /, **changes: Any) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    spec = toy_spec(folder, **{"preprocess": "shared", "encoders": ENCODERS, "fusion": FUSION, **changes})
    return build_model(spec, snapshot_path=None, seed=3)


def seen_by_encoders(
    model: ManyEyesForConditionalGeneration, pixels: dict[str, torch.Tensor]
) -> dict[str, NDArray[np.float64]]:
    """What reaches each encoder's forward."""
    seen: dict[str, NDArray[np.float64]] = {}
    hooks = [
        encoder.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].double().numpy())  # type: ignore[misc]
        )
        for name, encoder in model.encoders.items()
    ]
    with torch.no_grad():
        model.encoder_features(pixels)
    for hook in hooks:
        hook.remove()
    return seen


def base_tensor(data: bytes, size: int) -> NDArray[np.float64]:
    """Padded to a square of the base encoder's colour, resized by Pillow, normalised: ``[3, size, size]``."""
    image = Image.open(io.BytesIO(data))
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), FILL)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return (pixels.transpose(2, 0, 1) / 255 - MEAN) / STD


def weights(source: int, target: int, *, align_corners: bool, antialias: bool) -> NDArray[np.float64]:
    """Bilinear interpolation of a line of ``source`` pixels to ``target``, as a matrix ``[target, source]``."""
    places, matrix = np.arange(source), np.zeros((target, source))
    for pixel in range(target):
        ratio = (source - 1) / (target - 1) if align_corners else source / target
        centre = pixel * ratio if align_corners else (pixel + 0.5) * ratio - 0.5
        reach = max(1.0, ratio) if antialias else 1.0
        centre = centre if antialias else min(max(centre, 0.0), source - 1.0)
        row = np.clip(1 - np.abs(places - centre) / reach, 0, None)
        matrix[pixel] = row / row.sum()
    return matrix


def interpolate(pixels: NDArray[np.float64], target: int, **how: bool) -> NDArray[np.float64]:
    matrix = weights(pixels.shape[-1], target, **how)
    return matrix @ pixels @ matrix.T


@pytest.mark.parametrize(
    ("align_corners", "antialias"), [(True, False), (False, False), (False, True)], ids=["eagle", "plain", "antialias"]
)
def test_encoders_see_the_interpolated_base(align_corners: bool, antialias: bool, language_model: Path) -> None:
    how = {"align_corners": align_corners, "antialias": antialias}
    model, processor = build(language_model, shared={"base": "base", **how})
    data = picture(100, 60)
    pixels = processor.pixel_values([data])
    assert {name: list(values.shape) for name, values in pixels.items()} == {"shared": [1, 3, 96, 96]}
    expected = base_tensor(data, 96)
    np.testing.assert_allclose(pixels["shared"][0].numpy(), expected, atol=1e-5)
    seen = seen_by_encoders(model, pixels)
    np.testing.assert_array_equal(seen["base"][0], pixels["shared"][0].double().numpy())
    np.testing.assert_allclose(seen["coarse"][0], interpolate(expected, 48, **how), atol=2e-5)


def test_the_first_encoder_is_the_base_and_the_largest_gives_the_size(language_model: Path) -> None:
    model, processor = build(language_model)
    assert model.config.shared_pixels.model_dump() == {"image_size": 96, "align_corners": True, "antialias": False}
    row = encoder_transform("vit-tiny-p16-64", image_size=96)
    assert processor.image_transforms == {"shared": row}


def test_prealigned_alone_an_encoder_sees_what_it_sees_in_company(language_model: Path) -> None:
    spec = toy_spec(language_model, preprocess="shared", encoders=ENCODERS, fusion=FUSION, shared={"base": "base"})
    alone, processor = build_model(spec, snapshot_path=None, seed=3, encoders=["coarse"])
    together, _ = build_model(spec, snapshot_path=None, seed=3)
    pixels = processor.pixel_values([picture(80, 50)])
    np.testing.assert_array_equal(
        seen_by_encoders(alone, pixels)["coarse"], seen_by_encoders(together, pixels)["coarse"]
    )


def test_mini_gemini_cuts_tiles_from_the_shared_tensor(language_model: Path) -> None:
    """Global view from the canvas of the tiles; the large encoder sees the whole."""
    how = {"align_corners": False, "antialias": False}
    encoders = [ENCODERS[0], {**ENCODERS[1], "image_size": 192}]
    model, processor = build(language_model, encoders=encoders, shared={"base": "base", **how}, **MINING)
    images = [picture(100, 60), picture(50, 90, seed=1)]
    batch = processor(images=images, text=["what?", "what?"])
    assert batch["pixel_values.shared"].shape == (2, 3, 192, 192)
    assert batch["image_spans"][:, 2].tolist() == [45, 45]
    seen = seen_by_encoders(model, {"shared": batch["pixel_values.shared"]})
    assert seen["coarse"].shape == (10, 3, 48, 48)
    assert seen["base"].shape == (2, 3, 192, 192)
    for place, data in enumerate(images):
        canvas = interpolate(base_tensor(data, 192), 96, **how)
        views = [interpolate(canvas, 48, **how)]
        views += [canvas[:, row : row + 48, column : column + 48] for row in (0, 48) for column in (0, 48)]
        np.testing.assert_allclose(seen["coarse"][5 * place : 5 * place + 5], views, atol=2e-5)


def test_anyres_makes_one_shared_tensor_a_tile(language_model: Path) -> None:
    model, processor = build(
        language_model,
        layout={"tiling": "anyres", "newline": True, "unpad": True},
        language_model={"source": f"dir:{language_model}", "max_length": 512},
    )
    batch = processor(images=[picture(200, 90)], text="what?")
    assert batch["pixel_values.shared"].shape == (4, 3, 96, 96)
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 1


def test_pixels_for_encoders_are_refused(language_model: Path) -> None:
    model, _ = build(language_model)
    with pytest.raises(ShapeError, match=r"for \['shared'\] is needed"):
        model.encoder_features({"coarse": torch.zeros(1, 3, 48, 48), "base": torch.zeros(1, 3, 96, 96)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": {"base": "bse"}}, 'Did you mean "base"'),
        ({"shared": {"antialias": True}}, "antialias needs align_corners false"),
        ({"preprocess": "independent", "shared": {}}, "shared belongs to preprocess shared"),
        ({"encoders": [{**ENCODERS[0], "name": "shared"}]}, 'no encoder may have the name "shared"'),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        toy_spec(Path("nowhere"), **{"preprocess": "shared", "encoders": ENCODERS, **changes})
