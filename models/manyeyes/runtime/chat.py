"""From a conversation to tokens: chat templates, supervised spans, image spans.

A conversation is rendered to pieces of text and images. Text between two images is one chunk and is tokenised once.
Which tokens are supervised follows from where their characters stand, so a mask is right for any tokenizer.

Everything up to the last image is the same for every question about the same images. That is the prefix whose
key-value cache evaluation, the bundle and training share (``Encoded.prefix_length``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from manyeyes.errors import RecipeError, RecordError
from manyeyes.runtime.templates import CHAT_TEMPLATES, TOKENIZER_TEMPLATE, ChatTemplate, get_chat_template
from manyeyes.runtime.tokenizer import encode_text

__all__ = [
    "CHAT_TEMPLATES",
    "IMAGE_PLACEHOLDER",
    "TOKENIZER_TEMPLATE",
    "ChatTemplate",
    "Encoded",
    "Turns",
    "encode_answers",
    "encode_conversation",
    "get_chat_template",
    "render_turns",
    "render_with_spans",
    "stop_token_ids",
]

IMAGE_PLACEHOLDER = "<image>"

Turns = Sequence[tuple[str, str]]
"""Speaker (``human`` or ``gpt``) and text of each turn, in order."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        input_ids: Token ids; ``image_token_id`` at every visual token.
        supervised: Whether the loss counts this token; as long as ``input_ids``.
        image_spans: Start and length in tokens of each image, in order.
    """

    input_ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def prefix_length(self) -> int:
        """Tokens up to the end of the last image; 0 without an image."""
        return sum(self.image_spans[-1]) if self.image_spans else 0


@dataclass(frozen=True)
class _Text:
    text: str
    supervised: bool = False


@dataclass(frozen=True)
class _ImageSlot:
    """An image goes here."""


def render_turns(
    template: ChatTemplate, turns: Turns, *, system: str | None = None, generation_prompt: bool = False
) -> str:
    """The conversation as one text, ``<image>`` where an image goes.

    Args:
        template: The text around turns.
        turns: Speaker and text of each turn.
        system: Replaces the template's system text.
        generation_prompt: Whether to end where the model goes on.

    Raises:
        RecordError: Turns do not alternate, or an answer holds ``<image>``.
        RecipeError: A system text that the template has no place for.
    """
    return render_with_spans(template, turns, system=system, generation_prompt=generation_prompt)[0]


def render_with_spans(
    template: ChatTemplate, turns: Turns, *, system: str | None = None, generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one text, and where in it the loss counts.

    Args:
        template: The text around turns.
        turns: Speaker and text of each turn.
        system: Replaces the template's system text.
        generation_prompt: Whether to end where the model goes on.

    Returns:
        The text with ``<image>`` where an image goes, and start and end in characters of each supervised stretch.

    Raises:
        RecordError: Turns do not alternate, or an answer holds ``<image>``.
        RecipeError: A system text that the template has no place for.
    """
    text, spans = "", []
    for piece in _pieces(template, turns, system=system, generation_prompt=generation_prompt):
        start = len(text)
        text += piece.text if isinstance(piece, _Text) else IMAGE_PLACEHOLDER
        if isinstance(piece, _Text) and piece.supervised:
            spans.append((start, len(text)))
    return text, spans


def encode_conversation(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    turns: Turns,
    *,
    image_tokens: Sequence[int],
    image_token_id: int,
    system: str | None = None,
    generation_prompt: bool = False,
) -> Encoded:
    """Tokenise a conversation and say which tokens are images and which are supervised.

    Supervised are the answers and what ends them: every token that holds a character of ``gpt_lead``, an answer or
    ``gpt_end``.

    Args:
        tokenizer: The language model's.
        template: The text around turns.
        turns: Speaker and text of each turn; ``<image>`` in human text is a placeholder.
        image_tokens: Visual tokens of each image, in order.
        image_token_id: Id to put at every visual token.
        system: Replaces the template's system text; an empty text leaves it out.
        generation_prompt: Whether to end where the model goes on; the last turn must then be human.

    Raises:
        RecordError: Turns do not alternate, an answer holds ``<image>``, or there are more or fewer placeholders
            than images.
        RecipeError: A system text that the template has no place for.
    """
    pieces = list(_pieces(template, turns, system=system, generation_prompt=generation_prompt))
    num_slots = sum(isinstance(piece, _ImageSlot) for piece in pieces)
    if num_slots != len(image_tokens):
        raise RecordError(
            f"conversation has {num_slots} {IMAGE_PLACEHOLDER} and {len(image_tokens)} images",
            "one placeholder per image is needed",
            "Fix the record.",
        )
    encoded = Encoded()
    leading = leading_ids(tokenizer) if template.adds_bos else []
    encoded.input_ids.extend(leading)
    encoded.supervised.extend([False] * len(leading))
    lengths = iter(image_tokens)
    chunk: list[_Text] = []
    for piece in pieces:
        if isinstance(piece, _Text):
            chunk.append(piece)
            continue
        _append_chunk(encoded, tokenizer, chunk)
        chunk = []
        length = next(lengths)
        encoded.image_spans.append((len(encoded.input_ids), length))
        encoded.input_ids.extend([image_token_id] * length)
        encoded.supervised.extend([False] * length)
    _append_chunk(encoded, tokenizer, chunk)
    return encoded


def encode_answers(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    turns: Turns,
    answers: Sequence[str],
    *,
    stop_ids: Sequence[int],
    system: str | None = None,
) -> list[list[int]]:
    """Tokenise possible answers as they stand behind a prompt: prompt and answer together, less the prompt.

    A tokenizer may join an answer with what stands in front of it (``ASSISTANT:`` and `` A`` give ``▁A``), so an answer
    on its own may have other tokens.

    Args:
        tokenizer: The language model's.
        template: The text around turns.
        turns: Speaker and text of each turn; the last one is human.
        answers: What the model might say.
        stop_ids: From ``stop_token_ids``.
        system: Replaces the template's system text; an empty text leaves it out.

    Returns:
        Token ids of each answer, from ``gpt_lead`` to the token that ends the turn, that one included.

    Raises:
        RecordError: Turns do not alternate.
        RecipeError: The tokenizer joins an answer with the prompt's end or with the end of the turn, or drops it.
    """
    # Tokens of a chunk depend on that chunk alone, and the last one begins behind the last image.
    prompt = render_turns(template, turns, system=system, generation_prompt=True).rpartition(IMAGE_PLACEHOLDER)[2]
    asked = asked_template(template)
    prompt_ids = encode_text(tokenizer, prompt).ids
    encoded = []
    for answer in answers:
        said = prompt + asked.gpt_lead + (answer.strip() if asked.trims else answer)
        joint = encode_text(tokenizer, said + asked.gpt_end)
        first = len(prompt_ids)
        if joint.ids[:first] != prompt_ids:
            # GPT-2's pre-tokenizer leaves two newlines together only at the end of a text. What counts is that the
            # answer begins with a token.
            first = sum(begin < len(prompt) for begin, _ in joint.offsets)
            if joint.offsets[first][0] != len(prompt) or joint.offsets[first - 1][1] != len(prompt):
                raise RecipeError(
                    f"the tokenizer joins the end of the prompt, {prompt[-20:]!r}, with the answer {answer!r}",
                    "answers that begin with a token of their own are needed to choose between them",
                    "Leave evaluation.multiple_choice at generate with this chat template.",
                )
        ids = []
        for token, (begin, _) in list(zip(joint.ids, joint.offsets, strict=True))[first:]:
            ids.append(token)
            if begin >= len(said) and token in stop_ids:
                break
        if len(ids) < 2 or ids[-1] not in stop_ids:
            raise RecipeError(
                f"the tokenizer gives {ids} for the answer {answer!r} and the end of the turn",
                "at least one token for the answer and one for the end are needed",
                "Leave evaluation.multiple_choice at generate with this tokenizer.",
            )
        encoded.append(ids)
    return encoded


def stop_token_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Ids that end an answer: the token of ``template.stop``, or of ``gpt_end`` without white space in front.

    Raises:
        RecipeError: The tokenizer has no token of its own for the end of a turn, so generation could not stop.
    """
    probe = "a" + template.gpt_end
    encoding = encode_text(tokenizer, probe)
    # White space may stand before the token; where all is white space, the last character counts.
    stop = template.stop or template.gpt_end.lstrip() or template.gpt_end[-1:]
    start = probe.rfind(stop) if stop else -1
    ids = [token for token, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True) if begin >= start >= 0]
    begins = any(begin == start for begin, _ in encoding.offsets)
    if not begins or (len(ids) > 1 and not template.stop_splits):
        raise RecipeError(
            f'chat template "{template.name}" ends a turn with {template.gpt_end!r}, which the tokenizer splits',
            "one token that ends a turn is needed",
            "Add it to the tokenizer as a special token, or choose another template.",
        )
    return ids[:1]


def _pieces(
    template: ChatTemplate, turns: Turns, *, system: str | None, generation_prompt: bool
) -> Iterator[_Text | _ImageSlot]:
    _check_turns(turns, generation_prompt=generation_prompt)
    if generation_prompt:
        template = asked_template(template)
    opening = _system_text(template, system)
    yield _Text(template.start)
    if not template.system_inside:
        yield _Text(opening)
    for position, (speaker, text) in enumerate(turns):
        text = text.strip() if template.trims else text
        if speaker == "human":
            yield _Text((template.between if position else "") + template.human_prefix)
            if template.system_inside and position == 0:
                yield _Text(opening)
            for place, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
                if place > 0:
                    yield _Text(template.image_prefix)
                    yield _ImageSlot()
                    yield _Text(template.image_suffix)
                if not template.images_only:
                    yield _Text(part)
            yield _Text(template.human_suffix + template.gpt_prefix)
        else:
            yield _Text(template.gpt_lead + text + template.gpt_end, supervised=True)
            yield _Text(template.gpt_after)


def asked_template(template: ChatTemplate) -> ChatTemplate:
    """The text around a question that a model is to answer."""
    if not template.asked_as:
        return template
    marks = (template.image_prefix, template.image_suffix)
    return replace(get_chat_template(template.asked_as), image_prefix=marks[0], image_suffix=marks[1])


def _system_text(template: ChatTemplate, system: str | None) -> str:
    system = template.system if system is None else system
    system = system.strip() if template.trims else system
    if system and not template.takes_system:
        raise RecipeError(
            f'system text is "{system[:40]}"',
            f'chat template "{template.name}" has no place for one',
            'Leave it out, or set it to "".',
        )
    return template.system_prefix + system + template.system_suffix if system else ""


def _check_turns(turns: Turns, *, generation_prompt: bool) -> None:
    for position, (speaker, text) in enumerate(turns):
        expected = "gpt" if position % 2 else "human"
        if speaker != expected:
            raise RecordError(
                f'turn {position} is by "{speaker}"',
                f'"{expected}" is needed there: turns alternate and human speaks first',
                "Fix the record.",
            )
        if speaker == "gpt" and IMAGE_PLACEHOLDER in text:
            raise RecordError(
                f"turn {position} is an answer with {IMAGE_PLACEHOLDER}",
                "placeholders belong to human turns",
                "Fix the record.",
            )
    last_is_human = len(turns) % 2 == 1
    if not turns or last_is_human != generation_prompt:
        ends = f'ends with "{turns[-1][0]}"' if turns else "is empty"
        needed = "a question to answer" if generation_prompt else "an answer to every question"
        raise RecordError(f"conversation {ends}", f"{needed} is needed", "Fix the turns.")


def _append_chunk(encoded: Encoded, tokenizer: Tokenizer, chunk: Sequence[_Text]) -> None:
    text = "".join(piece.text for piece in chunk)
    if not text:
        return
    spans: list[tuple[int, int]] = []
    position = 0
    for piece in chunk:
        if piece.supervised:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    encoding = encode_text(tokenizer, text)
    encoded.input_ids.extend(encoding.ids)
    encoded.supervised.extend(_overlaps(encoding.offsets, spans))


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[bool]:
    # A token without characters of its own (a byte of a longer character, say) belongs where it starts.
    for start, end in offsets:
        yield any(start < stop and max(end, start + 1) > begin for begin, stop in spans)


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer's post-processor puts in front of a text, such as Llama's ``<s>``."""
    with_special = encode_text(tokenizer, "a", add_special_tokens=True)
    count = 0
    for is_special in with_special.special_tokens_mask:
        if not is_special:
            break
        count += 1
    return list(with_special.ids[:count])
