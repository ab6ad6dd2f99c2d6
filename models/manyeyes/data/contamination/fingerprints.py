"""Fingerprints of images: what is compared before anybody looks at pixels.

A fingerprint is the sha256 of the file, a difference hash (dHash, 64 bits) of the picture and of its mirror image, and
how much there is to see. They are kept by the sha256 of the shard, so that a killed run goes on at the next shard and
another run starts with what is known.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manyeyes.data.contamination.samples import read_samples
from manyeyes.errors import RecordError
from manyeyes.runtime.preprocess import decode_image
from manyeyes.storage import new_file

VERSION = 1
THUMBNAIL = 64

DTYPE = np.dtype(
    [
        ("row", "<u4"),  # in its file
        ("image", "<u2"),  # in its row
        ("sha256", "<u8", (4,)),
        ("hash", "<u8"),
        ("mirrored", "<u8"),
        ("entropy", "<f4"),  # bits; -1 for a file that cannot be decoded
    ]
)


def make_thumbnail(data: bytes) -> NDArray[np.uint8]:
    """The picture at 64x64, each pixel the mean of its part, whatever the aspect ratio.

    Returns:
        ``[64, 64, 3]``, RGB.

    Raises:
        RecordError: It cannot be decoded.
    """
    image = Image.fromarray(decode_image(data))
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def hash_differences(grey: NDArray[np.uint8]) -> tuple[int, int]:
    """The dHash of a picture and of its mirror image.

    Args:
        grey: ``[8, 9]``.

    Returns:
        Two times 64 bits: whether a cell is brighter than the one on its left, row by row.
    """

    def bits(cells: NDArray[np.uint8]) -> int:
        return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")

    return bits(grey), bits(grey[:, ::-1])


def measure_entropy(thumbnail: NDArray[np.uint8]) -> float:
    """Bits a pixel that the grey levels of a thumbnail hold: 0 for one colour, 8 for every level equally often."""
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"))
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def fingerprint_shard(path: Path, *, sha256: str, cache_dir: Path) -> NDArray[np.void]:
    """Fingerprints of all images of a Parquet file, from the cache where they are known.

    Memory: one row group of images, and 62 bytes an image.

    Args:
        path: The file.
        sha256: Of the file; the cache's key.
        cache_dir: Folder of the cache; made when missing.

    Returns:
        One ``DTYPE`` row an image, in the file's order.

    Raises:
        SnapshotError: Not a Parquet file.
        StorageError: No space or no permission for the cache.
    """
    kept = cache_dir / f"{sha256}-v{VERSION}.npy"
    if kept.is_file():
        known: NDArray[np.void] = np.load(kept)
        return known
    parts: list[NDArray[np.void]] = []
    # Decoding lets go of the interpreter lock, so threads help.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for group in read_samples(path, texts=False):
            places = [(sample.row, number) for sample in group for number in range(len(sample.images))]
            files = [data for sample in group for data in sample.images]
            rows = np.zeros(len(files), DTYPE)
            rows["row"], rows["image"] = [row for row, _ in places], [number for _, number in places]
            for place, facts in enumerate(pool.map(_look_at, files)):
                rows["sha256"][place], rows["hash"][place], rows["mirrored"][place], rows["entropy"][place] = facts
            parts.append(rows)
    found = np.concatenate(parts) if parts else np.zeros(0, DTYPE)
    with new_file(kept) as file, file.open("wb") as stream:
        np.save(stream, found)
    return found


def _look_at(data: bytes) -> tuple[NDArray[np.uint64], int, int, float]:
    digest = np.frombuffer(hashlib.sha256(data).digest(), "<u8")
    try:
        image = Image.fromarray(decode_image(data))
    except RecordError:
        return digest, 0, 0, -1.0
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return digest, *hash_differences(grey), measure_entropy(thumbnail)
