"""Tiles, newlines and unpadding in a bundle: visual tokens and answers as in torch, whatever an image's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyeyes.errors import BundleError, RecordError
from manyeyes.export.graphs import export_vision
from manyeyes.export.parity import measure_parity
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Bundle, Group, load_bundle
from manyeyes.runtime.bundle_contents import VISION, EncoderPixels, ImageLayout, PreprocessFile
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.sessions import CPU, Graph
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.runtime.vision import Vision
from tests.export_toys import Toy, make_groups, make_model, make_toy, picture

SIZES = [(150, 50), (64, 64), (50, 150), (90, 64)]
ANYRES = TokenLayout(tiling="anyres", newline=True, unpad=True, tile_size=64)
GRID = TokenLayout(tiling="grid")
WHOLE = TokenLayout(tiling="grid", whole=("fine",))

# Two transformers are exported in half the time of the other toys' encoders.
VITS = {"coarse": "vit-tiny-p16-64", "fine": "vit-tiny-p16-64"}
FINE = {"coarse": 64, "fine": 128}
CASES: dict[str, dict[str, Any]] = {
    "mixture-anyres": {
        "fusion": {"strategy": "mixture-of-resolutions", "grid": 4, "options": {"num_groups": 2}},
        "layout": ANYRES,
    },
    "deformable-shared-grid": {
        "fusion": {"strategy": "deformable-mining", "grid": 4, "options": {"num_heads": 4, "num_points": 2}},
        "layout": GRID,
        "shared": {"image_size": 160, "align_corners": True, "antialias": False},
    },
    "mining-whole": {
        "fusion": {"strategy": "patch-info-mining", "grid": 4, "options": {"image_grid": 2}},
        "layout": WHOLE,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_runtime_and_graph_give_the_models_visual_tokens(case: str, tmp_path: Path) -> None:
    model, processor = make_model(encoders=VITS, sides=FINE, **CASES[case])
    transforms = processor.image_transforms
    sides = {name: transform.size for name, transform in transforms.items()}
    assert processor.layout is not None
    export_vision(model, sides, tmp_path / "vision.onnx", opset=20)
    vision = Vision(
        Graph(tmp_path / "vision.onnx", providers=[CPU], threads=1),
        transforms,
        layout=TokenLayout.from_dict(processor.layout),
        tile_tokens=model.num_image_tokens,
    )
    images = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    found = vision.encode(images)
    with torch.no_grad():
        for image, size, own in zip(images, SIZES, found, strict=True):
            expected = model.encode_images(processor.pixel_values([image]), **processor.size_inputs([size]))
            assert isinstance(expected, torch.Tensor)
            np.testing.assert_allclose(own.tokens, expected[0].numpy(), atol=1e-4)
    assert not any(len(own.looks) for own in found)
    if case == "mixture-anyres":
        assert len({len(own.tokens) for own in found}) > 1
    else:
        assert {len(own.tokens) for own in found} == {5 * 16}


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Toy:
    return make_toy(
        tmp_path_factory.mktemp("anyres"),
        tiny_recipe,
        encoders=VITS,
        fusion={"strategy": "channel-concat", "grid": 2},
        layout=ANYRES,
        max_length=192,
    )


@pytest.fixture(scope="module")
def loaded(anyres: Toy) -> Bundle:
    return load_bundle(anyres.bundle, threads=1)


def test_bundle_with_tiles_answers_as_torch_token_for_token(anyres: Toy) -> None:
    report = measure_parity(anyres.checkpoint, anyres.bundle, make_groups(), items=1000, max_new_tokens=8)
    assert report.items == sum(len(group.questions) for group in make_groups())
    assert report.token_match == 1.0, report.mismatches
    assert report.max_abs_logit < 1e-4


def test_an_image_has_the_same_tokens_in_any_company(loaded: Bundle) -> None:
    images = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    together = loaded.encode_images(images)
    assert len({len(image.tokens) for image in together}) > 1
    for data, image in zip(images, together, strict=True):
        np.testing.assert_allclose(loaded.encode_images([data])[0].tokens, image.tokens, atol=1e-5)
    assert [len(image.tokens) for image in loaded.encode_images(images, batch_size=3)] == [
        len(image.tokens) for image in together
    ]


def test_tiles_and_newlines_are_seen(loaded: Bundle) -> None:
    """Else equality with torch would say little: fine detail and the shape change the answer."""
    answers = loaded.answer_groups(
        [Group((picture(2, *size),), ("red?",)) for size in SIZES], max_new_tokens=8, first_logits=True
    )
    logits = [group[0].first_logits for group in answers]
    for place, own in enumerate(logits):
        for other in logits[:place]:
            assert own is not None
            assert other is not None
            assert float(np.abs(own - other).max()) > 1e-2


def test_an_image_that_is_all_padding_is_refused(loaded: Bundle) -> None:
    with pytest.raises(RecordError, match="4000 x 1 pixels"):
        loaded.answer("red?", images=[picture(0, 4000, 1)])


def test_files_say_how_images_are_cut(anyres: Toy) -> None:
    written = PreprocessFile.model_validate_json((anyres.bundle / "preprocess.json").read_text(encoding="utf-8"))
    assert written.layout is not None
    assert TokenLayout.from_dict(written.layout.model_dump()) == ANYRES
    vision = {value.name: value.shape for value in anyres.manifest.graphs[VISION].inputs}
    assert vision == {
        "coarse": ["tiles", 3, 64, 64],
        "fine": ["tiles", 3, 64, 64],
        "layout": ["images", "places"],
    }


def test_files_have_every_field_of_what_they_describe() -> None:
    transform = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert set(ImageLayout.model_fields) == set(TokenLayout().as_dict())
    assert set(EncoderPixels.model_fields) == set(transform.as_dict())


def test_graph_without_the_layout_that_is_described_is_refused(toy_bundle: Toy) -> None:
    graph = Graph(toy_bundle.bundle / VISION, providers=[CPU], threads=1)
    transform = ImageTransform(size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(BundleError, match=r"\['efficientnet', 'layout', 'vit'\]"):
        Vision(graph, dict.fromkeys(("vit", "efficientnet"), transform), layout=ANYRES, tile_tokens=4)
