"""Every published template, token by token, with a tokenizer whose ids are written down here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from manyeyes.chat import IGNORE_INDEX, labels_of, split_branches
from manyeyes.errors import RecipeError
from manyeyes.runtime.chat import (
    Encoded,
    Turns,
    encode_answers,
    encode_conversation,
    render_turns,
    render_with_spans,
    stop_token_ids,
)
from manyeyes.runtime.templates import CHAT_TEMPLATES, get_chat_template

MARKS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|begin_of_text|>": 3,
    "<|start_header_id|>": 4,
    "<|end_header_id|>": 5,
    "<|eot_id|>": 6,
    "<|im_start|>": 7,
    "<|im_end|>": 8,
    "<start_of_turn>": 9,
    "<end_of_turn>": 10,
    "<eos>": 11,
    "<|system|>": 12,
    "<|user|>": 13,
    "<|assistant|>": 14,
    "<|end|>": 15,
}
WORDS = {
    " ": 20,
    "\n": 21,
    "system": 22,
    "user": 23,
    "assistant": 24,
    "model": 25,
    "S": 26,
    "Q": 27,
    "A": 28,
    "QQ": 29,
    "AA": 30,
    "USER": 31,
    "ASSISTANT": 32,
    ":": 33,
    "###": 34,
    "Human": 35,
    "Assistant": 36,
    "[INST]": 37,
    "[/INST]": 38,
    "<<SYS>>": 39,
    "<</SYS>>": 40,
    "<": 41,
    "</": 42,
    ">": 43,
    "Image": 44,
}
IMAGE = -200
TURNS = [("human", "<image>\nQ"), ("gpt", "A"), ("human", "QQ"), ("gpt", "AA")]


def make_tokenizer(bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({**MARKS, **WORDS}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(MARKS))
    words = Regex(r"\s|\[/?INST\]|<</?SYS>>|\w+|[^\w\s]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, MARKS[bos])])
    return tokenizer


# Ids by hand; a star in front of one that the loss counts, I for the image. System text S, two exchanges.
EXPECTED: dict[str, tuple[str | None, str]] = {
    "plain": ("<s>", "1 26 I *28 *21 *30 *21"),
    "vicuna_v1": (
        "<s>",
        "1 26 20  31 33 20 I 21 27 20  32 33 *20 *28 *2  31 33 20 29 20  32 33 *20 *30 *2",
    ),
    "llava_v1": (
        "<s>",
        "1 26 20  31 33 20 I 21 27 20  32 33 *20 *28 *2  31 33 20 29 20  32 33 *20 *30 *2",
    ),
    # Two newlines, "### Human: ...\n", and all of "### Assistant: ...\n###" counted; a space at the very end.
    "llava_v0": (
        "<s>",
        "1 26 21 21  34 20 35 33 20 I 21 27 21  *34 *20 *36 *33 *20 *28 *21"
        " *34 20 35 33 20 29 21  *34 *20 *36 *33 *20 *30 *21 *34 20",
    ),
    "llava_v0_prompt": (
        "<s>",
        "1 26 34  35 33 20 I 21 27 34  36 33 *20 *28 *34  35 33 20 29 34  36 33 *20 *30 *34",
    ),
    # The image between <Image> and </Image>, the rest as without.
    "llava_v1_mmtag": (
        "<s>",
        "1 26 20  31 33 20 41 44 43 I 42 44 43 21 27 20  32 33 *20 *28 *2  31 33 20 29 20  32 33 *20 *30 *2",
    ),
    "llava_v0_mmtag": (
        "<s>",
        "1 26 21 21  34 20 35 33 20 41 44 43 I 42 44 43 21 27 21  *34 *20 *36 *33 *20 *28 *21"
        " *34 20 35 33 20 29 21  *34 *20 *36 *33 *20 *30 *21 *34 20",
    ),
    "llava_v0_mmtag_prompt": (
        "<s>",
        "1 26 34  35 33 20 41 44 43 I 42 44 43 21 27 34  36 33 *20 *28 *34  35 33 20 29 34  36 33 *20 *30 *34",
    ),
    # The first <s> is the tokenizer's, the second the template's.
    "llama_2": (
        "<s>",
        "1 37 20 39 21 26 21 40 21 21 I 21 27 20 38 *20 *28 *20 *2  1 37 20 29 20 38 *20 *30 *20 *2",
    ),
    "llava_llama_2": (
        "<s>",
        "1 37 20 39 21 26 21 40 21 21 I 21 27 20 38 *20 *28 *20 *2  1 37 20 29 20 38 *20 *30 *20 *2",
    ),
    "mistral": (
        "<s>",
        "1 37 20 39 21 26 21 40 21 21 I 21 27 20 38 *20 *28 *20 *2  37 20 29 20 38 *20 *30 *20 *2",
    ),
    "mini_gemini_mistral": (
        "<s>",
        "1 37 20 39 21 26 21 40 21 21 I 21 27 20 38 *20 *28 *20 *2  1 37 20 29 20 38 *20 *30 *20 *2",
    ),
    # One beginning of sequence though the tokenizer would add another.
    "llama_3": (
        "<|begin_of_text|>",
        "3 4 22 5 21 21 26 6  4 23 5 21 21 I 21 27 6  4 24 5 21 21 *28 *6  4 23 5 21 21 29 6  4 24 5 21 21 *30 *6",
    ),
    # Two of them: Eagle's text holds one, and its tokenizer adds another.
    "eagle_llama_3": (
        "<|begin_of_text|>",
        "3 3 4 22 5 21 21 26 6  4 23 5 21 21 I 21 27 6  4 24 5 21 21 *28 *6  4 23 5 21 21 29 6  4 24 5 21 21 *30 *6",
    ),
    # No newlines behind the headers.
    "cambrian_llama_3": (
        "<|begin_of_text|>",
        "3 4 22 5 26 6  4 23 5 I 21 27 6  4 24 5 *28 *6  4 23 5 29 6  4 24 5 *30 *6",
    ),
    # The answer's header says "system".
    "mini_gemini_llama_3": (
        "<|begin_of_text|>",
        "3 4 22 5 21 21 26 6  4 23 5 21 21 I 21 27 6  4 22 5 21 21 *28 *6  4 23 5 21 21 29 6  4 22 5 21 21 *30 *6",
    ),
    "chatml": (
        None,
        "7 22 21 26 8 21  7 23 21 I 21 27 8 21  7 24 21 *28 *8 21  7 23 21 29 8 21  7 24 21 *30 *8 21",
    ),
    # No newline behind <|im_end|>; the tokenizer of Yi adds <s>.
    "chatml_direct": ("<s>", "1 7 22 21 26 8  7 23 21 I 21 27 8  7 24 21 *28 *8  7 23 21 29 8  7 24 21 *30 *8"),
    "cambrian_chatml": ("<s>", "1 7 22 21 26 8  7 23 21 I 21 27 8  7 24 21 *28 *8  7 23 21 29 8  7 24 21 *30 *8"),
    "mpt": (None, "7 22 21 26 8  7 23 21 I 21 27 8  7 24 21 *28 *8  7 23 21 29 8  7 24 21 *30 *8"),
    "gemma": (
        "<s>",
        "1 9 23 21 I 21 27 10 21  9 25 21 *28 *10 21  9 23 21 29 10 21  9 25 21 *30 *10 21",
    ),
    # <eos> behind each answer.
    "mini_gemini_gemma": (
        "<s>",
        "1 9 23 21 I 21 27 10 21  9 25 21 *28 *10 *21 *11  9 23 21 29 10 21  9 25 21 *30 *10 *21 *11",
    ),
    "phi_3": (
        "<s>",
        "1 12 21 26 15 21  13 21 I 21 27 15 21  14 21 *28 *15 21  13 21 29 15 21  14 21 *30 *15",
    ),
}
STOPS = {
    "plain": 21,
    **{name: 34 for name in CHAT_TEMPLATES if name.startswith("llava_v0")},
    "mini_gemini_gemma": 11,
    "gemma": 10,
    "phi_3": 15,
    **{name: 2 for name in CHAT_TEMPLATES if name.startswith(("vicuna", "llava_v1", "llama_2"))},
    **dict.fromkeys(("llava_llama_2", "mistral", "mini_gemini_mistral"), 2),
    **{name: 6 for name in CHAT_TEMPLATES if name.endswith("llama_3")},
    **dict.fromkeys(("chatml", "chatml_direct", "cambrian_chatml", "mpt"), 8),
}


def test_every_template_has_its_ids_written_here() -> None:
    assert set(EXPECTED) == set(STOPS) == set(CHAT_TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
def test_ids_and_mask_are_those_written_by_hand(name: str) -> None:
    bos, expected = EXPECTED[name]
    template = CHAT_TEMPLATES[name]
    turns = [("human", "<image>"), ("gpt", "A"), ("human", ""), ("gpt", "AA")] if name == "plain" else TURNS
    encoded = encode_conversation(
        make_tokenizer(bos),
        template,
        turns,
        image_tokens=[1],
        image_token_id=IMAGE,
        system="S" if template.takes_system else None,
    )
    found = [
        ("*" if counted else "") + ("I" if token == IMAGE else str(token))
        for token, counted in zip(encoded.input_ids, encoded.supervised, strict=True)
    ]
    assert found == expected.split()


# Beginnings of sequence in front of a text, with a tokenizer that adds one and with one that adds none.
BEGINNINGS = {
    **dict.fromkeys(CHAT_TEMPLATES, (1, 0)),
    # In the text, so that the tokenizer does not matter.
    **dict.fromkeys(("llama_3", "cambrian_llama_3", "mini_gemini_llama_3"), (1, 1)),
    # Published so: one in the text, and the tokenizer's own.
    "eagle_llama_3": (2, 1),
}
BEGINS_EXCHANGES = ("llama_2", "llava_llama_2", "mini_gemini_mistral")


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_begins_a_sequence_as_often_as_its_family(name: str, adds: bool) -> None:
    template = CHAT_TEMPLATES[name]
    bos = "<|begin_of_text|>" if name.endswith("llama_3") else "<s>"
    tokenizer, bos_id = make_tokenizer(bos if adds else None), MARKS[bos]
    expected = BEGINNINGS[name][0 if adds else 1]
    system = "S" if template.takes_system else None
    turns = [("human", "<image>"), ("gpt", "A"), ("human", ""), ("gpt", "AA")] if name == "plain" else TURNS

    def encode(turns: Turns, images: int) -> Encoded:
        return encode_conversation(
            tokenizer,
            template,
            turns,
            image_tokens=[1] * images,
            image_token_id=IMAGE,
            system=system,
            generation_prompt=turns[-1][0] == "human",
        )

    trained = encode(turns, 1)
    asked, asked_without_image = encode(turns[:1], 1), encode([("human", "Q")], 0)
    group = split_branches([encode(turns[:2], 1)]) if name != "plain" else None
    for ids in (
        trained.input_ids,
        asked.input_ids,
        asked_without_image.input_ids,
        *([group.prefix_ids] if group else []),
    ):
        assert list(ids[:expected]) == [bos_id] * expected
        later = list(ids[expected:]).count(bos_id)
        assert later == (1 if name in BEGINS_EXCHANGES and ids is trained.input_ids else 0)
    assert labels_of(trained)[:expected] == [IGNORE_INDEX] * expected
    assert bos_id not in labels_of(trained)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "plain"])
def test_options_begin_no_sequence(name: str, adds: bool) -> None:
    bos = "<|begin_of_text|>" if name.endswith("llama_3") else "<s>"
    tokenizer, template = make_tokenizer(bos if adds else None), CHAT_TEMPLATES[name]
    stop_ids = stop_token_ids(tokenizer, template)
    for question in ("<image>\nQ", "Q"):
        for ids in encode_answers(tokenizer, template, [("human", question)], ["A", "AA"], stop_ids=stop_ids):
            assert MARKS[bos] not in ids


@pytest.mark.parametrize("name", STOPS)
def test_generation_stops_at_the_end_of_a_turn(name: str) -> None:
    assert stop_token_ids(make_tokenizer(None), CHAT_TEMPLATES[name]) == [STOPS[name]]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("plain", "llava_v0", "llava_v0_mmtag")])
def test_question_is_asked_as_it_was_trained(name: str) -> None:
    template = CHAT_TEMPLATES[name]
    for count in (1, 3):
        asked = render_turns(template, TURNS[:count], generation_prompt=True)
        assert render_turns(template, TURNS).startswith(asked + template.gpt_lead + TURNS[count][1])


def test_llava_v0_was_asked_with_another_text_than_it_was_trained_on() -> None:
    template = CHAT_TEMPLATES["llava_v0"]
    asked = render_turns(template, TURNS[:1], system="S", generation_prompt=True)
    assert asked == "S###Human: <image>\nQ###Assistant:"
    assert render_turns(template, TURNS[:2], system="S") == "S\n\n### Human: <image>\nQ\n### Assistant: A\n### "
    tagged = render_turns(CHAT_TEMPLATES["llava_v0_mmtag"], TURNS[:1], system="S", generation_prompt=True)
    assert tagged == "S###Human: <Image><image></Image>\nQ###Assistant:"


def test_end_of_ordinary_characters_stops_at_its_first_token() -> None:
    """Llama's tokenizer has no ### behind a newline: it reads ## and #."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "\n": 1, "##": 2, "#": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|##|#|\w+"), "isolated")
    assert stop_token_ids(tokenizer, CHAT_TEMPLATES["llava_v0"]) == [2]


# Texts that depend on nothing else, as the four systems published them.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
)
VICUNA += "and polite answers to the user's questions."
PUBLISHED: dict[str, Callable[[str], bool]] = {
    "llava_v1": lambda text: text.startswith("A chat between a curious human and ") and " to the human's que" in text,
    "llava_v1_mmtag": lambda text: (
        text.startswith("A chat between a curious user and ")
        and "using natural language.The visual content will be provided with the following format: "
        "<Image>visual content</Image>. USER: <Image><image></Image>\nQ ASSISTANT: A</s>"
        in text
    ),
    "llava_v0_mmtag": lambda text: (
        "<Image>visual content</Image>.\n\n### Human: <Image><image></Image>\nQ\n### Assistant: A" in text
    ),
    "llama_2": lambda text: (
        text.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. ")
        and "while being safe.  Your answers" in text
    ),
    "llava_llama_2": lambda text: text.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant. "),
    "mistral": lambda text: text.startswith("[INST] <image>\nQ [/INST] A </s>[INST] QQ [/INST] AA </s>"),
    "eagle_llama_3": lambda text: text.startswith(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{VICUNA}<|eot_id|><|start_header_id|>user"
    ),
    "cambrian_llama_3": lambda text: (
        text.startswith(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>You are Cambrian, a highly intelligent "
            "multimodal AI trained by NYU Vision X. \n    As a multimodal AI, "
        )
        and " open-ended questions. <|eot_id|><|start_header_id|>user<|end_header_id|><image>" in text
    ),
    "cambrian_chatml": lambda text: (
        text.startswith("<|im_start|>system\nYou are Cambrian, ")
        and "Vision X. As a multimodal AI" in text
        and "open-ended questions.<|im_end|><|im_start|>user\n<image>" in text
    ),
    "chatml_direct": lambda text: text.startswith(
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ<|im_end|><|im_start|>assistant"
    ),
    "mini_gemini_gemma": lambda text: text.startswith(
        "<start_of_turn>user\n<image>\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<eos><start_of_turn>user"
    ),
    "phi_3": lambda text: (
        text.startswith(
            "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nQ<|end|>\n<|assistant|>\nA<|end|>\n"
        )
        and text.endswith("AA<|end|>")
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_text_is_the_published_one(name: str) -> None:
    assert PUBLISHED[name](render_turns(CHAT_TEMPLATES[name], TURNS))


def test_spans_in_the_text_are_the_supervised_ones() -> None:
    text, spans = render_with_spans(CHAT_TEMPLATES["llama_2"], TURNS)
    assert [text[start:end] for start, end in spans] == [" A </s>", " AA </s>"]


def test_white_space_around_a_turn_goes_where_the_template_trims() -> None:
    turns = [("human", " Q\n"), ("gpt", "\nA ")]
    assert "Q<end_of_turn>\n<start_of_turn>model\nA<end_of" in render_turns(CHAT_TEMPLATES["gemma"], turns)
    assert " Q\n<|eot_id|>" in render_turns(CHAT_TEMPLATES["eagle_llama_3"], turns)


@pytest.mark.parametrize("name", ["gemma", "mini_gemini_gemma"])
def test_system_text_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="no place"):
        render_turns(CHAT_TEMPLATES[name], TURNS, system="S")
    assert render_turns(CHAT_TEMPLATES[name], TURNS, system="") == render_turns(CHAT_TEMPLATES[name], TURNS)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("phi3", "phi_3"),
        ("phi-3", "phi_3"),
        ("llama3", "llama_3"),
        ("tokeniser", "tokenizer"),
        ("llava_v2", "llava_v1"),
    ],
)
def test_misspelt_template_gets_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(RecipeError, match=f'Did you mean "{right}"'):
        get_chat_template(wrong)


def test_the_tokenizers_own_template_is_no_row() -> None:
    with pytest.raises(RecipeError, match="tokenizer's own"):
        get_chat_template("tokenizer")
