"""Near duplicates where many samples are in one bucket: ``python -m bench.near_duplicates [SIZE ...]``.

``equal``: one picture, one hash. ``almost``: one picture with noise, hashes that differ in some of 14 bits. ``apart``:
one hash, pictures that are all different. ``ball``: hashes as of ``almost``, pictures that are all different; of at
most 10,000, since their time is quadratic. Thumbnails lie on the disk, as in a curation, and are not decoded here. A
run fails where another number of samples is left out than should be, or where a sample among the most that are equal
or almost equal costs more than three times what it costs among 10,000.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.contamination.fingerprints import THUMBNAIL
from manyeyes.data.curation.duplicates import Images, Looks, find_near
from manyeyes.data.curation.recipe import NearSpec

SIZES = (1_000, 10_000, 50_000)
MOST_GROWTH = 3.0
_BLOCKS = 4
_FEW_BITS = 14
_TOGETHER = 1_000


class Thumbnails(Images):
    """Of one image a sample, in files.

    Args:
        folder: For the files.
        kind: Of pictures.
        count: How many.
    """

    def __init__(self, folder: Path, kind: str, count: int) -> None:
        draw = np.random.default_rng(5)
        side = THUMBNAIL // _BLOCKS
        one = draw.integers(20, 236, (1, _BLOCKS, 1, _BLOCKS, 1, 3)).astype(np.uint8)
        self._pixels = np.memmap(folder / "pixels", np.uint8, "w+", shape=(count, THUMBNAIL * THUMBNAIL * 3))
        self._means = np.memmap(folder / "means", np.int16, "w+", shape=(count, _BLOCKS * _BLOCKS * 3))
        for start in range(0, count, _TOGETHER):
            shape = (min(_TOGETHER, count - start), _BLOCKS, 1, _BLOCKS, 1, 3)
            blocks = one if kind in ("equal", "almost") else draw.integers(0, 256, shape).astype(np.uint8)
            whole = np.broadcast_to(blocks, (shape[0], _BLOCKS, side, _BLOCKS, side, 3))
            if kind == "almost":
                whole = whole + draw.integers(-4, 5, whole.shape, np.int8).view(np.uint8)
            part = slice(start, start + shape[0])
            self._pixels[part] = whole.reshape(shape[0], -1)
            self._means[part] = whole.mean(axis=(2, 4)).reshape(shape[0], -1)

    @contextmanager
    def thumbnails(self, samples: NDArray[np.int64], *, max_difference: float) -> Iterator[Looks]:
        """What samples look like."""
        assert len(samples) == len(self._pixels)  # each has a neighbour
        starts = np.arange(len(samples) + 1)
        yield Looks(np.sort(samples), starts, np.asarray(self._pixels), np.asarray(self._means), max_difference)


def make_hashes(kind: str, count: int) -> NDArray[np.uint64]:
    """Equal ones, or such that differ in some of a few bits."""
    draw = np.random.default_rng(7)
    hashes = np.full(count, 0x0F1E2D3C4B5A6978, np.uint64)
    if kind in ("almost", "ball"):
        places = np.uint64(1) << draw.choice(64, _FEW_BITS, replace=False).astype(np.uint64)
        flipped = draw.random((count, _FEW_BITS)) < (0.2 if kind == "almost" else 0.5)
        hashes ^= (flipped * places).sum(axis=1, dtype=np.uint64)
    return hashes


def measure(kind: str, count: int) -> dict[str, object]:
    """Time ``find_near`` over one bucket."""
    hashes, rank = make_hashes(kind, count), np.random.default_rng(9).permutation(count)
    with tempfile.TemporaryDirectory() as folder:
        images = Thumbnails(Path(folder), kind, count)
        start = time.process_time()
        gone, _ = find_near(np.arange(count), hashes=hashes, keys=None, rank=rank, spec=NearSpec(), images=images)
        seconds = time.process_time() - start
    return {
        "kind": kind,
        "samples": count,
        "hashes": len(np.unique(hashes)),
        "left_out": len(gone),
        "cpu_s": round(seconds, 2),
        "us_a_sample": round(1e6 * seconds / count, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> int:
    """Print a line for each; exit 1 where a promise is not kept."""
    sizes = [int(size) for size in sys.argv[1:]] or list(SIZES)
    kept = True
    for kind in ("equal", "almost", "apart", "ball"):
        rows = []
        for size in sizes:
            if kind != "ball" or size <= SIZES[1]:
                rows.append(measure(kind, size))
                print(json.dumps(rows[-1]), flush=True)
        costs = [float(str(row["us_a_sample"])) for row in rows if int(str(row["samples"])) >= SIZES[1]]
        if kind == "equal":
            kept &= all(row["left_out"] == int(str(row["samples"])) - 1 for row in rows)
        if kind in ("equal", "almost") and costs:
            kept &= costs[-1] <= MOST_GROWTH * costs[0]
        if kind in ("apart", "ball"):
            kept &= all(row["left_out"] == 0 for row in rows)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
