"""High resolution: tiles, newlines, unpadding, and the fusions behind them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from manyeyes.errors import BundleError, RecipeError, RecordError
from manyeyes.model import ManyEyesForConditionalGeneration, build_model, load_checkpoint, save_checkpoint
from manyeyes.model.connection import VisualTokens
from manyeyes.processor import ManyEyesProcessor
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.tiling import NEWLINE, PINPOINTS, TokenLayout, arrange_tokens, choose_grid, tile_image
from tests.model_toys import toy_spec, write_language_model

PLAIN = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="stretch")
AGGREGATOR = {
    "strategy": "spatial-vision-aggregator",
    "grid": 4,
    "options": {"channels": 16, "num_heads": 4, "depth": 1},
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language-model"))


def _image(width: int, height: int, *, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _build(folder: Path, /, **changes: Any) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    return build_model(toy_spec(folder, **changes), snapshot_path=None, seed=3)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (672, 672, (2, 2)),
        (1000, 300, (3, 1)),
        (300, 1000, (1, 3)),
        (640, 480, (2, 2)),
        # All grids keep every pixel of a small image; 2 x 1 and 1 x 2 waste fewest, and the first listed wins.
        (100, 100, (1, 2)),
        (600, 300, (2, 1)),
    ],
)
def test_anyres_chooses_the_grid_that_keeps_most(width: int, height: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, pinpoints=PINPOINTS, tile_size=336) == grid


def test_tiles_come_whole_first_then_row_by_row() -> None:
    layout = TokenLayout(tiling="anyres", tile_size=8, pinpoints=((2, 2),))
    image = _image(16, 16)
    tiles = tile_image(image, PLAIN, layout, encoder="a")
    assert tiles.shape == (5, 8, 8, 3)
    corners = [image[:8, :8], image[:8, 8:], image[8:, :8], image[8:, 8:]]
    assert np.array_equal(tiles[1:], corners)
    assert np.array_equal(tile_image(image, PLAIN, TokenLayout(tiling="grid"), encoder="a"), tiles)
    assert np.array_equal(tile_image(image, PLAIN, TokenLayout(), encoder="a"), tiles[:1])


def test_anyres_keeps_the_aspect_ratio_on_black_and_squeezes_the_whole() -> None:
    layout = TokenLayout(tiling="anyres", tile_size=8, pinpoints=((2, 1),))
    tiles = tile_image(np.full((8, 8, 3), 255, np.uint8), PLAIN, layout, encoder="a")
    joined = np.concatenate([tiles[1], tiles[2]], axis=1)
    assert np.array_equal(joined[0, :, 0], [0] * 4 + [255] * 8 + [0] * 4)
    assert bool((tiles[0] == 255).all())


def test_anyres_tokens_are_the_whole_then_the_joined_tiles_unpadded_with_newlines() -> None:
    layout = TokenLayout(tiling="anyres", tile_size=8, pinpoints=((2, 1),), newline=True, unpad=True)
    # 2 x 1 tiles of 2 x 2 tokens: 2 rows of 4. A square image fills int(8 * 2 / 8) = 2 of 4 columns.
    places = arrange_tokens(8, 8, layout, grid=2)
    assert places.tolist() == [0, 1, 2, 3, 5, 8, NEWLINE, 7, 10, NEWLINE]
    wide = arrange_tokens(16, 8, layout, grid=2)
    assert wide.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (123, 457), (500, 500)])
def test_unpadded_tokens_are_those_that_llava_keeps(width: int, height: int) -> None:
    layout = TokenLayout(tiling="anyres", newline=True, unpad=True)
    columns, rows = layout.tiles(width, height)
    places = arrange_tokens(width, height, layout, grid=24)
    wide, high = columns * 24, rows * 24
    if width / height > wide / high:
        high -= 2 * ((high - int(height * (wide / width))) // 2)
    else:
        wide -= 2 * ((wide - int(width * (high / height))) // 2)
    assert len(places) == 576 + high * (wide + 1)
    assert int((places == NEWLINE).sum()) == high
    assert len(set(places[places >= 0].tolist())) == 576 + high * wide


def test_mini_gemini_hd_has_2880_tokens_tile_after_tile() -> None:
    places = arrange_tokens(900, 600, TokenLayout(tiling="grid"), grid=24)
    assert np.array_equal(places, np.arange(2880))


def test_cambrian_has_600_tokens_and_fewer_of_a_padded_image() -> None:
    layout = TokenLayout(newline=True, unpad=True)
    assert len(arrange_tokens(100, 100, layout, grid=24)) == 600
    assert len(arrange_tokens(640, 480, layout, grid=24)) == 18 * 25
    assert len(arrange_tokens(480, 640, layout, grid=24)) == 24 * 19


def test_a_single_tile_may_have_one_newline_at_its_end_as_in_llava() -> None:
    layout = TokenLayout(newline=True, newline_at="end")
    assert arrange_tokens(640, 480, layout, grid=2).tolist() == [0, 1, 2, 3, NEWLINE]
    assert len(arrange_tokens(100, 30, layout, grid=24)) == 577


def test_an_image_that_is_all_padding_is_refused() -> None:
    with pytest.raises(RecordError, match="4000 x 1 pixels"):
        arrange_tokens(4000, 1, TokenLayout(unpad=True), grid=24)


def test_layout_survives_json() -> None:
    layout = TokenLayout(
        tiling="anyres", pinpoints=((1, 2),), newline=True, newline_at="end", whole=("a",), tile_size=64
    )
    assert TokenLayout.from_dict(layout.as_dict()) == layout
    # As written before there was a choice of where newlines stand.
    assert TokenLayout.from_dict({"tiling": "none", "newline": True}).newline_at == "rows"
    with pytest.raises(BundleError, match="tile"):
        TokenLayout.from_dict({"tile": 3})


LAYOUTS: dict[str, dict[str, Any]] = {
    "anyres": {"tiling": "anyres", "newline": True, "unpad": True},
    "grid": {"tiling": "grid"},
    "newline": {"newline": True, "unpad": True},
}
FUSIONS: dict[str, dict[str, Any]] = {
    "channel-concat": {"strategy": "channel-concat", "grid": 4},
    "patch-info-mining": {"strategy": "patch-info-mining", "grid": 4},
    "deformable-mining": {"strategy": "deformable-mining", "grid": 4},
    "spatial-vision-aggregator": AGGREGATOR,
}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiling_composes_with_fusions_in_training_and_generation(
    fusion: str, layout: str, language_model: Path, tmp_path: Path
) -> None:
    reinjection = {"stride": 1} if fusion == "spatial-vision-aggregator" else None
    model, processor = _build(
        language_model,
        fusion=FUSIONS[fusion],
        layout=LAYOUTS[layout],
        reinjection=reinjection,
        language_model={"source": f"dir:{language_model}", "max_length": 512},
    )
    images = [_image(90, 40), _image(64, 64, seed=1), _image(30, 90, seed=2)]
    turns = [
        [("human", "<image>\nwhat <image> is it?"), ("gpt", "red")],
        [("human", "<image>\nshape?"), ("gpt", "a circle")],
    ]
    batch = processor(images=images, conversations=turns)
    assert batch["layout"].shape[0] == 3
    lengths = batch["image_spans"][:, 2].tolist()
    if layout == "newline":
        # int(40 * 4 / 90) = 1 row, (4 - 1) // 2 = 1 of padding at either end: 2 rows of 5; columns likewise.
        assert lengths == [2 * 5, 4 * 5, 4 * 3]
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert model.newline is None or bool(model.newline.grad.any())
    model.eval()
    digest = save_checkpoint(model, processor, tmp_path / "checkpoint")
    loaded, loaded_processor = load_checkpoint(tmp_path / "checkpoint")
    asked = loaded_processor(images=[images[0]], text="shape?")
    with torch.no_grad():
        answers = [one.generate(**asked, max_new_tokens=3, do_sample=False) for one in (model, loaded)]
    assert torch.equal(*answers)
    assert len(digest) == 64


@torch.no_grad()
def test_an_image_gives_the_same_tokens_in_any_company(language_model: Path) -> None:
    model, processor = _build(language_model, layout=LAYOUTS["anyres"])
    first, second = _image(90, 40), _image(30, 90, seed=2)
    sizes = [(90, 40), (30, 90)]
    together = model.encode_images(processor.pixel_values([first, second]), **processor.size_inputs(sizes))
    alone = model.encode_images(processor.pixel_values([second]), **processor.size_inputs(sizes[1:]))
    assert isinstance(together, torch.Tensor)
    assert isinstance(alone, torch.Tensor)
    length = alone.shape[1]
    torch.testing.assert_close(together[1, :length], alone[0])


@torch.no_grad()
def test_high_definition_mining_sees_the_whole_image_once(language_model: Path) -> None:
    model, processor = _build(
        language_model,
        encoders=[
            {"name": "low", "encoder": "vit-tiny-p16-64"},
            {"name": "high", "encoder": "efficientnet-lite0", "image_size": 256},
        ],
        fusion={"strategy": "patch-info-mining", "grid": 4, "options": {"image_grid": 2}},
        layout={"tiling": "grid", "whole": ["high"]},
    )
    batch = processor(images=[_image(90, 40), _image(40, 80)], text=["what?", "what?"])
    assert batch["pixel_values.low"].shape == (10, 3, 64, 64)
    assert batch["pixel_values.high"].shape == (2, 3, 256, 256)
    assert batch["image_spans"][:, 2].tolist() == [80, 80]
    features = model.encoder_features({name: batch[f"pixel_values.{name}"] for name in ("low", "high")})
    assert features["high"].shape[-1] == 16
    tokens = model.fuse(features, layout=batch["layout"])
    assert tokens.shape[:2] == (2, 80)
    # Another pixel in the bottom right quarter moves the whole view and the last tile only.
    changed = {**features, "high": features["high"].clone()}
    changed["high"][0, :, 12:, 12:] += 1
    moved = (model.fuse(changed, layout=batch["layout"]) - tokens)[0].abs().sum(-1).view(5, 16).any(-1)
    assert moved.tolist() == [True, False, False, False, True]


@torch.no_grad()
def test_padding_is_masked_with_the_sizes_that_the_processor_sends(language_model: Path) -> None:
    fusion = {**AGGREGATOR, "options": {**AGGREGATOR["options"], "mask_padding": True}}  # type: ignore[dict-item]
    model, processor = _build(language_model, fusion=fusion, layout=LAYOUTS["newline"], reinjection={"stride": 1})
    batch = processor(images=[_image(90, 40)], text="what?")
    assert batch["image_sizes"].tolist() == [[90, 40]]
    visual = model.encode_images(
        {name: batch[f"pixel_values.{name}"] for name in ("vit", "efficientnet")},
        image_sizes=batch["image_sizes"],
        layout=batch["layout"],
    )
    assert isinstance(visual, VisualTokens)
    assert visual.cells.tolist() == [[4, 5, 6, 7, -1, 8, 9, 10, 11, -1]]
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 1


def test_conversations_need_the_sizes_of_their_images(language_model: Path) -> None:
    _, processor = _build(language_model, layout=LAYOUTS["anyres"])
    with pytest.raises(RecordError, match="without their sizes"):
        processor.encode([("human", "<image>\nwhat?")], num_images=1)
    encoded = processor.encode([("human", "<image>\nwhat?")], num_images=1, image_sizes=[(64, 64)])
    assert math.isclose(encoded.image_spans[0][1], len(processor.size_inputs([(64, 64)])["layout"][0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": {"strategy": "sequence-append", "grid": 4}, "layout": {"newline": True}}, "no one square grid"),
        ({"projector": {"kind": "resampler"}, "layout": {"tiling": "anyres"}}, "no one square grid"),
        ({"layout": {"tiling": "grid", "whole": ["vitt"]}}, 'Did you mean "vit"'),
        ({"layout": {"tiling": "grid", "whole": ["vit"]}}, "cut by patch-info-mining"),
        ({"layout": {"tiling": "grid", "whole": ["vit", "efficientnet"]}}, "one must see tiles"),
        (
            {
                "fusion": {**AGGREGATOR, "options": {"channels": 16, "num_heads": 4, "mask_padding": True}},
                "layout": {"tiling": "anyres"},
            },
            "whole images, not in tiles",
        ),
    ],
)
def test_what_cannot_be_laid_out_says_why(changes: dict[str, Any], message: str, language_model: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        _build(language_model, **changes)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tiling": "grid", "newline": True}, "no rows for newline"),
        ({"tiling": "anyres", "whole": ["vit"]}, "whole belongs to tiling grid"),
        ({"newline_at": "end"}, "newline_at end belongs to newline true"),
        ({"newline": True, "newline_at": "end", "unpad": True}, "newline_at end belongs to newline true"),
        ({"newline": True, "newline_at": "end", "tiling": "anyres"}, "newline_at end belongs to newline true"),
    ],
)
def test_a_recipe_refuses_layouts_that_contradict_themselves(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_spec(Path("nowhere"), layout=layout)
