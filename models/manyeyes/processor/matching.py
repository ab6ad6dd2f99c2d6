"""Which images belong to which conversation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manyeyes.chat import question_with_images
from manyeyes.errors import RecordError
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER

Image = bytes | NDArray[np.uint8]
"""An image file's bytes, or decoded pixels ``[H, W, 3]``."""

Images = Sequence[Image] | Sequence[Sequence[Image]] | Image | None
"""Images of a batch: a list per conversation, one flat list, one image, or none."""

Conversation = Sequence[tuple[str, str]]
"""Speaker (``human`` or ``gpt``) and text of each turn."""


def count_placeholders(conversation: Conversation) -> int:
    """How many images a conversation asks for."""
    return sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in conversation if speaker == "human")


def from_questions(questions: Sequence[str], images: Images) -> tuple[list[Conversation], Images]:
    """Questions as conversations, and their images, with a placeholder for each.

    Raises:
        RecordError: Several questions, and not as many lists of images.
    """
    if any(IMAGE_PLACEHOLDER in question for question in questions):
        return [[("human", question)] for question in questions], images
    nested = _nest(images)
    if len(questions) == 1:
        nested = [[image for own in nested for image in own]]
    elif not nested:
        nested = [[] for _ in questions]
    if len(nested) != len(questions):
        raise RecordError(
            f"{len(questions)} questions and images for {len(nested)}",
            "as many lists of images as questions are needed",
            "Give each question its own list of images, or put <image> into the questions.",
        )
    turns: list[Conversation] = [
        [("human", question_with_images(question, num_images=len(own)))]
        for question, own in zip(questions, nested, strict=True)
    ]
    return turns, nested


def _nest(images: Images) -> list[list[Image]]:
    """One list a conversation; an image alone stands in a list of its own."""
    if images is None:
        return []
    if isinstance(images, bytes | np.ndarray):
        return [[images]]
    return [[image] if isinstance(image, bytes | np.ndarray) else list(image) for image in images]


def flatten(images: Images, counts: Sequence[int]) -> list[Image]:
    """All images in order.

    Args:
        images: As the processor takes them.
        counts: Placeholders of each conversation.

    Raises:
        RecordError: Placeholders and images differ in number.
    """
    nested = _nest(images)
    flat = [image for own in nested for image in own]
    # Lists of images belong to their conversations; a flat list goes by placeholders.
    own_lists = isinstance(images, list | tuple) and bool(images) and isinstance(images[0], list | tuple)
    if len(flat) != sum(counts) or (own_lists and [len(own) for own in nested] != list(counts)):
        found = [len(own) for own in nested] if own_lists else len(flat)
        raise RecordError(
            f"conversations have {list(counts)} {IMAGE_PLACEHOLDER} and {found} images",
            "one placeholder per image is needed",
            "Mend the conversations or the images.",
        )
    return flat
