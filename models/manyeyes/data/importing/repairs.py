"""What the original programs do to a conversation when they read it, done once and counted.

LLaVA, and with it Eagle, Cambrian-1 and Mini-Gemini: the image mark moves to the front of its turn, several marks of a
turn are one, a first turn of the assistant is dropped; Eagle puts a mark in front where an image has none. Their
training programs read one image a sample; where a sample has several, its marks stay where they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from manyeyes.data.records import PLACEHOLDER, Turn, as_speaker
from manyeyes.data.source_items import SourceItem

MOVED = "image mark moved to the front of its turn"
MERGED = "image marks merged"
ADDED = "image mark added"
GPT_FIRST = "first turn of the assistant dropped"
UNANSWERED = "last question without an answer dropped"
SYSTEM = "system text put in front of the first question"

_LEADING = re.compile(rf"(?:{re.escape(PLACEHOLDER)}\s*)+")
_SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
    "bot": "gpt",
    "bing": "gpt",
    "bard": "gpt",
}


def repair_turns(item: SourceItem, repairs: Counter[str]) -> tuple[Turn, ...]:
    """Turns as the originals read them.

    Args:
        item: As its source has it.
        repairs: What was done is added here, once a sample.

    Returns:
        The turns; they may still be none that training can use.
    """
    system = [text for speaker, text in item.turns if speaker.lower() == "system"]
    turns = [
        Turn(as_speaker(_SPEAKERS.get(speaker.lower(), speaker)), text)
        for speaker, text in item.turns
        if speaker.lower() != "system"
    ]
    done = set()
    if turns and turns[0].speaker == "gpt":
        turns = turns[1:]
        done.add(GPT_FIRST)
    if len(turns) > 1 and turns[-1].speaker == "human" and turns[-2].speaker == "gpt":
        turns = turns[:-1]
        done.add(UNANSWERED)
    if len(item.images) == 1:
        turns = _place_mark(turns, done)
    if item.images and turns and turns[0].speaker == "human" and not any(PLACEHOLDER in turn.text for turn in turns):
        turns[0] = Turn("human", f"{PLACEHOLDER}\n" * len(item.images) + turns[0].text)
        done.add(ADDED)
    system_text = "\n".join(system).strip()
    if system_text and turns and turns[0].speaker == "human":
        marks = _LEADING.match(turns[0].text)
        end = marks.end() if marks else 0
        turns[0] = Turn("human", f"{turns[0].text[:end]}{system_text}\n\n{turns[0].text[end:]}")
        done.add(SYSTEM)
    repairs.update(done)
    return tuple(turns)


def _place_mark(turns: Sequence[Turn], done: set[str]) -> list[Turn]:
    placed, found = [], False
    for turn in turns:
        if turn.speaker != "human" or PLACEHOLDER not in turn.text:
            placed.append(turn)
            continue
        bare = turn.text.replace(PLACEHOLDER, "").strip()
        # An image is shown once, where it is named first.
        text = f"{PLACEHOLDER}\n{bare}" if not found else bare
        if found or turn.text.count(PLACEHOLDER) > 1:
            done.add(MERGED)
        if not turn.text.lstrip().startswith(PLACEHOLDER):
            done.add(MOVED)
        found = True
        placed.append(Turn("human", text))
    return placed
