"""How one item of a published data set becomes the images and turns of a record.

Each function takes a row as its file has it and gives a ``SourceItem``; what is wrong with a row is an ``ItemRefused``.
Images are references (a name below the images' root) or the hub's struct (``bytes``, ``path``); nothing is opened here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyeyes.data.mixture import BRIEF_DESCRIPTION

Row = Mapping[str, Any]

NO_IMAGE = (None, "", "None", "nan")
"""What published files write where a sample has no image (Cambrian-7M has all of these)."""

LIST_OBJECTS = "List the objects in the image, each with its box as [x1, y1, x2, y2] in fractions of the image's size."
"""What is asked where the answer is boxes; the format is the one of LLaVA's symbolic context, arXiv:2304.08485."""

_OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ItemRefused(Exception):  # noqa: N818 (nothing failed: it is the verdict on one item)
    """An item that becomes no record.

    Args:
        kind: By which such items are counted, for instance ``image missing``.
        reason: What was found, and what was needed.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class SourceItem:
    """What an item says, before it is checked.

    Attributes:
        images: Names below the images' root, or structs with ``bytes`` and ``path``.
        turns: Who speaks, as the source writes it, and the text.
    """

    images: tuple[Any, ...]
    turns: tuple[tuple[str, str], ...]


def read_conversation(row: Row) -> SourceItem:
    """LLaVA's JSON: ``image`` (a name, a struct, or a list), ``conversations`` of ``from`` and ``value``.

    ``messages`` of ``role`` and ``content`` are read too, as chat models' data has them.
    """
    turns = row.get("conversations")
    turns = row.get("messages") if turns is None else turns
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        found = ", ".join(map(str, row)) or "nothing"
        raise ItemRefused("no turns", f"it has {found}; needed: a list of conversations")
    return SourceItem(image_references(row), tuple(_read_turn(turn, index) for index, turn in enumerate(turns)))


def _read_turn(turn: Any, index: int) -> tuple[str, str]:
    if isinstance(turn, Mapping):
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if isinstance(speaker, str) and isinstance(text, str):
            return speaker, text
    raise ItemRefused("bad turns", f"turn {index} is {_shown(turn)}; needed: from and value, both texts")


def image_references(row: Row) -> tuple[Any, ...]:
    """What ``image`` or ``images`` of a row names; nothing for the ways in which files say that there is none."""
    found = row.get("image")
    found = row.get("images") if found is None else found
    if isinstance(found, float) and found != found:  # NaN, of a data frame's empty cell
        return ()
    if not isinstance(found, list | tuple):
        return () if found in NO_IMAGE else (found,)
    return tuple(image for image in found if image is not None)


def read_cauldron(row: Row) -> SourceItem:
    """The Cauldron: ``images``, and ``texts`` of ``user`` and ``assistant``."""
    turns = [
        turn
        for text in _list_of(row, "texts")
        for turn in (("human", text_of(text, "user")), ("gpt", text_of(text, "assistant")))
    ]
    return SourceItem(image_references(row), tuple(turns))


def read_captions(row: Row) -> SourceItem:
    """An image with ``captions``, and boxes where there are any: one pair for each caption, one for all boxes.

    The questions are LLaVA's for a brief description, beginning at one that the first caption decides.
    """
    captions, boxes = row.get("captions") or [], row.get("boxes") or []
    captions = [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]
    if not captions and not boxes:
        raise ItemRefused("no caption", "it has no caption; needed: a text for the image")
    images = image_references(row)
    if not images:
        raise ItemRefused("image missing", "it has a caption and no image; needed: the image")
    first = int.from_bytes(hashlib.sha256(captions[0].encode(errors="replace")).digest()[:4]) if captions else 0
    pairs = [
        (BRIEF_DESCRIPTION[(first + place) % len(BRIEF_DESCRIPTION)], caption) for place, caption in enumerate(captions)
    ]
    if boxes:
        pairs.append(
            (LIST_OBJECTS, "\n".join(f"{name}: [{', '.join(f'{x:.3f}' for x in box)}]" for name, box in boxes))
        )
    return SourceItem(images, _pairs(*pairs))


def read_caption(row: Row) -> SourceItem:
    """One caption: ``caption`` or ``text``."""
    text = row.get("caption")
    return read_captions({**row, "captions": [row.get("text") if text is None else text]})


def read_laion_gpt4v(row: Row) -> SourceItem:
    """LAION-GPT4V: ``link`` and ``caption``; the image is what was fetched from the link, under its last name."""
    link = text_of(row, "link")
    return read_caption({"image": link.partition("?")[0].rstrip("/").rpartition("/")[2], "caption": row["caption"]})


def read_synthdog(row: Row) -> SourceItem:
    """SynthDoG: ``ground_truth`` is JSON with the page's text."""
    try:
        text = json.loads(text_of(row, "ground_truth"))["gt_parse"]["text_sequence"]
    except (ValueError, KeyError, TypeError) as error:
        raise ItemRefused("bad answer", "ground_truth is not JSON with gt_parse.text_sequence") from error
    return SourceItem(image_references(row), _pairs(("What is written in the image?", str(text))))


def read_question_answer(row: Row) -> SourceItem:
    """``question`` and ``answer``, with an image or without."""
    return SourceItem(image_references(row), _pairs((text_of(row, "question"), text_of(row, "answer"))))


def read_chartqa(row: Row) -> SourceItem:
    """ChartQA: ``query`` and ``label``, a list of answers."""
    answer = ", ".join(map(str, _list_of(row, "label")))
    return SourceItem(image_references(row), _pairs((text_of(row, "query"), answer)))


def read_arxivqa(row: Row) -> SourceItem:
    """ArxivQA: ``question``, ``options`` with their letters, ``label``."""
    question = "\n".join([text_of(row, "question"), *map(str, _list_of(row, "options"))])
    return SourceItem(image_references(row), _pairs((question, text_of(row, "label"))))


def read_scienceqa(row: Row) -> SourceItem:
    """ScienceQA as LLaVA asks it (QCM-LEA): question, context, options; lecture, solution and answer."""
    choices, answer = _list_of(row, "choices"), row.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ItemRefused("bad answer", f"answer is {_shown(answer)}; needed: a number below {len(choices)}")
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(_OPTION_LETTERS, choices, strict=False))
    question = f"{text_of(row, 'question')}\nContext: {row.get('hint') or 'N/A'}\nOptions: {options}"
    said = [str(row.get(name)).strip() for name in ("lecture", "solution") if row.get(name)]
    reply = " ".join([*said, f"The answer is {_OPTION_LETTERS[answer]}."])
    return SourceItem(image_references(row), _pairs((question, reply)))


def read_mathvision(row: Row) -> SourceItem:
    """MATH-Vision: ``question``, ``options``, ``answer``; the pixels are in ``decoded_image``."""
    options = [f"({letter}) {text}" for letter, text in zip(_OPTION_LETTERS, row.get("options") or [], strict=False)]
    question = "\n".join([text_of(row, "question").replace("<image1>", "").strip(), *options])
    return SourceItem(image_references({"image": row["decoded_image"]}), _pairs((question, text_of(row, "answer"))))


def read_code_of_page(row: Row) -> SourceItem:
    """A screenshot and its source: WebSight and Design2Code (``image``, ``text``)."""
    asked = "Write the HTML of the page in the screenshot."
    return SourceItem(image_references(row), _pairs((asked, text_of(row, "text"))))


def read_openorca(row: Row) -> SourceItem:
    """OpenOrca: ``system_prompt``, ``question``, ``response``."""
    system = row.get("system_prompt") or ""
    turns = (("system", system),) if system.strip() else ()
    return SourceItem((), (*turns, *_pairs((text_of(row, "question"), text_of(row, "response")))))


def read_instruction(row: Row) -> SourceItem:
    """``instruction`` and ``output`` (MathInstruct), or ``response`` with a ``context`` (Dolly)."""
    answer = "output" if "output" in row else "response"
    question = "\n\n".join(filter(None, [text_of(row, "instruction"), (row.get("context") or "").strip()]))
    return SourceItem((), _pairs((question, text_of(row, answer))))


def read_lima(row: Row) -> SourceItem:
    """LIMA: ``conversations`` is a list of texts, the user's first."""
    texts = _list_of(row, "conversations")
    return SourceItem((), tuple(("gpt" if place % 2 else "human", str(text)) for place, text in enumerate(texts)))


def text_of(row: Row, name: str) -> str:
    """A text of a row.

    Raises:
        ItemRefused: Missing, or no text; a number is taken as one.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ItemRefused("bad column", f'"{name}" is {_shown(value)}; needed: a text')
    return str(value)


def _list_of(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise ItemRefused("bad column", f'"{name}" is {_shown(value)}; needed: a list')
    return value


def _pairs(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(turn for question, answer in pairs for turn in (("human", question), ("gpt", answer)))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=lambda other: type(other).__name__)
    return text if len(text) <= 80 else f"{text[:80]}..."
