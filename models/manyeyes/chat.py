"""Conversations as the model's parts see them: templates, shareable prefixes, branches and labels.

Templates and tokenisation live in ``manyeyes.runtime.chat``, once; this adds what training needs, and the tokenizer's
own chat template. That one is a program (Jinja); it is run here, on marked text, and written down as plain text around
turns, so that training, the runtime and a bundle go on with strings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol

from manyeyes.errors import RecipeError, RecordError
from manyeyes.runtime.chat import (
    IMAGE_PLACEHOLDER,
    TOKENIZER_TEMPLATE,
    ChatTemplate,
    Encoded,
    Turns,
    get_chat_template,
    render_turns,
)

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


class TemplatedTokenizer(Protocol):
    """What is asked of a tokenizer that carries its own chat template; transformers' have it."""

    chat_template: Any
    bos_token: Any

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """Text of the conversation."""
        ...


def find_chat_template(name: str, tokenizer: TemplatedTokenizer) -> ChatTemplate:
    """The row of that name, or the tokenizer's own template for ``tokenizer``.

    Raises:
        RecipeError: No such template; or the tokenizer carries none, or one that is more than text around turns.
    """
    return read_tokenizer_template(tokenizer) if name == TOKENIZER_TEMPLATE else get_chat_template(name)


def read_tokenizer_template(tokenizer: TemplatedTokenizer) -> ChatTemplate:
    """A tokenizer's own chat template, written down as text around turns.

    The template is rendered with marks for texts; what stands between the marks are the fields. The result is then
    rendered beside the original on conversations of one to three exchanges, with and without a system text, and must
    agree to the letter.

    Args:
        tokenizer: One that carries a chat template.

    Raises:
        RecipeError: It carries none, or one that looks at more than who speaks: the date, which turn is the last, what
            an answer holds.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise RecipeError(
            'chat template is "tokenizer"',
            "this tokenizer carries no chat template" if tokenizer.chat_template is None else "one, not several",
            "Name one of ManyEyes' own templates in model.chat.template.",
        )
    two = (*_EXCHANGE, ("human", "QUESTION-2"), ("gpt", "ANSWER-2"))
    plain = _render_own(tokenizer, two, system=None, generation_prompt=False)
    asked = _render_own(tokenizer, _EXCHANGE[:1], system=None, generation_prompt=True)
    if plain is None or asked is None:
        raise _inexpressible("it refuses a plain conversation")
    head, middle, joint, middle_2, tail = _cut(plain, [text for _, text in two])
    asked_head, prompt = _cut(asked, ["QUESTION-1"])
    if not (asked_head == head and middle == middle_2 and middle.startswith(prompt) and joint.startswith(tail)):
        raise _inexpressible("its text depends on more than who speaks")
    template = ChatTemplate(
        name=TOKENIZER_TEMPLATE,
        human_prefix=head,
        gpt_prefix=prompt,
        gpt_lead=middle.removeprefix(prompt),
        # White space behind the end is not the model's to write.
        gpt_end=tail.rstrip() or tail,
        gpt_after=tail.removeprefix(tail.rstrip() or tail),
        takes_system=False,
        adds_bos=False,
    )
    template = _with_system(template, tokenizer, joint.removeprefix(tail))
    for trims in (False, True):
        problem = _first_difference(replace(template, trims=trims), tokenizer)
        if problem is None:
            return replace(template, trims=trims)
    raise _inexpressible(problem or "")


_EXCHANGE = (("human", "QUESTION-1"), ("gpt", "ANSWER-1"))
_SYSTEM = "SYSTEM-0"
_PROBES: tuple[Turns, ...] = (
    _EXCHANGE[:1],
    _EXCHANGE,
    (*_EXCHANGE, ("human", f"{IMAGE_PLACEHOLDER}\nwhat colour?")),
    (*_EXCHANGE, ("human", "and now?"), ("gpt", "red\n\nand blue."), ("human", "sure?"), ("gpt", "yes")),
)
_PADDED: Turns = (("human", " padded\n"), ("gpt", "\npadded "))


def _with_system(template: ChatTemplate, tokenizer: TemplatedTokenizer, between: str) -> ChatTemplate:
    """Split what stands in front of the first question into start, system text and what every question has."""
    head = template.human_prefix
    told = _render_own(tokenizer, _EXCHANGE, system=_SYSTEM, generation_prompt=False)
    if told is None or told.count(_SYSTEM) != 1:
        prefix = _common_suffix(head, between)
        start = head.removesuffix(prefix)
        return replace(template, start=start, human_prefix=prefix, between=between.removesuffix(prefix))
    before, after = told[: told.index("QUESTION-1")].split(_SYSTEM)
    if between and head.endswith(between) and before.startswith(head):
        return replace(
            template,
            start=head.removesuffix(between),
            human_prefix=between,
            system_prefix=before.removeprefix(head),
            system_suffix=after,
            system_inside=True,
            takes_system=True,
        )
    prefix = _common_suffix(_common_suffix(head, after), between)
    suffix, opening = after.removesuffix(prefix), head.removesuffix(prefix)
    system = ""
    if opening.startswith(before) and opening.endswith(suffix) and len(opening) >= len(before) + len(suffix):
        # The template has a system text of its own.
        system = opening[len(before) : len(opening) - len(suffix)]
        bos = str(tokenizer.bos_token or "")
        opening = bos if bos and before.startswith(bos) else ""
    return replace(
        template,
        start=opening,
        system=system,
        system_prefix=before.removeprefix(opening),
        system_suffix=suffix,
        human_prefix=prefix,
        between=between.removesuffix(prefix),
        takes_system=True,
    )


def _first_difference(template: ChatTemplate, tokenizer: TemplatedTokenizer) -> str | None:
    probes: list[tuple[Turns, str | None]] = [(turns, None) for turns in (*_PROBES, _PADDED)]
    if template.takes_system:
        probes += [(turns, "Be\nbrief.") for turns in _PROBES]
    for turns, system in probes:
        asks = turns[-1][0] == "human"
        expected = _render_own(tokenizer, turns, system=system, generation_prompt=asks)
        found = render_turns(template, turns, system=system, generation_prompt=asks)
        if expected is None:
            return f"it refuses a conversation of {len(turns)} turns"
        if found != expected:
            same = len(_common_prefix(found, expected))
            return f"after {expected[:same][-40:]!r} comes {expected[same:][:40]!r}, not {found[same:][:40]!r}"
    return None


def _render_own(
    tokenizer: TemplatedTokenizer, turns: Turns, *, system: str | None, generation_prompt: bool
) -> str | None:
    """What the tokenizer's template makes of a conversation; None where it refuses."""
    # transformers needs Jinja for this; it is loaded where a tokenizer's template is asked for, and nowhere else.
    from jinja2 import TemplateError

    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[speaker], "content": text} for speaker, text in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError:
        return None


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    """The text around the marks, which must stand in it once and in order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _inexpressible("it leaves texts out, repeats them or changes their order")
        parts.append(before)
    return [*parts, text]


def _common_prefix(first: str, second: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(character for character, _ in pairs)


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]


def _inexpressible(problem: str) -> RecipeError:
    return RecipeError(
        f"the tokenizer's own chat template cannot be written as text around turns: {problem}",
        "a template in which each turn is written alike",
        "Name one of ManyEyes' own templates in model.chat.template.",
    )
