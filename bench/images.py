"""``python -m bench.images``: from image files to pixels, beside transformers' CLIP processor as built by default.

29 photographs of scikit-image as JPEG (quality 90) and as PNG, for one encoder and for four of unlike sizes: each side
decodes a file once and makes the pixels of every encoder. One thread, process CPU time, rounds interleaved, the first
dropped. Pixels that differ by more than 1/255 on average or 4/255 anywhere fail the run.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessor

from bench import RESULTS, describe, write_result
from bench.contamination import encode, photographs
from manyeyes.runtime.preprocess import ImageTransform, decode_image, transform_image

SIZES = {1: (336,), 4: (224, 336, 384, 448)}
GOALS = {1: 1.5, 4: 2.5}
MEAN_LIMIT, MOST = 1 / 255, 4 / 255
Pixels = list[list[NDArray[np.float32]]]


def compare(files: list[bytes], count: int, *, rounds: int) -> dict[str, Any]:
    """One ratio, as its JSON file has it."""
    processors = [
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        for size in SIZES[count]
    ]
    mean, std = tuple(processors[0].image_mean), tuple(processors[0].image_std)
    transforms = [
        ImageTransform(size=size, mean=mean, std=std, resample="bicubic", fit="crop") for size in SIZES[count]
    ]

    def peer() -> Pixels:
        made = []
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            made.append([each(image, return_tensors="np")["pixel_values"][0] for each in processors])
        return made

    def ours() -> Pixels:
        made = []
        for data in files:
            image = decode_image(data)
            made.append([transform_image(image, transform) for transform in transforms])
        return made

    seconds: list[tuple[float, float]] = []
    mean_gap = most = 0.0
    for number in range(rounds + 1):
        (theirs, a), (own, b) = _timed(peer), _timed(ours)
        if not number:
            gaps = [
                np.abs((x - y) * np.asarray(std)[:, None, None])
                for left, right in zip(theirs, own, strict=True)
                for x, y in zip(left, right, strict=True)
            ]
            mean_gap, most = max(float(gap.mean()) for gap in gaps), max(float(gap.max()) for gap in gaps)
            continue
        seconds.append((a, b))
    title = f"image files to pixels, {count} encoder{'s' if count > 1 else ''}: transformers' processor / ours"
    evidence = {
        "mean_gap_of_255": mean_gap * 255,
        "largest_gap_of_255": most * 255,
        "equal": mean_gap <= MEAN_LIMIT and most <= MOST,
    }
    return describe(title, seconds, goal=GOALS[count], equal=evidence, packages=("torchvision", "pillow"))


def _timed(call: Callable[[], Pixels]) -> tuple[Pixels, float]:
    started = time.process_time()
    made = call()
    return made, time.process_time() - started


def main() -> int:
    """Measure both; exit 1 where pixels differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = [encode(image, quality) for image in list(photographs().values())[::3] for quality in (90, 0)]
    failed = 0
    for count in SIZES:
        failed |= write_result(compare(files, count, rounds=arguments.rounds), arguments.out / f"images_{count}.json")
    return failed


if __name__ == "__main__":
    sys.exit(main())
