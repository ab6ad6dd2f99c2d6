from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from manyeyes.errors import BundleError, RecordError
from manyeyes.runtime import preprocess
from manyeyes.runtime.preprocess import (
    ImageTransform,
    decode_image,
    normalize_pixels,
    read_decoded_size,
    resize_image,
    transform_image,
)

HALF = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 24) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 5 % 256, rows * 9 % 256, (rows + columns) * 3 % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_png_is_decoded_without_loss_and_can_be_written_to() -> None:
    image = photo()
    decoded = decode_image(encode(image))
    assert decoded.dtype == np.uint8
    assert decoded.shape == (24, 40, 3)
    np.testing.assert_array_equal(decoded, np.asarray(image))
    decoded[0, 0] = 7


def test_cmyk_jpeg_becomes_rgb() -> None:
    red_cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode_image(encode(red_cmyk, "JPEG", quality=95))
    assert decoded.shape == (16, 16, 3)
    np.testing.assert_allclose(decoded[8, 8], [255, 0, 0], atol=3)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    samples = np.array([[0, 257, 32896, 65535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(samples)))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 128, 255])


def test_sixteen_bit_netpbm_is_scaled_too() -> None:
    decoded = decode_image(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 32896, 65535))
    np.testing.assert_array_equal(decoded[0, :, 1], [0, 128, 255])


def test_thirty_two_bit_integers_beyond_sixteen_are_refused() -> None:
    with pytest.raises(RecordError, match="samples from 0 to 100000"):
        decode_image(encode(Image.fromarray(np.array([[0, 100_000]], np.int32)), "TIFF"))


def test_floating_point_samples_are_refused() -> None:
    with pytest.raises(RecordError, match="floating-point"):
        decode_image(encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_exif_orientation_is_applied() -> None:
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    decoded = decode_image(encode(image, exif=exif.tobytes()))
    np.testing.assert_array_equal(decoded, np.rot90(np.asarray(image), -1))


def test_transparent_palette_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    decoded = decode_image(encode(image, transparency=0))
    np.testing.assert_array_equal(decoded[0], [[255, 255, 255], [200, 100, 50]])


def test_half_transparent_black_over_white_is_grey() -> None:
    decoded = decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    np.testing.assert_array_equal(decoded[0, 0], [127, 127, 127])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    np.testing.assert_array_equal(decoded[4, 4], [255, 0, 0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_half_a_file_is_refused(kind: str) -> None:
    data = encode(photo(64, 64), kind)
    with pytest.raises(RecordError):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        decode_image(data)


def test_a_broken_png_checksum_is_refused() -> None:
    data = bytearray(encode(photo()))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(RecordError):
        decode_image(bytes(data))


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it holds side * side pixels."""

    def chunk(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_decompression_bomb_is_refused_before_its_pixels_are_read() -> None:
    with pytest.raises(RecordError, match="too large"):
        decode_image(bomb(60_000))


def test_max_pixels_is_the_users_to_set() -> None:
    data = encode(photo(40, 24))
    assert decode_image(data, max_pixels=960).shape == (24, 40, 3)
    with pytest.raises(RecordError, match="40 x 24"):
        decode_image(data, max_pixels=959)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4000), (4000, 1), (9000, 3), (40, 24)])
def test_any_shape_becomes_the_encoders_square(fit: str, width: int, height: int) -> None:
    transform = ImageTransform(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), fit=fit)  # type: ignore[arg-type]
    pixels = transform_image(decode_image(encode(Image.new("RGB", (width, height), (51, 102, 153)))), transform)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.float32
    assert np.isfinite(pixels).all()
    if fit != "pad" or width == height:
        np.testing.assert_allclose(
            pixels[:, 4, 4], [(0.2 - 0.5) / 0.2, (0.4 - 0.4) / 0.2, (0.6 - 0.3) / 0.2], atol=1e-6
        )


def test_padding_is_the_mean_colour_on_both_sides() -> None:
    transform = ImageTransform(size=8, mean=(0.5, 0.25, 0.75), std=(1, 1, 1), fit="pad", resample="bilinear")
    resized = resize_image(np.full((2, 8, 3), 255, np.uint8), transform)
    np.testing.assert_array_equal(resized[0, 0], [127, 63, 191])
    np.testing.assert_array_equal(resized[3:5], 255)
    np.testing.assert_array_equal(resized[5:], np.broadcast_to([127, 63, 191], (3, 8, 3)))


def test_padding_may_have_another_colour_than_the_mean() -> None:
    """Cambrian-1 pads SigLIP's images with CLIP's mean colour and normalises them with 0.5."""
    transform = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fill=(122, 116, 104))
    for image in (np.full((2, 8, 3), 255, np.uint8), np.full((8, 2, 3), 255, np.uint8)):
        resized = resize_image(image, transform)
        np.testing.assert_array_equal(resized[[0, 0, -1, -1], [0, -1, 0, -1]], [[122, 116, 104]] * 4)


def test_colour_of_the_padding_is_stated_in_json() -> None:
    clip = ImageTransform(size=8, mean=(0.48145466, 0.4578275, 0.40821073), std=(1, 1, 1))
    assert clip.as_dict()["fill"] == [122, 116, 104]
    before_there_was_a_choice = {name: value for name, value in clip.as_dict().items() if name != "fill"}
    assert ImageTransform.from_dict(before_there_was_a_choice) == clip
    assert ImageTransform.from_dict({**clip.as_dict(), "fill": [1, 2, 3]}).fill_colour == (1, 2, 3)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(100, 60, 24), (201, 333, 224), (90, 61, 336), (500, 375, 512), (61, 300, 56)]
)
def test_crop_equals_resize_of_the_short_side_then_centre_crop(width: int, height: int, size: int) -> None:
    image = photo(width, height)
    transform = ImageTransform(size=size, mean=(0, 0, 0), std=(1, 1, 1), fit="crop")
    short = min(width, height)
    across, down = int(size * width / short), int(size * height / short)
    whole = np.asarray(image.resize((across, down), Image.Resampling.BICUBIC))
    left, top = (across - size) // 2, (down - size) // 2
    kept = whole[top : top + size, left : left + size]
    np.testing.assert_array_equal(resize_image(np.asarray(image), transform), kept)


def test_crop_of_a_very_long_image_differs_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    image, transform = np.asarray(photo(90, 61)), ImageTransform(size=48, mean=(0, 0, 0), std=(1, 1, 1), fit="crop")
    whole = resize_image(image, transform)
    monkeypatch.setattr(preprocess, "_MOST_SCALED_PIXELS", 0)
    np.testing.assert_allclose(resize_image(image, transform).astype(int), whole.astype(int), atol=2)


def test_normalisation_is_that_of_the_definition() -> None:
    transform = ImageTransform(size=2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), fit="stretch")
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    expected = (image.astype(np.float64) / 255 - transform.mean) / transform.std
    np.testing.assert_allclose(transform_image(image, transform), expected.transpose(2, 0, 1), atol=1e-6)


def test_normalisation_rounds_as_published_preprocessing_does() -> None:
    transform = ImageTransform(
        size=16, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    )
    image = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    # Transformers 4: scaled in double precision, then in single precision.
    mean, std = np.array(transform.mean, np.float32), np.array(transform.std, np.float32)
    expected = ((image * (1 / 255)).astype(np.float32) - mean) / std
    np.testing.assert_array_equal(normalize_pixels(image, transform), expected.transpose(2, 0, 1))


def test_normalising_a_batch_equals_normalising_each() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(normalize_pixels(images, HALF), [normalize_pixels(image, HALF) for image in images])


def test_transform_survives_json() -> None:
    assert ImageTransform.from_dict(HALF.as_dict()) == HALF


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"std": [1, 1, 0]},
        {"mean": [0, 0]},
        {"resample": "nearest"},
        {"fit": "fill"},
        {"fill": [0, 0]},
        {"fill": [0, 0, 256]},
        {"extra": 1},
    ],
)
def test_wrong_transform_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        ImageTransform.from_dict({**HALF.as_dict(), **change})


def test_wrong_array_is_refused() -> None:
    with pytest.raises(RecordError, match="float32"):
        resize_image(np.zeros((4, 4, 3), np.float32), HALF)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(9), 77])
def test_the_decoded_size_is_known_before_decoding(kind: str, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = encode(photo(), kind, exif=exif)
    height, width, _ = decode_image(data).shape
    assert read_decoded_size(data) == (width, height)


def test_of_a_jpeg_the_header_says_the_decoded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "decode_image", None)
    assert read_decoded_size(encode(photo(), "JPEG")) == (40, 24)
