"""Chat templates: the text around the turns of a conversation, one row a published format.

Rows repeat what a published model was trained on, slips included: a format is a fact about its weights. Where systems
that share a name differ (Llama 3, Mistral, Gemma, ChatML), each has its own row.

Sources: github.com/haotian-liu/LLaVA, github.com/NVlabs/EAGLE, github.com/cambrian-mllm/cambrian and
github.com/dvlab-research/MGM, each its ``conversation.py`` (Apache-2.0); model cards for the language models' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from manyeyes.errors import BundleError, RecipeError, did_you_mean
from manyeyes.runtime.bundle_contents import TemplateText, read_part

TOKENIZER_TEMPLATE = "tokenizer"
"""Names the tokenizer's own chat template instead of a row."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text around turns.

    A conversation reads: ``start``, ``system_prefix system system_suffix``, then for each exchange ``human_prefix text
    human_suffix gpt_prefix gpt_lead answer gpt_end gpt_after``, with ``between`` from one exchange to the next. An
    empty system text takes its prefix and suffix along. An image stands between ``image_prefix`` and ``image_suffix``.

    Attributes:
        name: Its row in ``CHAT_TEMPLATES``, or ``tokenizer``.
        system: System text; a recipe may replace it.
        system_prefix: Before the system text.
        system_suffix: After the system text.
        human_prefix: Before a question.
        human_suffix: After a question.
        gpt_prefix: Where the generation prompt ends.
        gpt_lead: Before an answer; supervised, because the model writes it.
        gpt_end: Ends an answer; supervised.
        gpt_after: After the end; not supervised.
        images_only: Of a question only its images are kept (captioning, as in LLaVA's first stage).
        start: Before everything else, with or without a system text.
        between: After an exchange that another one follows; not supervised.
        system_inside: The system text stands inside the first question, behind ``human_prefix``.
        takes_system: Whether there may be a system text at all.
        adds_bos: The beginning-of-sequence token is the tokenizer's own affair: what its post-processor puts in front
            comes first. Else it is there only where the template's own text holds it.
        trims: White space around each text is left out.
        stop: What ends generation, where that is not ``gpt_end`` without the white space in front of it. ``gpt_end``
            holds it.
        stop_splits: The end is ordinary characters, such as ``###``, which tokenizers split: its first token ends
            generation.
        asked_as: Row whose text asks for an answer, where a model was trained on one text and asked with another.
        image_prefix: Before each image.
        image_suffix: After each image.
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
    start: str = ""
    between: str = ""
    system_inside: bool = False
    takes_system: bool = True
    adds_bos: bool = True
    trims: bool = False
    stop: str = ""
    stop_splits: bool = False
    asked_as: str = ""
    image_prefix: str = ""
    image_suffix: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChatTemplate:
        """Read what ``as_dict`` wrote.

        Raises:
            BundleError: A field is unknown or of another type, or the name is missing.
        """
        template = cls(**dict(read_part(TemplateText, values, what="chat template")))
        if template.asked_as and template.asked_as not in CHAT_TEMPLATES:
            raise BundleError(
                f'chat template has asked_as "{template.asked_as}"',
                f"one of {', '.join(CHAT_TEMPLATES)}",
                "Update manyeyes.",
            )
        return template


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAVA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_LLAVA_LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
# No space after "language.", as published.
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
# Meta's own; the two spaces in it are published so.
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
# Trained with the line breaks and indents of a Python string; 91 tokens up to the image with them.
_CAMBRIAN_LLAMA_SYSTEM = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n"
    "    As a multimodal AI, you have the ability to process and analyze images. Whenever an image is present in the "
    "conversation, very carefully examine it and consider its content when formulating your response.\n"
    "    You should give concise responses to very simple questions, but provide thorough responses to more complex "
    "and open-ended questions. "
)
_CAMBRIAN_CHATML_SYSTEM = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. "
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is present in the "
    "conversation, very carefully examine it and consider its content when formulating your response. "
    "You should give concise responses to very simple questions, but provide thorough responses to more complex "
    "and open-ended questions."
)

_VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    system=_VICUNA_SYSTEM,
    system_suffix=" ",
    human_prefix="USER: ",
    human_suffix=" ",
    gpt_prefix="ASSISTANT:",
    gpt_lead=" ",
    gpt_end="</s>",
)
_LLAMA_2 = ChatTemplate(
    name="llama_2",
    system=_LLAMA_2_SYSTEM,
    system_prefix="<<SYS>>\n",
    system_suffix="\n<</SYS>>\n\n",
    human_prefix="[INST] ",
    human_suffix=" [/INST]",
    gpt_lead=" ",
    gpt_end=" </s>",
    between="<s>",
    system_inside=True,
)
_LLAMA_3 = ChatTemplate(
    name="llama_3",
    start="<|begin_of_text|>",
    system=_LLAVA_LLAMA_SYSTEM,
    system_prefix="<|start_header_id|>system<|end_header_id|>\n\n",
    system_suffix="<|eot_id|>",
    human_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
    human_suffix="<|eot_id|>",
    gpt_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
    gpt_end="<|eot_id|>",
    adds_bos=False,
    trims=True,
)
# The markup of MPT as LLaVA renders it: no newline after the end of a turn.
_CHATML_DIRECT = ChatTemplate(
    name="chatml_direct",
    system="Answer the questions.",
    system_prefix="<|im_start|>system\n",
    system_suffix="<|im_end|>",
    human_prefix="<|im_start|>user\n",
    human_suffix="<|im_end|>",
    gpt_prefix="<|im_start|>assistant\n",
    gpt_end="<|im_end|>",
)
_GEMMA = ChatTemplate(
    name="gemma",
    human_prefix="<start_of_turn>user\n",
    human_suffix="<end_of_turn>\n",
    gpt_prefix="<start_of_turn>model\n",
    gpt_end="<end_of_turn>",
    gpt_after="\n",
    takes_system=False,
    trims=True,
)

# LLaVA of April 2023: trained on this text, the loss counting the answer's header and the ### of the next turn; and
# asked with the text of `llava_v0_prompt`. (The published mask slips by a token a turn where the tokenizer adds a
# beginning of sequence; this one does not.)
_LLAVA_V0 = ChatTemplate(
    name="llava_v0",
    system=_LLAVA_SYSTEM,
    system_suffix="\n\n### ",
    human_prefix="Human: ",
    human_suffix="\n",
    gpt_lead="### Assistant: ",
    gpt_end="\n###",
    gpt_after=" ",
    stop="###",
    stop_splits=True,
    asked_as="llava_v0_prompt",
)
_LLAVA_V0_PROMPT = ChatTemplate(
    name="llava_v0_prompt",
    system=_LLAVA_SYSTEM,
    system_suffix="###",
    human_prefix="Human: ",
    human_suffix="###",
    gpt_prefix="Assistant:",
    gpt_lead=" ",
    gpt_end="###",
    stop_splits=True,
)
_LLAVA_V1 = replace(_VICUNA_V1, name="llava_v1", system=_LLAVA_SYSTEM)
# Images between tags. (LLaVA's web demo put the image into an exchange of its own, answered by "Received."; training
# did not, and this asks as it trains.)
_MMTAG: dict[str, Any] = {"system": _MMTAG_SYSTEM, "image_prefix": "<Image>", "image_suffix": "</Image>"}

_ROWS = (
    # LLaVA's first stage: image, caption, newline.
    ChatTemplate(name="plain", gpt_end="\n", images_only=True),
    # Vicuna 1.1: LLaVA-1.5, Eagle, Cambrian-1 and Mini-Gemini on Vicuna.
    _VICUNA_V1,
    _LLAVA_V0,
    _LLAVA_V0_PROMPT,
    replace(_LLAVA_V0, name="llava_v0_mmtag", asked_as="llava_v0_mmtag_prompt", **_MMTAG),
    replace(_LLAVA_V0_PROMPT, name="llava_v0_mmtag_prompt", **_MMTAG),
    # Vicuna 1.1 with a human for a user.
    _LLAVA_V1,
    replace(_LLAVA_V1, name="llava_v1_mmtag", **_MMTAG),
    # Beginning and end of sequence around every exchange, the first beginning from the tokenizer.
    _LLAMA_2,
    replace(_LLAMA_2, name="llava_llama_2", system=_LLAVA_LLAMA_SYSTEM),
    # LLaVA's on Llama 3, which is Meta's own markup; one beginning of sequence. (LLaVA-NeXT's loss counts the marks of
    # every header too; here it counts answers and their ends, as everywhere.)
    _LLAMA_3,
    # Eagle: the system text holds a beginning of sequence and the tokenizer adds another.
    replace(_LLAMA_3, name="eagle_llama_3", system=_VICUNA_SYSTEM, adds_bos=True, trims=False),
    # Cambrian-1: no newlines behind the headers, and a tokenizer that adds nothing.
    replace(
        _LLAMA_3,
        name="cambrian_llama_3",
        system=_CAMBRIAN_LLAMA_SYSTEM,
        system_prefix="<|start_header_id|>system<|end_header_id|>",
        human_prefix="<|start_header_id|>user<|end_header_id|>",
        gpt_prefix="<|start_header_id|>assistant<|end_header_id|>",
        trims=False,
    ),
    # Mini-Gemini: the answer's header says "system". One beginning of sequence: the published text leaves it to the
    # tokenizer since commit 769820c; in the text it does not depend on the tokenizer.
    replace(
        _LLAMA_3,
        name="mini_gemini_llama_3",
        gpt_prefix="<|start_header_id|>system<|end_header_id|>\n\n",
        trims=False,
    ),
    # LLaVA, Eagle and Cambrian-1 on Mistral: Llama 2 without a beginning of sequence between exchanges.
    replace(_LLAMA_2, name="mistral", system="", between=""),
    # Mini-Gemini on Mixtral: with one.
    replace(_LLAMA_2, name="mini_gemini_mistral", system=""),
    # OpenAI's chat markup, as Qwen uses it.
    ChatTemplate(
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
    # LLaVA-1.6, Eagle (its yi_34b_chatml_direct) and Mini-Gemini on Hermes-Yi-34B.
    _CHATML_DIRECT,
    # Cambrian-1 on Hermes-Yi-34B: of its two definitions the later one, with the persona, wins.
    replace(_CHATML_DIRECT, name="cambrian_chatml", system=_CAMBRIAN_CHATML_SYSTEM),
    # LLaVA on MPT.
    replace(
        _CHATML_DIRECT,
        name="mpt",
        system="A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
    ),
    # Google's own.
    _GEMMA,
    # Mini-Gemini: each answer ends the turn and then the sequence.
    replace(_GEMMA, name="mini_gemini_gemma", gpt_end="<end_of_turn>\n<eos>", gpt_after="", stop="<eos>", trims=False),
    # Microsoft's own, as Cambrian-1 uses it: newlines between turns, none at the end.
    ChatTemplate(
        name="phi_3",
        system="You are a helpful AI assistant.",
        system_prefix="<|system|>\n",
        system_suffix="<|end|>\n",
        human_prefix="<|user|>\n",
        human_suffix="<|end|>\n",
        gpt_prefix="<|assistant|>\n",
        gpt_end="<|end|>",
        between="\n",
    ),
)

CHAT_TEMPLATES: dict[str, ChatTemplate] = {row.name: row for row in _ROWS}


def get_chat_template(name: str) -> ChatTemplate:
    """A row of ``CHAT_TEMPLATES``.

    Raises:
        RecipeError: No such template; names the nearest.
    """
    if name == TOKENIZER_TEMPLATE:
        raise RecipeError(
            f'chat template is "{name}", the tokenizer\'s own',
            "a tokenizer that has one",
            "Name a row of CHAT_TEMPLATES here.",
        )
    if name not in CHAT_TEMPLATES:
        names = [*CHAT_TEMPLATES, TOKENIZER_TEMPLATE]
        raise RecipeError(
            f'chat template is "{name}"',
            "no such template",
            f"{did_you_mean(name, names)}The templates are {', '.join(names)}.",
        )
    return CHAT_TEMPLATES[name]
