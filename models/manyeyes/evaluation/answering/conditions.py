"""What a model is shown besides the item's own image, to find out whether it looks.

``image-off`` removes the image, ``grey`` puts a plain grey one of the same size in its place, ``other-image`` that of
another item. A model that scores as well under these as with the image answers from the question alone. Without the
image a model sees a prompt that it was not trained on; grey and another image keep its form, which is why there are
three.

Source: Cambrian-1, arXiv:2406.16860, removes the image; MMStar, arXiv:2403.20330, does so too.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

# A question without an image, or on one that many share, is cheap: this many weigh about as much as one image with its
# questions.
_QUESTIONS_PER_IMAGE = 8

Sha256s = tuple[str, ...]
"""Of images, in order."""


@dataclass(frozen=True)
class Question:
    """What a model is asked once, and the items whose answer that is: they are the same input to a greedy model.

    Attributes:
        images: Of the images that are shown; empty without any.
        prompt: What the model reads.
        options: What the answer is chosen from; empty where it is written.
        items: At least one.
    """

    images: Sha256s
    prompt: str
    options: tuple[str, ...]
    items: tuple[Item, ...] = field(compare=False, repr=False)


Batch = tuple[list[Group], list[Question]]
"""The groups to ask, and their questions in order."""


@dataclass(frozen=True)
class ConditionPlan:
    """What is asked under a condition.

    Attributes:
        questions: Each once, those on the same images one after the other.
        read_images: The files of the images of a question.
        whole: Whether all questions on the same images belong into one batch.
    """

    questions: tuple[Question, ...]
    read_images: Callable[[Sha256s], tuple[bytes, ...]] = field(repr=False)
    whole: bool

    def batches(self, *, batch_size: int, leave_out: Callable[[Question], bool] | None = None) -> Iterator[Batch]:
        """The questions, images read as each batch is made.

        Args:
            batch_size: Most images a batch; eight times as many questions where images are removed or grey.
            leave_out: Says of a question that it need not be asked.

        Yields:
            Each batch.
        """
        by_images: dict[Sha256s, list[Question]] = {}
        for question in self.questions:
            if leave_out is None or not leave_out(question):
                by_images.setdefault(question.images, []).append(question)
        most = batch_size * _QUESTIONS_PER_IMAGE
        groups: list[Group] = []
        asked: list[Question] = []
        for images, waiting in by_images.items():
            # Questions on an image share its prefix, which one batch computes once.
            together = self.whole and bool(images)
            while waiting:
                if len(groups) == batch_size or (len(asked) >= most and not together):
                    yield groups, asked
                    groups, asked = [], []
                room = len(waiting) if together else most - len(asked)
                now, waiting = waiting[:room], waiting[room:]
                groups.append(_group(self.read_images(images), now))
                asked += now
        if groups:
            yield groups, asked


def plan_questions(benchmark: Benchmark, condition: Condition) -> ConditionPlan:
    """What to ask so that every item of a benchmark has an answer under a condition.

    Args:
        benchmark: The questions.
        condition: What takes the image's place.

    Raises:
        EvaluationError: ``other-image`` where all items that have images show the same ones.
        RecordError: An image is none, where a grey one of its size is needed.
    """
    records = _records(benchmark)

    def read_images(images: Sha256s) -> tuple[bytes, ...]:
        return benchmark.read_images(records[images]) if images else ()

    if condition == "image-on":
        return ConditionPlan(
            _distinct(benchmark.items, {images: images for images in records}), read_images, whole=True
        )
    if condition == "image-off":
        return ConditionPlan(_distinct(benchmark.items, {}), read_images, whole=False)
    if condition == "grey":
        grey, files = _grey_images(benchmark)
        return ConditionPlan(
            _distinct(benchmark.items, grey), lambda images: tuple(files[sha256] for sha256 in images), whole=False
        )
    # The last come first: a cache that is smaller than the benchmark still has the images that image-on ended with.
    place = {images: number for number, images in enumerate(records)}
    questions = _distinct(benchmark.items, other_images(benchmark))
    ordered = tuple(sorted(questions, key=lambda question: place.get(question.images, len(place))))
    return ConditionPlan(ordered, read_images, whole=True)


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
    """A record that has them, by images; the last come first."""
    return {item.image_sha256s: item.record for item in reversed(benchmark.items)}


def _grey_images(benchmark: Benchmark) -> tuple[dict[Sha256s, Sha256s], dict[str, bytes]]:
    """Grey images by those whose place they take, and their files; equal for equal sizes."""
    grey_of: dict[str, str] = {}
    files: dict[str, bytes] = {}
    shown: dict[Sha256s, Sha256s] = {}
    for sha256s, record in _records(benchmark).items():
        if any(sha256 not in grey_of for sha256 in sha256s):
            for sha256, data in zip(sha256s, benchmark.read_images(record), strict=True):
                image = grey_image(data)
                grey_of[sha256] = hashlib.sha256(image).hexdigest()
                files[grey_of[sha256]] = image
        shown[sha256s] = tuple(grey_of[sha256] for sha256 in sha256s)
    return shown, files


def _distinct(items: Sequence[Item], shown: Mapping[Sha256s, Sha256s]) -> tuple[Question, ...]:
    """Each input once, with its items; those on the same images one after the other.

    Args:
        items: What is to be answered.
        shown: By an item's images those that the model sees; none where they are left out.
    """
    by_images: dict[Sha256s, dict[tuple[str, tuple[str, ...]], list[Item]]] = {}
    for item in items:
        by_asked = by_images.setdefault(shown.get(item.image_sha256s, ()), {})
        by_asked.setdefault((item.prompt, item.options), []).append(item)
    return tuple(
        Question(images, prompt, options, tuple(own))
        for images, by_asked in by_images.items()
        for (prompt, options), own in by_asked.items()
    )


def _group(images: tuple[bytes, ...], asked: Sequence[Question]) -> Group:
    choices = tuple(question.options for question in asked)
    return Group(images, tuple(question.prompt for question in asked), choices if any(choices) else ())
