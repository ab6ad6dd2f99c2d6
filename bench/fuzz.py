"""Broken inputs by the thousand, from a fixed seed: images, records, and both through ``data import``.

``python -m bench.fuzz images|records|import [NUMBER]`` feeds them to the product and counts what became of them, by
kind. Each must end in a result or in an error that a user can read; anything else is printed and ends the run with exit
code 1.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from manyeyes.errors import RecordError

SEED = 20240517

# What a format can be written with, besides its defaults, so that its other decoders are reached too.
_OPTIONS: Mapping[str, tuple[dict[str, object], ...]] = {
    "JPEG": ({"progressive": True}, {"quality": 20, "optimize": True}),
    "PNG": ({"compress_level": 0},),
    "WEBP": ({"lossless": True}, {"save_all": True}),
    "AVIF": ({"quality": 20}, {"save_all": True}),
    "GIF": ({"save_all": True},),
    "TIFF": tuple({"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4")),
    "TGA": ({"compression": "tga_rle"},),
    "JPEG2000": ({"irreversible": True},),
    "ICO": ({"bitmap_format": "bmp", "sizes": [(16, 16)]},),
}
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO", "ICO", "TGA", "DIB")
_MODES = ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F")


def whole_images() -> dict[str, bytes]:
    """A small image in every format that Pillow can write and open, in each mode and with each option that it takes."""
    Image.init()
    rows, columns = np.mgrid[0:17, 0:26]
    pixels = np.stack([columns * 9 % 256, rows * 14 % 256, rows * columns % 256], axis=-1).astype(np.uint8)
    photo = Image.fromarray(pixels)
    files = {}
    for kind in sorted(set(Image.SAVE) & {*Image.OPEN, "MPO"}):  # the plugin of JPEG opens MPO
        for mode in _MODES:
            grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
            image = Image.fromarray(grey) if mode == "I;16" else photo.convert(mode)
            for number, options in enumerate(({}, *_OPTIONS.get(kind, ()))):
                more = {"append_images": [image.rotate(180)]} if options.get("save_all") or kind == "MPO" else {}
                buffer = io.BytesIO()
                try:
                    image.save(buffer, kind, **{**options, **more})
                    with Image.open(io.BytesIO(buffer.getvalue())) as again:
                        again.load()
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # not in this mode, or not with this option
                files[f"{kind}/{mode}/{number}"] = buffer.getvalue()
    return files


def broken_images(number: int, *, seed: int = SEED) -> Iterator[tuple[str, str, bytes]]:
    """Files with one byte changed, cut, joined, or with a piece left out or put in twice.

    Args:
        number: How many.
        seed: The same seed gives the same files, with one version of Pillow.

    Yields:
        Format, kind of damage, and bytes; formats in turn.
    """
    draw = random.Random(seed)
    of_format: dict[str, list[bytes]] = {}
    for name, data in whole_images().items():
        of_format.setdefault(name.partition("/")[0], []).append(data)
    everything = [data for files in of_format.values() for data in files]
    # Of the formats that the product does not read, the first bytes are all that it looks at.
    kinds = [kind for kind in sorted(of_format) for _ in range(4 if kind in _READ else 1)]
    for place in range(number):
        kind = kinds[place % len(kinds)]
        data = draw.choice(of_format[kind])
        damage = draw.choice(("byte", "byte", "byte", "cut", "join", "left out", "twice"))
        # Headers are where the branches are.
        at = draw.randrange(min(len(data), 96)) if draw.random() < 0.5 else draw.randrange(len(data))
        end = min(len(data), at + draw.randrange(1, 16))
        if damage == "byte":
            data = data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]
        elif damage == "cut":
            data = data[:at]
        elif damage == "join":
            other = draw.choice(everything)
            data = data[:at] + other[draw.randrange(len(other)) :]
        elif damage == "left out":
            data = data[:at] + data[end:]
        else:
            data = data[:end] + data[at:]
        yield kind, damage, data


def fuzz_images(number: int) -> tuple[Counter[str], list[str]]:
    """Every caller that opens a file, on broken images.

    Returns:
        How many ended how, and a line for each that ended otherwise than it may.
    """
    from manyeyes.data.contamination.fingerprints import make_thumbnail
    from manyeyes.data.records import ImageFile, SampleProblem, find_decoding_problem, read_image_file
    from manyeyes.runtime.preprocess import ImageTransform, decode_image, measure_file, read_image_size, transform_image

    def measure_otherwise(data: bytes) -> None:
        """Sizes found without keeping pixels, against those of the pixels."""
        try:
            expected = (read_image_size(data), decode_image(data).shape[1::-1])
        except RecordError as error:
            with contextlib.suppress(RecordError):
                raise ValueError(f"measured as {measure_file(data)}, although {error}")  # noqa: B904
            raise
        if measure_file(data) != expected:
            raise ValueError(f"measured as {measure_file(data)} and not {expected}")

    transform = ImageTransform(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    callers: dict[str, Callable[[bytes], object]] = {
        "decode_image": decode_image,
        "transform_image": lambda data: transform_image(decode_image(data), transform),
        "make_thumbnail": make_thumbnail,
        "read_image_file": lambda data: read_image_file(data, path="x"),
        "measure_file": measure_otherwise,
        "find_decoding_problem": lambda data: find_decoding_problem([ImageFile(data, "x", "", 26, 17)]),
    }
    counts: Counter[str] = Counter()
    faults = []
    for place, (kind, damage, data) in enumerate(broken_images(number)):
        for name, call in callers.items():
            try:
                result = call(data)
                ended = "refused" if isinstance(result, SampleProblem) else "read"
            except RecordError as error:
                ended = "refused" if error.__cause__ is None else f"refused ({type(error.__cause__).__name__})"
            except Exception as error:  # noqa: BLE001  (the subject of the search)
                ended = "FAULT"
                faults.append(f"{place}: {kind}, {damage}, {name}: {type(error).__name__}: {error}")
            counts[f"{name}: {ended}"] += 1
    return counts, faults


def main() -> None:
    """Run one of them and print its counts."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in _FUZZERS:
        raise SystemExit(f"usage: python -m bench.fuzz {'|'.join(_FUZZERS)} [NUMBER]")
    warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
    counts, faults = _FUZZERS[what](int(sys.argv[2]) if len(sys.argv) > 2 else 4000)
    for name, count in sorted(counts.items()):
        print(f"{count:8,}  {name}")
    print("\n".join(faults[:20]))
    raise SystemExit(f"{len(faults)} faults" if faults else 0)


def _fuzz_records(number: int) -> tuple[Counter[str], list[str]]:
    from bench.fuzz_records import fuzz_records

    return fuzz_records(number)


def _fuzz_import(number: int) -> tuple[Counter[str], list[str]]:
    from bench.fuzz_import import fuzz_import

    return fuzz_import(number)


_FUZZERS: dict[str, Callable[[int], tuple[Counter[str], list[str]]]] = {
    "images": fuzz_images,
    "records": _fuzz_records,
    "import": _fuzz_import,
}

if __name__ == "__main__":
    main()
