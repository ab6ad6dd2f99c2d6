"""Conversations as the model's parts see them: shareable prefixes, branches and labels.

Templates and tokenisation live in ``manyeyes.runtime.chat``, once; this adds what training needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyeyes.errors import RecordError
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, Encoded

IGNORE_INDEX = -100
"""Label of a token that the loss does not count; torch's own convention."""


@dataclass(frozen=True)
class Branch:
    """What follows the shared prefix for one question.

    Attributes:
        input_ids: Token ids after the prefix; never empty.
        labels: The token's id where the loss counts it, ``IGNORE_INDEX`` elsewhere; as long as ``input_ids``.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class BranchGroup:
    """Questions about the same images, each seeing the images and itself alone.

    Attributes:
        prefix_ids: Token ids up to the end of the last image; empty without an image.
        image_spans: Start and length in tokens of each image in the prefix, in order.
        branches: One a question.
    """

    prefix_ids: tuple[int, ...]
    image_spans: tuple[tuple[int, int], ...]
    branches: tuple[Branch, ...]


def labels_of(encoded: Encoded) -> list[int]:
    """Token ids where the loss counts them, ``IGNORE_INDEX`` elsewhere; as long as ``encoded.input_ids``."""
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    return [token if supervised else IGNORE_INDEX for token, supervised in pairs]


def question_with_images(question: str, *, num_images: int) -> str:
    """The question behind one ``<image>`` and a newline per image, as in records and in the runtime."""
    return f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def without_placeholders(text: str) -> str:
    """Human text of a record with its ``<image>`` placeholders, and the newline behind each, taken out."""
    return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "")


def split_branches(conversations: Sequence[Encoded]) -> BranchGroup:
    """Cut conversations about the same images where they part.

    Args:
        conversations: At least one; every one begins with the same images.

    Raises:
        RecordError: The conversations do not share their prefix, or nothing follows it.
    """
    first = conversations[0]
    length = first.prefix_length
    prefix = first.input_ids[:length]
    branches = []
    for encoded in conversations:
        if encoded.prefix_length != length or encoded.input_ids[:length] != prefix:
            raise RecordError(
                "conversations about one set of images differ before the end of the last image",
                "the text up to there must be the same",
                "Put the images in front of the question.",
            )
        labels = labels_of(encoded)[length:]
        if not labels or labels[0] != IGNORE_INDEX:
            raise RecordError(
                "nothing stands between the last image and the answer",
                "at least one token is needed there",
                "Choose a template with text in front of the answer.",
            )
        branches.append(Branch(input_ids=tuple(encoded.input_ids[length:]), labels=tuple(labels)))
    return BranchGroup(prefix_ids=tuple(prefix), image_spans=tuple(first.image_spans), branches=tuple(branches))
