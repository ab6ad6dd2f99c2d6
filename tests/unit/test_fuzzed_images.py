from __future__ import annotations

import io

import pytest
from PIL import Image

from bench.fuzz import fuzz_images, whole_images
from bench.fuzz_import import fuzz_import
from manyeyes.data.records import SampleProblem, find_decoding_problem, read_image_file
from manyeyes.errors import RecordError
from manyeyes.runtime.preprocess import decode_image, read_image_size

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata


def test_broken_images_of_every_format_end_in_pixels_or_in_a_refusal() -> None:
    counts, faults = fuzz_images(600)
    assert faults == []
    assert counts["decode_image: read"] > 50
    assert sum(count for name, count in counts.items() if name.startswith("decode_image: refused")) > 200


def test_odd_items_are_imported_and_valid_or_put_aside_with_a_reason() -> None:
    counts, faults = fuzz_import(500)
    assert faults == []
    assert counts["kept"] > 50
    assert counts["quarantined: bad image"] > 50


def test_every_format_that_is_read_is_among_the_broken_ones() -> None:
    read = set()
    for name, data in whole_images().items():
        try:
            decode_image(data)
        except RecordError:
            continue
        read.add(name.partition("/")[0])
    assert read >= {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}


def test_a_damaged_avif_is_refused_whatever_its_decoder_raises() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 30, 90)).save(buffer, "AVIF")
    causes = set()
    for place in range(len(buffer.getvalue())):
        data = bytearray(buffer.getvalue())
        data[place] ^= 0xFF
        try:
            decode_image(bytes(data))
        except RecordError as error:
            causes.add(type(error.__cause__))
    assert RuntimeError in causes


@pytest.mark.parametrize("error", [RuntimeError("x"), SyntaxError(), MemoryError(), EOFError("y"), StopIteration()])
def test_whatever_a_plugin_of_pillow_raises_names_the_file(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    for call in (decode_image, read_image_size, lambda data: read_image_file(data, path="a.avif")):
        with pytest.raises(RecordError, match=str(error) or type(error).__name__):
            call(b"data")


def test_the_file_is_opened_once_more_without_a_fault_after_it_was_decoded() -> None:
    files = [data for name, data in whole_images().items() if name.startswith(("PNG", "AVIF", "TIFF"))]
    images = []
    for data in files:
        try:
            decode_image(data)
        except RecordError:
            continue
        images.append(read_image_file(data, path="x"))
    assert len(images) > 10
    assert find_decoding_problem(images) is None
    assert isinstance(find_decoding_problem([read_image_file(files[0][:-20], path="x")]), SampleProblem)
