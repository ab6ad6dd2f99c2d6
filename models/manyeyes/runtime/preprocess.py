"""From the bytes of an image file to the pixels that an encoder takes.

Decoding happens once an image (``decode_image``), resizing once an encoder (``resize_image``), both on ``uint8``.
``normalize_pixels`` is the only arithmetic in floating point. Pixels can therefore be kept as ``uint8`` and
normalised later with the same result, bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from manyeyes.errors import BundleError, RecordError
from manyeyes.runtime.bundle_contents import EncoderPixels, read_part

MAX_PIXELS = 178_956_970
"""Pixels above which an image is refused: where Pillow itself refuses (0.5 GiB of RGB)."""

# Formats that Pillow decodes on its own. EPS, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO", "ICO", "TGA", "DIB")
_WHITE = (255, 255, 255, 255)
# Longest side that is padded to a square as it is; longer images are shrunk to it first, to bound memory.
_LONGEST_PADDED_SIDE = 8192
# Pixels of an image scaled for a centre crop up to which the whole is scaled, as published preprocessing does it.
_MOST_SCALED_PIXELS = 2**26
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageTransform:
    """How one encoder wants its pixels.

    Attributes:
        size: Side of the square output, in pixels.
        mean: Mean of each RGB channel, on a scale of 0 to 1.
        std: Standard deviation of each RGB channel, on a scale of 0 to 1.
        resample: Filter; antialiased when shrinking.
        fit: ``stretch`` ignores the aspect ratio. ``crop`` fits the short side and keeps the centre. ``pad`` puts
            the image in the centre of a square of one colour first, as LLaVA-1.5 does (arXiv:2310.03744).
        fill: That colour, RGB, 0 to 255. Left out, the mean colour, ``int(255 * mean)``; always set afterwards.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["stretch", "crop", "pad"] = "pad"
    fill: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            found, needed = problem
            raise BundleError(f"image transform has {found}", needed, "Fix the encoder's row or preprocess.json.")
        object.__setattr__(self, "fill", self.fill_colour)

    @property
    def fill_colour(self) -> tuple[int, int, int]:
        """Colour around an image that is padded, RGB, 0 to 255."""
        if self.fill is not None:
            return self.fill
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue

    def _problem(self) -> tuple[str, str] | None:
        if self.size < 1:
            return f"size {self.size}", "a size of at least 1 pixel is needed"
        if len(self.mean) != 3 or len(self.std) != 3:
            return f"{len(self.mean)} means and {len(self.std)} standard deviations", "three of each are needed"
        if min(self.std) <= 0:
            return f"std {self.std}", "standard deviations above 0 are needed"
        if self.resample not in _RESAMPLING:
            return f'resample "{self.resample}"', f"one of {', '.join(_RESAMPLING)} is needed"
        if self.fit not in ("stretch", "crop", "pad"):
            return f'fit "{self.fit}"', "one of stretch, crop, pad is needed"
        if self.fill is not None and (len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill)):
            return f"fill {self.fill}", "three values from 0 to 255 are needed"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "fill": list(self.fill_colour)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageTransform:
        """Read what ``as_dict`` wrote.

        Raises:
            BundleError: A field is unknown, missing, of another type or out of range.
        """
        return cls(**dict(read_part(EncoderPixels, values, what="image transform")))


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file to RGB.

    The EXIF orientation is applied. Transparency (alpha channel, or a palette's or PNG's transparent colour) is laid
    over white. CMYK and other colour spaces are converted without colour profiles. 16-bit grey is scaled by 1/257.
    Of an animation or a multi-page file, the first frame counts.

    Args:
        data: The file's bytes.
        max_pixels: Width times height above which the image is refused before its pixels are read. Pillow warns
            from 89 million pixels on and refuses from 179 million on, whatever this says.

    Returns:
        ``[H, W, 3]``, uint8, RGB, contiguous and writable.

    Raises:
        RecordError: Not an image, truncated, broken, too large, or of floating-point samples.
    """
    with _opened(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise RecordError(
                f"image is {width} x {height} pixels",
                f"at most {max_pixels} pixels are read",
                "Shrink the image, or raise max_pixels if you trust it.",
            )
        image.load()
        # In place, or an image that needs no turning would be copied.
        ImageOps.exif_transpose(image, in_place=True)
        decoded = _to_rgb(image)
    if 0 in decoded.shape:
        raise RecordError(f"image is {width} x {height} pixels", "at least one pixel is needed", "Replace the file.")
    return decoded


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file, in pixels, as it stores them: from its header, before an EXIF rotation.

    Args:
        data: The file's bytes.

    Raises:
        RecordError: Not an image, or a broken header.
    """
    with _opened(data) as image:
        return image.size


def read_decoded_size(data: bytes) -> tuple[int, int]:
    """Width and height that ``decode_image`` gives, in pixels; of a JPEG its header alone is read.

    Args:
        data: The file's bytes.

    Raises:
        RecordError: As ``decode_image``; pixels that are broken in a JPEG are not seen.
    """
    with _opened(data) as image:
        if image.format == "JPEG":
            width, height = image.size
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (height, width) if lies_on_its_side else (width, height)
    height, width, _ = decode_image(data).shape
    return width, height


def measure_file(data: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of an image file as it stores them and as ``decode_image`` gives them, in pixels.

    All of it is decoded, a JPEG at the least of its sizes: that reads every bit of the file in half the time.

    Args:
        data: The file's bytes.

    Raises:
        RecordError: As ``decode_image``.
    """
    with suppress(RecordError), _opened(data) as image:
        stored = image.size
        if image.format == "JPEG" and stored[0] * stored[1] <= MAX_PIXELS:
            image.draft(None, (1, 1))
            image.load()
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            ImageOps.exif_transpose(image, in_place=True)
            return stored, stored[::-1] if lies_on_its_side else stored
    height, width, _ = decode_image(data).shape
    return read_image_size(data), (width, height)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image file, open; whatever is wrong with it inside the block is a ``RecordError``."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            yield image
    except RecordError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecordError(f"image is too large ({error})", "Pillow refuses it", "Shrink the image.") from error
    except UnidentifiedImageError as error:
        raise RecordError(
            f"{len(data)} bytes that start with {data[:8]!r} are not an image",
            f"one of {', '.join(_formats())} is needed",
            "Replace the file.",
        ) from error
    # Pillow names no errors that its plugins keep to: on broken bytes they raise what their parsers and libraries do
    # (RuntimeError for AVIF, struct.error, MemoryError, ...), and the next plugin something else. Nothing of ours runs
    # in here.
    except Exception as error:
        said = str(error) or type(error).__name__
        raise RecordError(
            f"image of {len(data)} bytes cannot be decoded ({said})", "a whole image file is needed", "Replace it."
        ) from error


def resize_image(image: NDArray[np.uint8], transform: ImageTransform) -> NDArray[np.uint8]:
    """Resize to the encoder's square; pixels stay ``uint8``.

    Args:
        image: ``[H, W, 3]``, uint8, RGB.
        transform: Size, filter and fit.

    Returns:
        ``[size, size, 3]``, uint8, RGB.

    Raises:
        RecordError: ``image`` has another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise RecordError(
            f"image is {image.dtype} of shape {list(image.shape)}",
            "uint8 of shape [H, W, 3] is needed",
            "Make it with manyeyes.runtime.preprocess.decode_image.",
        )
    size, resampling = transform.size, _RESAMPLING[transform.resample]
    picture = Image.fromarray(image)
    if transform.fit == "pad":
        picture = _pad_to_square(picture, transform)
    if transform.fit == "crop":
        return np.array(_crop_to_square(picture, size, resampling))
    return np.array(picture.resize((size, size), resampling))


def normalize_pixels(pixels: NDArray[np.uint8], transform: ImageTransform) -> NDArray[np.float32]:
    """Scale to mean 0 and standard deviation 1, channels first.

    Args:
        pixels: ``[..., H, W, 3]``, uint8.
        transform: Mean and standard deviation.

    Returns:
        ``[..., 3, H, W]``, float32, contiguous.
    """
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (transform.mean, transform.std))
    channels_first = np.moveaxis(pixels, -1, -3)
    normalized = np.empty(channels_first.shape, np.float32)
    # Rounded as published preprocessing rounds (torchvision's, and transformers' of images): one factor and one offset
    # give pixels that differ in the last bits, and small models logits that differ by up to 1e-4.
    np.divide(channels_first, np.float32(255), out=normalized, dtype=np.float32)
    normalized -= mean
    normalized /= std
    return normalized


def transform_image(image: NDArray[np.uint8], transform: ImageTransform) -> NDArray[np.float32]:
    """Resize, then normalise: what one encoder takes.

    Args:
        image: ``[H, W, 3]``, uint8, RGB.
        transform: The encoder's.

    Returns:
        ``[3, size, size]``, float32.

    Raises:
        RecordError: ``image`` has another shape or dtype.
    """
    return normalize_pixels(resize_image(image, transform), transform)


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(image)
    if image.mode == "F":
        raise RecordError(
            "image has floating-point samples", "8 or 16 bits a sample are needed", "Convert it, saying what white is."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _sixteen_bit_to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    # Pillow's own conversion clips at 255 instead of scaling: almost everything would turn white.
    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise RecordError(
            f"image has samples from {samples.min()} to {samples.max()}",
            "8 or 16 bits a sample are needed",
            "Convert it, saying what white is.",
        )
    grey = ((samples + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _pad_to_square(picture: Image.Image, transform: ImageTransform) -> Image.Image:
    width, height = picture.size
    if width == height:
        return picture
    longest = max(width, height)
    if longest > _LONGEST_PADDED_SIDE:
        scale = _LONGEST_PADDED_SIDE / longest
        shrunk = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(shrunk, _RESAMPLING[transform.resample])
        width, height = picture.size
        longest = max(width, height)
    square = Image.new("RGB", (longest, longest), transform.fill_colour)
    square.paste(picture, ((longest - width) // 2, (longest - height) // 2))
    return square


def _crop_to_square(picture: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    scaled_width, scaled_height = int(size * width / short), int(size * height / short)
    left, top = (scaled_width - size) // 2, (scaled_height - size) // 2
    if scaled_width * scaled_height <= _MOST_SCALED_PIXELS:
        scaled = picture.resize((scaled_width, scaled_height), resampling)
        return scaled.crop((left, top, left + size, top + size))
    # The part of a very long image that would be kept. Pillow places its filter by a box of 32-bit floats, which moves
    # some pixels by one or two of 255.
    x, y = width / scaled_width, height / scaled_height
    box = (left * x, top * y, min(width, (left + size) * x), min(height, (top + size) * y))
    return picture.resize((size, size), resampling, box=box)
