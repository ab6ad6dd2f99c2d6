"""LLaVA's three kinds of data: conversations, detailed descriptions and complex reasoning, about images told in words.

Source: LLaVA, arXiv:2304.08485, section 3: 58k, 23k and 77k of them, written by a model that saw captions and boxes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from manyeyes.data.generation.dataset import GeneratedSample
from manyeyes.data.generation.descriptions import Description, load_image
from manyeyes.data.generation.interview import Asking, RefusedError
from manyeyes.data.generation.llava_prompts import COMPLEX, CONVERSATION, DETAIL, DETAIL_QUESTIONS
from manyeyes.data.records import PLACEHOLDER, Turn

MOST_PAIRS = 20
_FEWEST_WORDS = 25
_SEPARATOR = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)
_BLOCK = re.compile(r"\s*(Question|Answer):\s*(\S.*)", re.DOTALL)
# A model that was told to write as if it saw the image, and did not; or one that will not write at all.
_GIVEN_AWAY = re.compile(
    r"\b(?:(?:the|these|those|provided|given|five) (?:captions?|sentences|descriptions?)|bounding box(?:es)?"
    r"|coordinates?|as an ai|language model|i(?:'m| am) (?:sorry|unable)|i (?:cannot|can't))\b|\[\s*[01]?\.\d+\s*,",
    re.IGNORECASE,
)


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Questions and answers of a dialogue as the prompts ask for it.

    Raises:
        RefusedError: It is written otherwise, or says where its knowledge comes from.
    """
    blocks = [block for block in _SEPARATOR.split(text) if block.strip()]
    found = []
    for number, block in enumerate(blocks):
        needed = "Answer" if number % 2 else "Question"
        match = _BLOCK.fullmatch(block.rstrip())
        if match is None or match[1] != needed:
            raise RefusedError(
                f'part {number + 1} begins with {block.strip()[:40]!r}; "{needed}:" and a text are needed'
            )
        found.append(match[2].strip())
    if not found or len(found) % 2 or len(found) > 2 * MOST_PAIRS:
        raise RefusedError(f"it has {len(found)} parts; questions and answers in turn are needed, at most {MOST_PAIRS}")
    for passage in found:
        check_voice(passage)
    return list(zip(found[::2], found[1::2], strict=True))


def check_voice(text: str) -> None:
    """That a text speaks of the image, and not of how it came to be known.

    Raises:
        RefusedError: It does not.
    """
    if (match := _GIVEN_AWAY.search(text)) is not None:
        raise RefusedError(f"it says {match[0]!r}; a text by somebody who sees the image is needed")


def read_description(text: str) -> str:
    """A description at length.

    Raises:
        RefusedError: It is short, or says where its knowledge comes from.
    """
    check_voice(text)
    words = len(text.split())
    if words < _FEWEST_WORDS:
        raise RefusedError(f"it has {words} words; at least {_FEWEST_WORDS} are needed")
    return text.strip()


def read_one_pair(text: str) -> tuple[str, str]:
    """The one question and its answer.

    Raises:
        RefusedError: There is another number of them, or as ``read_pairs``.
    """
    pairs = read_pairs(text)
    if len(pairs) != 1:
        raise RefusedError(f"it has {len(pairs)} questions; one is needed")
    return pairs[0]


def ask_conversation(item: Description, asking: Asking) -> list[tuple[str, str]]:
    """A dialogue about an image, from its captions."""
    return asking.ask(CONVERSATION, item.as_text(boxes=False), read_pairs)


def ask_detail(item: Description, asking: Asking) -> list[tuple[str, str]]:
    """A description of an image, from its captions and boxes, after a question that is drawn by the image's id."""
    return [(detail_question(item), asking.ask(DETAIL, item.as_text(boxes=True), read_description))]


def ask_complex(item: Description, asking: Asking) -> list[tuple[str, str]]:
    """A question that takes thought, and its answer, from captions and boxes."""
    return [asking.ask(COMPLEX, item.as_text(boxes=True), read_one_pair)]


def detail_question(item: Description) -> str:
    """The one that asks for a description of this image."""
    drawn = int.from_bytes(hashlib.sha256(item.id.encode(errors="surrogatepass")).digest()[:8], "big")
    return DETAIL_QUESTIONS[drawn % len(DETAIL_QUESTIONS)]


KINDS: dict[str, Callable[[Description, Asking], list[tuple[str, str]]]] = {
    "conversation": ask_conversation,
    "detail": ask_detail,
    "complex": ask_complex,
}
"""By name on the command line."""


def make_sample(item: Description, asking: Asking, *, kind: str, images: Path) -> GeneratedSample:
    """An image with the turns of one kind.

    Args:
        item: The image in words.
        asking: Asks the model.
        kind: Of ``KINDS``.
        images: Folder that the image is below; it is read first, so that one that is missing costs nothing.

    Raises:
        RefusedError: No captions, no image, or no answer that can be read.
    """
    if not item.captions:
        raise RefusedError("it has no captions; at least one is needed")
    image = load_image(images, item.image)
    turns: list[Turn] = []
    for question, answer in KINDS[kind](item, asking):
        prefix = "" if turns else f"{PLACEHOLDER}\n"
        turns += [Turn("human", prefix + question), Turn("gpt", answer)]
    return GeneratedSample((image,), tuple(turns))


def sampler(kind: str, images: Path) -> Callable[[Description, Asking], GeneratedSample]:
    """``make_sample`` for one kind and one folder."""
    return partial(make_sample, kind=kind, images=images)
