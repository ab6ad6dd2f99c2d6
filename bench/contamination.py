"""How well and how fast contamination is found: ``python -m bench.contamination``.

Recall and false positives on photographs that scikit-image ships inside its wheel, each whole and in quarters; how
many test images of easy-VQA a hash alone calls known, by how the picture is made small; and the time of the hash search
at any size.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path

import easy_vqa
import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image

from manyeyes.data.contamination.findings import Thresholds
from manyeyes.data.contamination.fingerprints import HashIndex, hash_differences, make_thumbnail, measure_entropy

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip


@cache
def photographs() -> dict[str, Image.Image]:
    """19 photographs, and the quarters of those with a shorter side of at least 300 pixels: 87 images."""
    folder = Path(skimage.__file__).parent / "data"
    images = {}
    for name in PHOTOGRAPHS:
        image = Image.open(folder / name).convert("RGB")
        images[name] = image
        width, height = image.width // 2, image.height // 2
        if min(image.size) >= 300:
            for row in range(2):
                for column in range(2):
                    box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                    images[f"{name} {row}{column}"] = image.crop(box)
    return images


def encode(image: Image.Image, quality: int = 0) -> bytes:
    """As JPEG of a quality, or as PNG."""
    buffer = io.BytesIO()
    if quality:
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def crop(image: Image.Image, share: float) -> Image.Image:
    """Without ``share`` of each side's length, half of it at either end."""
    x, y = round(image.width * share / 2), round(image.height * share / 2)
    return image.crop((x, y, image.width - x, image.height - y))


SHARD = 100_000  # images that are looked up at once

CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 90": lambda image: encode(image, 90),
    "JPEG, quality 50": lambda image: encode(image, 50),
    "JPEG, quality 20": lambda image: encode(image, 20),
    "half the size": lambda image: encode(image.resize((image.width // 2, image.height // 2))),
    "224x224, whatever the aspect": lambda image: encode(image.resize((224, 224))),
    "a third of the size, JPEG 30": lambda image: encode(image.resize((image.width // 3, image.height // 3)), 30),
    "cropped by 2%": lambda image: encode(crop(image, 0.02)),
    "cropped by 5%": lambda image: encode(crop(image, 0.05)),
    "cropped by 10%": lambda image: encode(crop(image, 0.10)),
    "mirrored": lambda image: encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "mirrored, JPEG 50": lambda image: encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 50),
    "10% brighter": lambda image: encode(image.point(lambda value: min(255, round(1.1 * value)))),
    "grey": lambda image: encode(image.convert("L")),
}


def measure_photographs() -> None:
    """Print recall by change, and how many pairs of different photographs are called the same."""
    limits = Thresholds()

    def look(data: bytes) -> tuple[int, int, NDArray[np.int16]]:
        grey = Image.open(io.BytesIO(data)).convert("RGB").convert("L").resize((9, 8), Image.Resampling.BOX)
        return *hash_differences(np.asarray(grey)), make_thumbnail(data).astype(np.int16)

    originals = {name: look(encode(image)) for name, image in photographs().items()}
    print(f"{len(originals)} images\n\n| change | hash alone | hash and pixels |\n| --- | ---: | ---: |")
    for change, apply in CHANGES.items():
        near = found = 0
        for name, image in photographs().items():
            plain, mirrored, thumbnail = look(apply(image))
            for hashed, pixels in ((plain, thumbnail), (mirrored, thumbnail[:, ::-1])):
                if (hashed ^ originals[name][0]).bit_count() <= limits.radius:
                    near += 1
                    found += np.abs(pixels - originals[name][2]).mean() <= limits.max_difference
                    break
        print(f"| {change} | {100 * near / len(originals):.0f}% | {100 * found / len(originals):.0f}% |")
    pairs = list(combinations(originals.values(), 2))
    alike = [(a, b) for a, b in pairs if (a[0] ^ b[0]).bit_count() <= limits.radius]
    same = sum(np.abs(a[2] - b[2]).mean() <= limits.max_difference for a, b in alike)
    entropy = min(measure_entropy(thumbnail.astype(np.uint8)) for *_, thumbnail in originals.values())
    print(f"\n{len(pairs)} pairs of different images: {len(alike)} by hash alone, {same} by hash and pixels")
    print(f"least entropy {entropy:.2f} bits")


FILTERS = {
    "mean of each cell (ours)": Image.Resampling.BOX,
    "Lanczos (`imagehash.dhash`)": Image.Resampling.LANCZOS,
    "bicubic (Pillow's default)": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
DISTANCE = 4


def share_by_hash_alone(filter_: Image.Resampling) -> tuple[float, float]:
    """Share of easy-VQA's 1,000 test images with a training image (4,000) within four bits of their dHash.

    No file is in both sets, but all show one shape on a plain ground.

    Args:
        filter_: Makes the grey picture 9x8.

    Returns:
        Looked up as they are, and mirrored as well; 0 to 1.
    """

    def hashes(part: str) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        found = []
        for path in (Path(easy_vqa.__file__).parent / "data" / part / "images").glob("*.png"):
            grey = Image.open(path).convert("RGB").convert("L").resize((9, 8), filter_)
            found.append(hash_differences(np.asarray(grey)))
        plain, mirrored = np.array(found, np.uint64).T
        return plain, mirrored

    def least(queries: NDArray[np.uint64]) -> NDArray[np.uint8]:
        return np.array([np.bitwise_count(query ^ training).min() for query in queries])

    training, _ = hashes("train")
    plain, mirrored = hashes("test")
    as_it_is = least(plain)
    either = np.minimum(as_it_is, least(mirrored))
    return float((as_it_is <= DISTANCE).mean()), float((either <= DISTANCE).mean())


def measure_easy_vqa() -> None:
    """Print what a hash alone says of easy-VQA, by filter."""
    print(f"\n| 9x8 by | within {DISTANCE} bits | mirrored too |\n| --- | ---: | ---: |")
    for name, filter_ in FILTERS.items():
        plain, either = share_by_hash_alone(filter_)
        print(f"| {name} | {100 * plain:.1f}% | {100 * either:.1f}% |")


def smooth_hashes(count: int, *, seed: int) -> NDArray[np.uint64]:
    """DHashes of smooth random pictures: their neighbouring bits depend on each other, as photographs' do."""
    random = np.random.default_rng(seed)
    rows, columns = np.divmod(np.arange(72), 9)
    distances = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    mix = np.exp(-distances / 2).astype(np.float32)
    hashes = []
    for start in range(0, count, 1 << 17):
        cells = random.standard_normal((min(1 << 17, count - start), 72), dtype=np.float32) @ mix
        grids = cells.reshape(-1, 8, 9)
        bits = np.packbits((grids[:, :, 1:] > grids[:, :, :-1]).reshape(-1, 64), axis=1)
        hashes.append(bits.view(">u8").ravel().astype(np.uint64))
    return np.concatenate(hashes)


def measure_search(training: int, benchmark: int) -> None:
    """Print the time of the search; twice ``training`` queries, for every image is looked up mirrored too."""
    judged = smooth_hashes(benchmark, seed=0)
    start = time.perf_counter()
    index = HashIndex(judged, radius=Thresholds().radius)
    built = time.perf_counter() - start
    pairs, wall, cpu = 0, 0.0, 0.0
    for done in range(0, 2 * training, SHARD):
        queries = smooth_hashes(min(SHARD, 2 * training - done), seed=1 + done)
        start, start_cpu = time.perf_counter(), time.process_time()
        pairs += len(index.search(queries)[0])
        wall, cpu = wall + time.perf_counter() - start, cpu + time.process_time() - start_cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{training:,} against {benchmark:,}: index {built:.1f} s, search {wall:.0f} s ({cpu:.0f} s of CPU), "
        f"{pairs:,} pairs, {memory:,.0f} MiB at most"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=int, default=1_000_000)
    parser.add_argument("--benchmark", type=int, default=50_000)
    parser.add_argument("--skip-photographs", action="store_true")
    arguments = parser.parse_args()
    if not arguments.skip_photographs:
        measure_photographs()
        measure_easy_vqa()
    measure_search(arguments.training, arguments.benchmark)
