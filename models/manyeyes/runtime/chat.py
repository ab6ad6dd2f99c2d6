"""From a conversation to tokens: chat templates, supervised spans, image spans.

A conversation is rendered to pieces of text and images. Text between two images is one chunk and is tokenised once.
Which tokens are supervised follows from where their characters stand, so a mask is right for any tokenizer.

Everything up to the last image is the same for every question about the same images. That is the prefix whose
key-value cache evaluation, the bundle and training share (``Encoded.prefix_length``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tokenizers import Tokenizer

from manyeyes.errors import BundleError, RecipeError, RecordError, did_you_mean

IMAGE_PLACEHOLDER = "<image>"

Turns = Sequence[tuple[str, str]]
"""Speaker (``human`` or ``gpt``) and text of each turn, in order."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text around turns.

    A conversation reads: ``system_prefix system system_suffix``, then for each exchange ``human_prefix text
    human_suffix gpt_prefix gpt_lead answer gpt_end gpt_after``. An empty system text takes its prefix and suffix
    along. The beginning-of-sequence token is the tokenizer's own affair: it comes first where the tokenizer's
    post-processor puts one.

    Attributes:
        name: Its row in ``CHAT_TEMPLATES``.
        system: System text; a recipe may replace it.
        system_prefix: Before the system text.
        system_suffix: After the system text.
        human_prefix: Before a question.
        human_suffix: After a question.
        gpt_prefix: Where the generation prompt ends.
        gpt_lead: Before an answer; supervised, because the model writes it.
        gpt_end: Ends an answer; supervised. Its last token stops generation.
        gpt_after: After the end; not supervised.
        images_only: Of a question only its images are kept (captioning, as in LLaVA's first stage).
    """

    name: str
    system: str = ""
    system_prefix: str = ""
    system_suffix: str = ""
    human_prefix: str = ""
    human_suffix: str = ""
    gpt_prefix: str = ""
    gpt_lead: str = ""
    gpt_end: str = ""
    gpt_after: str = ""
    images_only: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChatTemplate:
        """Read what ``as_dict`` wrote.

        Raises:
            BundleError: A field is unknown, or the name is missing.
        """
        names = {field.name for field in fields(cls)}
        if not {"name"} <= set(values) <= names:
            raise BundleError(
                f"chat template has the fields {sorted(values)}",
                f"name is needed, and no more than {sorted(names)}",
                "Export the bundle again.",
            )
        return cls(**values)


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    # LLaVA's first stage: image, caption, newline (github.com/haotian-liu/LLaVA, preprocess_plain).
    "plain": ChatTemplate(name="plain", gpt_end="\n", images_only=True),
    # Vicuna 1.1, as LLaVA-1.5 uses it (conv_vicuna_v1).
    "vicuna_v1": ChatTemplate(
        name="vicuna_v1",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system_suffix=" ",
        human_prefix="USER: ",
        human_suffix=" ",
        gpt_prefix="ASSISTANT:",
        gpt_lead=" ",
        gpt_end="</s>",
    ),
    # OpenAI's chat markup, as Qwen uses it.
    "chatml": ChatTemplate(
        name="chatml",
        system="You are a helpful assistant.",
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>\n",
        human_prefix="<|im_start|>user\n",
        human_suffix="<|im_end|>\n",
        gpt_prefix="<|im_start|>assistant\n",
        gpt_end="<|im_end|>",
        gpt_after="\n",
    ),
}


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


def get_chat_template(name: str) -> ChatTemplate:
    """A row of ``CHAT_TEMPLATES``.

    Raises:
        RecipeError: No such template; names the nearest.
    """
    if name not in CHAT_TEMPLATES:
        raise RecipeError(
            f'chat template is "{name}"',
            "no such template",
            f"{did_you_mean(name, CHAT_TEMPLATES)}The templates are {', '.join(CHAT_TEMPLATES)}.",
        )
    return CHAT_TEMPLATES[name]


def render(template: ChatTemplate, turns: Turns, *, system: str | None = None, generation_prompt: bool = False) -> str:
    """The conversation as one text, ``<image>`` where an image goes.

    Args:
        template: The text around turns.
        turns: Speaker and text of each turn.
        system: Replaces the template's system text.
        generation_prompt: Whether to end where the model goes on.

    Raises:
        RecordError: Turns do not alternate, or an answer holds ``<image>``.
    """
    pieces = _pieces(template, turns, system=system, generation_prompt=generation_prompt)
    return "".join(piece.text if isinstance(piece, _Text) else IMAGE_PLACEHOLDER for piece in pieces)


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
    """
    pieces = list(_pieces(template, turns, system=system, generation_prompt=generation_prompt))
    num_slots = sum(isinstance(piece, _ImageSlot) for piece in pieces)
    if num_slots != len(image_tokens):
        raise RecordError(
            f"conversation has {num_slots} {IMAGE_PLACEHOLDER} and {len(image_tokens)} images",
            "one placeholder per image is needed",
            "Mend the record.",
        )
    encoded = Encoded()
    leading = _leading_ids(tokenizer)
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


def stop_token_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Ids that end an answer: the last token of ``gpt_end``.

    Raises:
        RecipeError: The tokenizer has no token of its own for the end of a turn, so generation could not stop.
    """
    probe = "a" + template.gpt_end
    encoding = tokenizer.encode(probe, add_special_tokens=False)
    start = encoding.offsets[-1][0] if encoding.offsets else 0
    # White space may stand before the token; where all is white space, the last character counts.
    stripped = template.gpt_end.lstrip() or template.gpt_end[-1:]
    if not stripped or start != len(probe) - len(stripped):
        raise RecipeError(
            f'chat template "{template.name}" ends a turn with {template.gpt_end!r}, which the tokenizer splits',
            "one token that ends a turn is needed",
            "Add it to the tokenizer as a special token, or choose another template.",
        )
    return [encoding.ids[-1]]


def _pieces(
    template: ChatTemplate, turns: Turns, *, system: str | None, generation_prompt: bool
) -> Iterator[_Text | _ImageSlot]:
    _check_turns(turns, generation_prompt=generation_prompt)
    system = template.system if system is None else system
    if system:
        yield _Text(template.system_prefix + system + template.system_suffix)
    for speaker, text in turns:
        if speaker == "human":
            yield _Text(template.human_prefix)
            for position, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
                if position > 0:
                    yield _ImageSlot()
                if not template.images_only:
                    yield _Text(part)
            yield _Text(template.human_suffix + template.gpt_prefix)
        else:
            yield _Text(template.gpt_lead + text + template.gpt_end, supervised=True)
            yield _Text(template.gpt_after)


def _check_turns(turns: Turns, *, generation_prompt: bool) -> None:
    for position, (speaker, text) in enumerate(turns):
        expected = "gpt" if position % 2 else "human"
        if speaker != expected:
            raise RecordError(
                f'turn {position} is by "{speaker}"',
                f'"{expected}" is needed there: turns alternate and human speaks first',
                "Mend the record.",
            )
        if speaker == "gpt" and IMAGE_PLACEHOLDER in text:
            raise RecordError(
                f"turn {position} is an answer with {IMAGE_PLACEHOLDER}",
                "placeholders belong to human turns",
                "Mend the record.",
            )
    last_is_human = len(turns) % 2 == 1
    if not turns or last_is_human != generation_prompt:
        ends = f'ends with "{turns[-1][0]}"' if turns else "is empty"
        needed = "a question to answer" if generation_prompt else "an answer to every question"
        raise RecordError(f"conversation {ends}", f"{needed} is needed", "Mend the turns.")


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
    encoding = tokenizer.encode(text, add_special_tokens=False)
    encoded.input_ids.extend(encoding.ids)
    encoded.supervised.extend(_overlaps(encoding.offsets, spans))


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[bool]:
    # A token without characters of its own (a byte of a longer character, say) belongs where it starts.
    for start, end in offsets:
        yield any(start < stop and max(end, start + 1) > begin for begin, stop in spans)


def _leading_ids(tokenizer: Tokenizer) -> list[int]:
    # What the tokenizer's post-processor puts in front of a text, such as Llama's <s>.
    with_special = tokenizer.encode("a", add_special_tokens=True)
    count = 0
    for is_special in with_special.special_tokens_mask:
        if not is_special:
            break
        count += 1
    return list(with_special.ids[:count])
