"""Mini-Gemini's data that teaches a model to draw: text alone, a request that ends with ``<GEN>``, a prompt as answer.

Two kinds: ``recaption`` makes of a picture's caption a short request and a prompt of at most 30 words (the paper's 8k),
``dialogue-drawing`` puts prompts of at least 30 words behind those answers of a dialogue that a picture would go with
(its 5k).

Source: Mini-Gemini, arXiv:2403.18814, section 3.3; sentences and examples of the prompts are our own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyeyes.data.generation.dataset import GeneratedSample, UnusableItem
from manyeyes.data.generation.descriptions import read_lines
from manyeyes.data.generation.interview import Asking, Prompt, RefusedError
from manyeyes.data.records import PLACEHOLDER, Turn, find_role_problem
from manyeyes.drawing import CLOSE, OPEN, REQUEST
from manyeyes.storage import parse_json

MOST_WORDS = 30
"""Of a prompt that is made of a caption."""

FEWEST_WORDS = 30
"""Of a prompt that goes with a dialogue."""

RECAPTION = Prompt(
    name="recaption 1",
    system=(
        "You are given the caption of a picture. Write what a person may have typed who wanted this picture drawn: one "
        "short and plain request. Then write a prompt for a text-to-image model that draws it: what is shown first, "
        f"then its surroundings, light, style and quality, in at most {MOST_WORDS} words.\n"
        'Answer with one JSON object and nothing else: {"request": "...", "prompt": "..."}'
    ),
    examples=(
        (
            "An old lighthouse stands on a cliff above a rough sea; dark clouds gather and a single lamp shines.",
            '{"request": "Can you draw a lighthouse in a storm?", "prompt": "old lighthouse on a cliff, rough sea '
            'below, dark storm clouds, one shining lamp, dramatic light, oil painting, highly detailed"}',
        ),
        (
            "A girl in yellow rubber boots jumps into a puddle in a park, and the water splashes up.",
            '{"request": "Show me a child who plays in the rain.", "prompt": "girl in yellow rubber boots jumping '
            'into a puddle, splashing water, wet park, soft daylight, shallow focus, candid photograph"}',
        ),
        (
            "A plate with three tacos, lime wedges and a small bowl of green salsa on a blue tiled table.",
            '{"request": "I need a picture of tacos for my menu.", "prompt": "three tacos on a plate, lime wedges, '
            'bowl of green salsa, blue tiled table, bright top light, food photography, sharp"}',
        ),
    ),
    max_tokens=256,
)

DIALOGUE = Prompt(
    name="dialogue-drawing 1",
    system=(
        "You are given a dialogue between a user and an assistant as JSON. For each answer of the assistant, decide "
        "whether a picture would go well with it. If so, write a prompt for a text-to-image model that draws that "
        f"picture, with subject, surroundings, light and style, in at least {FEWEST_WORDS} words; if not, write an "
        "empty string.\n"
        "Answer with a JSON list of strings and nothing else, one string for each answer of the assistant, in order."
    ),
    examples=(
        (
            '[{"user": "What is 12 times 12?", "assistant": "144."}, {"user": "Where could I rest after the exam?", '
            '"assistant": "Try a mountain lake: rent a hut, row in the morning and read in the sun."}]',
            '["", "a small wooden hut on the shore of a clear mountain lake at sunrise, a rowing boat tied to a narrow '
            "pier, mist above the water, pine forest and snowy peaks behind, warm light, calm mood, detailed landscape "
            'photograph"]',
        ),
    ),
    max_tokens=1500,
)


@dataclass(frozen=True)
class PictureCaption:
    """What a picture shows, in words.

    Attributes:
        id: Unique in its file.
        source: The file.
        caption: Of the picture.
    """

    id: str
    source: str
    caption: str


@dataclass(frozen=True)
class Dialogue:
    """A dialogue in text.

    Attributes:
        id: Unique in its file.
        source: The file.
        turns: Human first, then in turn.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]


def read_picture_captions(path: Path) -> Iterator[PictureCaption | UnusableItem]:
    """Captions from JSON Lines: ``{"id": "1", "caption": "..."}``."""
    for name, line in read_lines(path):
        caption = line.get("caption") if isinstance(line, dict) else None
        if not isinstance(caption, str) or not caption.strip() or "id" not in line:
            yield UnusableItem(name, path.name, f"{name} is no JSON with an id and a caption")
        else:
            yield PictureCaption(str(line["id"]), path.name, " ".join(caption.split()))


def read_dialogues(path: Path) -> Iterator[Dialogue | UnusableItem]:
    """Dialogues from JSON Lines: ``{"id", "conversations"}``, LLaVA's turns or texts in turn, as LIMA has them."""
    for name, line in read_lines(path):
        try:
            turns = tuple(_turn(place, said) for place, said in enumerate(line["conversations"]))
            problem = find_role_problem(turns)
            if problem is not None or any(PLACEHOLDER in turn.text for turn in turns):
                raise ValueError(str(problem or f"it has {PLACEHOLDER}; text alone is needed"))
            yield Dialogue(str(line["id"]), path.name, turns)
        except (KeyError, TypeError, ValueError) as error:
            yield UnusableItem(name, path.name, f"{name}: {error}; an id and conversations are needed")


def _turn(place: int, said: Any) -> Turn:
    if isinstance(said, str):
        return Turn("gpt" if place % 2 else "human", said)
    return Turn(said["from"], str(said["value"]))


def _words(text: str) -> int:
    return len(text.split())


def _parse(text: str) -> Any:
    try:
        return parse_json(text.strip().removeprefix("```json").removesuffix("```"))
    except ValueError as error:
        raise RefusedError(f"it is no JSON ({error})") from error


def _without_tags(text: str) -> str:
    if any(tag in text for tag in (OPEN, CLOSE, REQUEST)):
        raise RefusedError(f"it has one of {OPEN}, {CLOSE} and {REQUEST}; text without is needed")
    return " ".join(text.split())


def read_recaption(text: str) -> tuple[str, str]:
    """Request and prompt.

    Raises:
        RefusedError: Other JSON, something empty, or a prompt of more than 30 words.
    """
    found = _parse(text)
    parts = [found.get(name) for name in ("request", "prompt")] if isinstance(found, dict) else []
    if len(parts) != 2 or not all(isinstance(part, str) and part.strip() for part in parts):
        raise RefusedError(f"it is {text[:80]!r}; a request and a prompt are needed")
    request, prompt = (_without_tags(str(part)) for part in parts)
    if _words(prompt) > MOST_WORDS:
        raise RefusedError(f"the prompt has {_words(prompt)} words; at most {MOST_WORDS} are needed")
    return request, prompt


def read_prompts(text: str, *, answers: int) -> list[str]:
    """One prompt an answer, empty where nothing is to be drawn.

    Raises:
        RefusedError: Another number of them, none at all, or one of fewer than 30 words.
    """
    found = _parse(text)
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found) or len(found) != answers:
        raise RefusedError(f"it is {text[:80]!r}; a list of {answers} strings is needed")
    prompts = [_without_tags(prompt) for prompt in found]
    if not any(prompts):
        raise RefusedError("nothing of it is to be drawn")
    short = [_words(prompt) for prompt in prompts if prompt and _words(prompt) < FEWEST_WORDS]
    if short:
        raise RefusedError(f"a prompt has {short[0]} words; at least {FEWEST_WORDS} are needed")
    return prompts


def make_recaption(item: PictureCaption, asking: Asking) -> GeneratedSample:
    """A request, and the prompt as its answer."""
    request, prompt = asking.ask(RECAPTION, item.caption, read_recaption)
    return GeneratedSample((), (Turn("human", f"{request} {REQUEST}"), Turn("gpt", f"{OPEN} {prompt} {CLOSE}")))


def make_dialogue_drawing(item: Dialogue, asking: Asking) -> GeneratedSample:
    """The dialogue, with prompts behind the answers that a picture goes with."""
    rounds = list(zip(item.turns[::2], item.turns[1::2], strict=True))
    told = [{"user": question.text, "assistant": answer.text} for question, answer in rounds]

    def read(text: str) -> list[str]:
        return read_prompts(text, answers=len(rounds))

    prompts = asking.ask(DIALOGUE, json.dumps(told, ensure_ascii=False), read)
    turns: list[Turn] = []
    for (question, answer), prompt in zip(rounds, prompts, strict=True):
        turns += (
            [Turn("human", f"{question.text} {REQUEST}"), Turn("gpt", f"{answer.text} {OPEN} {prompt} {CLOSE}")]
            if prompt
            else [question, answer]
        )
    return GeneratedSample((), tuple(turns))
