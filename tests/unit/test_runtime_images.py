"""What may be passed as an image, and what is said about everything else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manyeyes.errors import RecordError
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.preprocess import decode_image
from manyeyes.runtime.vision import read_images

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def file_of(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_one_picture_is_the_same_in_every_form(tmp_path: Path) -> None:
    data, picture = file_of(Image.fromarray(PIXELS)), Image.fromarray(PIXELS)
    (tmp_path / "a.png").write_bytes(data)
    forms = [data, bytearray(data), memoryview(data), tmp_path / "a.png", str(tmp_path / "a.png"), picture, PIXELS]
    forms.append(np.asfortranarray(PIXELS))
    for file in read_images(forms):
        np.testing.assert_array_equal(decode_image(file), PIXELS)
    for form in forms:
        (file,) = read_images(form)
        np.testing.assert_array_equal(decode_image(file), PIXELS)
    assert len(read_images(np.stack([PIXELS, PIXELS]))) == 2
    assert read_images([]) == read_images(()) == ()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "HSV"])
def test_a_picture_of_pillow_gives_the_pixels_of_its_file(mode: str) -> None:
    picture = Image.fromarray(PIXELS).convert("L") if mode == "I;16" else Image.fromarray(PIXELS)
    picture = picture.convert(mode)
    (file,) = read_images([picture])
    expected = picture.convert("RGB") if mode in ("CMYK", "YCbCr", "HSV") else picture
    np.testing.assert_array_equal(decode_image(file), decode_image(file_of(expected)))


def test_a_turned_picture_is_turned_back_as_its_file_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(PIXELS), exif=exif)
    (file,) = read_images([Image.open(io.BytesIO(data))])
    np.testing.assert_array_equal(decode_image(file), decode_image(data))
    assert decode_image(file).shape == (7, 5, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([PIXELS.astype(np.float32) / 255], r"float32; \[H, W, 3\] of uint8.* Scale it"),
        ([PIXELS[..., 0]], r"\[5, 7\] of uint8"),
        ([np.zeros((5, 7, 4), np.uint8)], r"\[5, 7, 4\]"),
        ([np.moveaxis(PIXELS, 2, 0)], "channels last"),
        ([np.zeros((0, 7, 3), np.uint8)], r"\[0, 7, 3\]"),
        ([np.array(["a.png"])], "Scale it|array"),
        ([None], r"images\[0\] is None"),
        ([PIXELS, None], r"images\[1\] is None"),
        ([[PIXELS]], r"images\[0\] is list"),
        ([{"bytes": b""}], r"images\[0\] is dict"),
        ([1], r"images\[0\] is int"),
        (None, "images is None"),
        (7, "images is int"),
        ({"a": PIXELS}, "images is dict"),
        (["no such file.png"], "cannot be read"),
        (["n" * 5000], "cannot be read"),
        (["a\0b"], "cannot be read"),
        (["."], "cannot be read"),
        ([Path("no such file.png")], "No such file"),
        ([Image.new("F", (2, 2))], "floating-point"),
    ],
)
def test_what_is_no_image_is_named(images: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_images(images)


@pytest.mark.parametrize("questions", ["one text", (1,), (None,), (b"bytes",), None])
def test_questions_that_are_no_texts_are_refused(questions: Any) -> None:
    with pytest.raises(RecordError, match="questions is"):
        Group(images=(), questions=questions)
