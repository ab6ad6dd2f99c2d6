"""What a user may get wrong, and the whole message: what was found, what was needed, what to do."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MptConfig

from manyeyes.errors import ManyEyesError, RecipeError, RecordError, ShapeError, SourceError
from manyeyes.fusion import build_fusion
from manyeyes.model import build_model
from manyeyes.model.connection import build_connection
from manyeyes.model.from_recipe import check_parts
from manyeyes.recipe import FusionSpec, ProjectorSpec, load_recipe, parse_overrides
from manyeyes.runtime.chat import CHAT_TEMPLATES, encode_conversation
from manyeyes.runtime.preprocess import decode_image
from manyeyes.runtime.tiling import TokenLayout, arrange_tokens
from tests.contract.test_fusions_reinjection import _batch, _model
from tests.model_toys import toy_config, toy_images, toy_spec, write_language_model, write_tokenizer


def message(kind: type[ManyEyesError], call: Callable[[], Any]) -> tuple[str, str, str]:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value.found, caught.value.needed, caught.value.do


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language_model"))


# --- grids that cannot be aligned ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "arguments", "expected"),
    [
        (
            "mixture-of-resolutions",
            {"grid": 24, "encoder_grids": [32, 64]},
            (
                "model.fusion.grid is 24 and the first encoder's grid is 32",
                "mixture-of-resolutions keeps the first encoder's grid",
                "Set model.fusion.grid to 32.",
            ),
        ),
        (
            "mixture-of-resolutions",
            {"grid": 24, "encoder_grids": [24, 37]},
            (
                "the first encoder's grid is 24 and the second's 37",
                "one must be a whole multiple of the other",
                "Change an image_size.",
            ),
        ),
        (
            "spatial-vision-aggregator",
            {"grid": 24, "encoder_grids": [24, 96], "options": {"query_grids": (7,)}},
            (
                "a group of 7 x 7 queries over a map of 24 cells a side",
                "a whole number of cells for each query is needed",
                "Change model.fusion.options.query_grids or windows.",
            ),
        ),
    ],
)
def test_grids_that_a_fusion_cannot_align(
    strategy: str, arguments: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    found = message(ShapeError, lambda: build_fusion(strategy, encoder_channels=[1024, 64], **arguments))
    assert found == expected


def test_grid_that_the_projector_cannot_fold() -> None:
    def build() -> None:
        build_connection(
            encoder_channels=[8],
            encoder_grids=[27],
            hidden_size=16,
            num_layers=1,
            fusion=FusionSpec(grid=27),
            projector=ProjectorSpec(kind="pixel-unshuffle"),
        )

    assert message(ShapeError, build) == (
        "pixel-unshuffle by 2 of a grid of 27",
        "a grid that is a multiple of the factor is needed",
        "Change model.fusion.grid or model.projector.options.factor.",
    )


# --- a recipe whose parts do not exist or do not fit, before any step ------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "kind", "expected"),
    [
        (
            ["model.encoders.0.encoder=vit-tiny-p16"],
            RecipeError,
            (
                'encoder is "vit-tiny-p16"',
                "no such encoder",
                'Did you mean "vit-tiny-p16-64"? List them with: manyeyes encoders',
            ),
        ),
        (
            ["model.fusion.strategy=channel-conct"],
            RecipeError,
            (
                'model.fusion.strategy is "channel-conct"',
                "no such fusion",
                'Did you mean "channel-concat"? List them with: manyeyes fusions',
            ),
        ),
        (
            ["model.fusion.options.align_corner=true"],
            RecipeError,
            (
                "model.fusion.options.align_corner",
                "no such option",
                'Did you mean "align_corners"? The options there are align_corners, average.',
            ),
        ),
        (
            ["model.projector.kind=resampler", "model.projector.options.num_query=4"],
            RecipeError,
            (
                "model.projector.options.num_query",
                "no such option",
                'Did you mean "num_queries"? The options there are depth, num_heads, num_queries.',
            ),
        ),
        (
            ["model.projector.options.depth=4"],
            RecipeError,
            ("model.projector.options.depth", "no such option", "mlp has no options."),
        ),
        (
            ["model.encoders.0.image_size=70"],
            ShapeError,
            ("image_size is 70", "a multiple of 16 is needed", "Use 64."),
        ),
        (
            ["model.fusion.strategy=patch-info-mining", "model.encoders=[{name: vit, encoder: vit-tiny-p16-64}]"],
            RecipeError,
            (
                'model.fusion.strategy is "patch-info-mining" with 1 encoder(s)',
                "at least 2 are needed",
                "Add an encoder, or use channel-concat.",
            ),
        ),
    ],
)
def test_recipe_with_a_wrong_part(
    overrides: list[str], kind: type[ManyEyesError], expected: tuple[str, str, str]
) -> None:
    spec = load_recipe("tiny").model
    tree = spec.model_dump(mode="json")
    for path, value in parse_overrides(overrides).items():
        node: Any = tree
        *parents, last = path.removeprefix("model.").split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value
    changed = type(spec).model_validate(tree)
    assert message(kind, lambda: check_parts(changed)) == expected


def test_unknown_chat_template_names_the_nearest_and_all() -> None:
    spec = load_recipe("tiny").model
    changed = spec.model_copy(update={"chat": spec.chat.model_copy(update={"template": "vicuna"})})
    found, needed, do = message(RecipeError, lambda: check_parts(changed))
    assert (found, needed) == ('chat template is "vicuna"', "no such template")
    assert do.startswith('Did you mean "vicuna_v1"? The templates are plain, vicuna_v1, ')


def test_parts_of_the_shipped_recipe_are_fine() -> None:
    check_parts(load_recipe("tiny").model)


# --- the language model -------------------------------------------------------------------------------------------


def test_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    toy_config(size - 1).save_pretrained(tmp_path)
    spec = toy_spec(tmp_path, language_model={"source": f"scratch:dir:{tmp_path}"})
    found, needed, do = message(SourceError, lambda: build_model(spec, snapshot_path=None, seed=0))
    assert found.startswith("tokenizer has 1 tokens beyond the language model's vocabulary (")
    assert found.endswith(f"is {size - 1})")
    assert needed == f"ids below {size - 1}, the rows of its embedding table"
    assert do.startswith("Use the tokenizer that belongs to the weights, or grow their table first")


def test_reinjection_into_layers_that_take_no_keywords() -> None:
    text_config = MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=4)
    assert message(RecipeError, lambda: _model(text_config)(**_batch())) == (
        "model.reinjection with a MptForCausalLM",
        "this family hands no further keywords down to its layers",
        "Drop model.reinjection, or use a language model that does, for instance Llama, Mistral, Qwen2 or Gemma.",
    )


# --- images -------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_decompression_bomb() -> None:
    found, needed, do = message(RecordError, lambda: decode_image(bomb()))
    assert found.startswith("image is too large (Image size (3600000000 pixels) exceeds limit of 178956970 pixels")
    assert (needed, do) == ("Pillow refuses it", "Shrink the image.")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_image(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    half = data[: len(data) // 2]
    found, needed, do = message(RecordError, lambda: decode_image(half))
    assert found.startswith(f"image of {len(half)} bytes cannot be decoded (")
    assert (needed, do) == ("a whole image file is needed", "Replace it.")


def test_bytes_that_are_no_image() -> None:
    found, needed, do = message(RecordError, lambda: decode_image(b"<html>not found</html>"))
    assert found == "22 bytes that start with b'<html>no' are not an image"
    assert needed.startswith("one of JPEG, PNG, ")
    assert do == "Replace the file."


def test_floating_point_image() -> None:
    data = encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    assert message(RecordError, lambda: decode_image(data)) == (
        "image has floating-point samples",
        "8 or 16 bits a sample are needed",
        "Convert it, saying what white is.",
    )


def test_image_that_unpadding_leaves_nothing_of() -> None:
    found, needed, do = message(RecordError, lambda: arrange_tokens(1, 4000, TokenLayout(unpad=True), grid=24))
    assert found.startswith("image is 1 x 4000 pixels")
    assert needed
    assert do


def oriented(colour: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (20, 10), colour), exif=exif.tobytes())


# Of a line one pixel wide, padded to a square, nothing is left after shrinking but the padding.
ODD = {
    "1x1": (encoded(Image.new("RGB", (1, 1), "red")), 1),
    "1x4000": (encoded(Image.new("RGB", (1, 4000), "red")), 0),
    "4000x1": (encoded(Image.new("RGB", (4000, 1), "red")), 0),
    "CMYK": (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=100), 1),
    "animated": (
        encoded(
            Image.new("RGB", (8, 8), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
        ),
        1,
    ),
    "EXIF": (oriented("red"), 1),
    "16-bit": (encoded(Image.fromarray(np.full((4, 4), 65535, np.uint16))), 1),
}


@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_odd_image_goes_through_the_whole_model(name: str, parts: tuple[Any, Any]) -> None:
    model, processor = parts
    data, red = ODD[name]
    batch = processor(images=data, text="what colour?", return_tensors="pt")
    assert model(**batch).logits.isfinite().all()
    assert batch["pixel_values.vit"][0, 0, 32, 32] == pytest.approx(red, abs=0.02)


@pytest.fixture(scope="module")
def parts(language_model: Path) -> tuple[Any, Any]:
    return build_model(toy_spec(language_model), snapshot_path=None, seed=0)


# --- images and their placeholders --------------------------------------------------------------------------------


@pytest.mark.parametrize(("placeholders", "images"), [(1, 0), (2, 1), (0, 1), (1, 3)])
def test_more_or_fewer_placeholders_than_images(placeholders: int, images: int, parts: tuple[Any, Any]) -> None:
    _, processor = parts
    turns = [("human", "<image>" * placeholders + "what?"), ("gpt", "yes")]
    assert message(RecordError, lambda: processor(images=toy_images(images), conversations=[turns])) == (
        f"conversations have [{placeholders}] <image> and {images} images",
        "one placeholder per image is needed",
        "Fix the conversations or the images.",
    )
    tokenizer = processor.tokenizer.backend_tokenizer
    template = CHAT_TEMPLATES["vicuna_v1"]

    def encode() -> None:
        encode_conversation(tokenizer, template, turns, image_tokens=[1] * images, image_token_id=0)

    assert message(RecordError, encode) == (
        f"conversation has {placeholders} <image> and {images} images",
        "one placeholder per image is needed",
        "Fix the record.",
    )
