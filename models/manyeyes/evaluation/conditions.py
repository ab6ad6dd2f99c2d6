"""What a model is shown besides the item's own image, to find out whether it looks.

``image-off`` removes the image, ``grey`` puts a plain grey one of the same size in its place, ``other-image`` that of
another item. A model that scores as well under these as with the image answers from the question alone. Without the
image a model sees a prompt that it was not trained on; grey and another image keep its form, which is why there are
three.

Source: Cambrian-1, arXiv:2406.16860, removes the image; MMStar, arXiv:2403.20330, does so too.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from PIL import Image

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import Benchmark, Item
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.preprocess import decode_image

Condition = Literal["image-on", "image-off", "grey", "other-image"]
CONDITIONS: tuple[Condition, ...] = ("image-on", "image-off", "grey", "other-image")

GREY = (128, 128, 128)
"""Middle of the eight-bit range."""

# A question without an image, or on one that many share, is cheap: so many weigh about as much as one image with its
# questions.
_QUESTIONS_PER_IMAGE = 8

Sha256s = tuple[str, ...]
"""Of an item's images, in order."""

Batch = tuple[list[Group], list[list[Item]]]
"""The groups to ask, and for each of their questions in order the items that it answers."""


def plan_questions(benchmark: Benchmark, condition: Condition, *, batch_size: int) -> Iterator[Batch]:
    """Batches that ask every item of a benchmark once under a condition.

    With images, all questions on one image are asked together. Items that are the same input to a greedy model (no
    image or the same grey one, and the same prompt) are asked once.

    Args:
        benchmark: The questions.
        condition: What takes the image's place.
        batch_size: Most images a batch; eight times as many questions where images are removed or grey.

    Yields:
        Each batch.

    Raises:
        EvaluationError: ``other-image`` where all items show the same image.
    """
    if condition == "image-on":
        yield from _on_images(benchmark, {}, batch_size)
    elif condition == "other-image":
        yield from _on_images(benchmark, other_images(benchmark), batch_size)
    elif condition == "image-off":
        yield from _shared(_distinct(benchmark.items, {}), batch_size)
    else:
        yield from _shared(_distinct(benchmark.items, _grey_images(benchmark)), batch_size)


def count_questions(benchmark: Benchmark, condition: Condition) -> int:
    """How many questions ``plan_questions`` asks under a condition."""
    if condition in ("image-on", "other-image"):
        return len(benchmark.items)
    images = _grey_images(benchmark) if condition == "grey" else {}
    return len({(images.get(item.image_sha256s, ()), item.prompt) for item in benchmark.items})


def is_possible(benchmark: Benchmark, condition: Condition) -> bool:
    """Whether a benchmark's items can be asked so: grey needs images, another item's image two of them."""
    images = {item.image_sha256s for item in benchmark.items if item.image_sha256s}
    return len(images) >= {"image-on": 0, "image-off": 0, "grey": 1, "other-image": 2}[condition]


def other_images(benchmark: Benchmark, *, seed: int = 0) -> dict[Sha256s, Sha256s]:
    """For the images of each item those that it is shown instead: as many, and not the same.

    They are dealt round a shuffled circle, so that each is shown about once. Where no other item has as many images,
    one with another number lends its own.

    Args:
        benchmark: The questions.
        seed: Of the shuffle.

    Raises:
        EvaluationError: All items that have images show the same ones.
    """
    circle = [images for images in _records(benchmark) if images]
    random.Random(seed).shuffle(circle)
    others: dict[Sha256s, Sha256s] = {}
    for place, images in enumerate(circle):
        following = (circle[(place + step) % len(circle)] for step in range(1, len(circle)))
        other = next((each for each in following if len(each) == len(images)), None)
        if other is None and len(circle) > 1:
            other = circle[(place + 1) % len(circle)]
        if other is None:
            raise EvaluationError(
                f"every item of {benchmark.row.name} shows the same image",
                'condition "other-image" needs items on two images',
                "Ask more items (evaluation.max_items), or leave the condition out.",
            )
        others[images] = other
    return others


def grey_image(data: bytes) -> bytes:
    """A plain grey PNG of the same width and height.

    Raises:
        RecordError: ``data`` is no image.
    """
    height, width = decode_image(data).shape[:2]
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), GREY).save(buffer, format="PNG")
    return buffer.getvalue()


def _records(benchmark: Benchmark) -> dict[Sha256s, int]:
    """A record that has them, by images."""
    return {item.image_sha256s: item.record for item in reversed(benchmark.items)}


def _grey_images(benchmark: Benchmark) -> dict[Sha256s, tuple[bytes, ...]]:
    """Grey images by those whose place they take; equal objects for equal sizes."""
    by_sha256: dict[str, bytes] = {}
    kept: dict[bytes, bytes] = {}
    grey: dict[Sha256s, tuple[bytes, ...]] = {}
    for sha256s, record in _records(benchmark).items():
        if any(sha256 not in by_sha256 for sha256 in sha256s):
            for sha256, data in zip(sha256s, benchmark.read_images(record), strict=True):
                image = grey_image(data)
                by_sha256[sha256] = kept.setdefault(image, image)
        grey[sha256s] = tuple(by_sha256[sha256] for sha256 in sha256s)
    return grey


def _on_images(benchmark: Benchmark, instead: Mapping[Sha256s, Sha256s], batch_size: int) -> Iterator[Batch]:
    # Data sets with a row a question repeat the image; equal files are one image. Without one, an item stands alone.
    records = _records(benchmark)
    by_images: dict[Sha256s, list[Item]] = {}
    for item in benchmark.items:
        by_images.setdefault(item.image_sha256s or (item.id,), []).append(item)
    together = list(by_images.values())
    for start in range(0, len(together), batch_size):
        batch = together[start : start + batch_size]
        groups = []
        for items in batch:
            shown = instead.get(items[0].image_sha256s, items[0].image_sha256s)
            images = benchmark.read_images(records[shown]) if shown else ()
            groups.append(Group(images=images, questions=tuple(item.prompt for item in items)))
        yield groups, [[item] for items in batch for item in items]


def _distinct(
    items: Sequence[Item], images: Mapping[Sha256s, tuple[bytes, ...]]
) -> dict[tuple[bytes, ...], dict[str, list[Item]]]:
    """Items by the images that they are shown, then by prompt."""
    by_input: dict[tuple[bytes, ...], dict[str, list[Item]]] = {}
    for item in items:
        by_input.setdefault(images.get(item.image_sha256s, ()), {}).setdefault(item.prompt, []).append(item)
    return by_input


def _shared(by_input: dict[tuple[bytes, ...], dict[str, list[Item]]], batch_size: int) -> Iterator[Batch]:
    """Batches of like size; the images of a size are shown once a batch."""
    size = batch_size * _QUESTIONS_PER_IMAGE
    groups: list[Group] = []
    answered: list[list[Item]] = []
    for images, by_prompt in by_input.items():
        prompts = list(by_prompt)
        while prompts:
            room = size - len(answered)
            if room == 0 or len(groups) == batch_size:
                yield groups, answered
                groups, answered, room = [], [], size
            now, prompts = prompts[:room], prompts[room:]
            groups.append(Group(images=images, questions=tuple(now)))
            answered += [by_prompt[prompt] for prompt in now]
    if groups:
        yield groups, answered
