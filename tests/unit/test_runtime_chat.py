from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from manyeyes.errors import BundleError, RecipeError, RecordError
from manyeyes.runtime.chat import (
    CHAT_TEMPLATES,
    ChatTemplate,
    Encoded,
    encode_conversation,
    get_chat_template,
    render_turns,
    stop_token_ids,
)

IMAGE = 999
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "<|end|>"]
TEXT = ["USER: what colour is the circle? ASSISTANT: red", "system user assistant yes no blue shape\n"] * 4


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """As Llama's: a space in front of every chunk, bytes for what is unknown, no token in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    bytes_256 = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *SPECIAL, *bytes_256], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def supervised_text(tokenizer: Tokenizer, encoded: Encoded) -> str:
    ids = [token for token, counted in zip(encoded.input_ids, encoded.supervised, strict=True) if counted]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


ONE = [("human", "<image>\nwhat colour is the circle?"), ("gpt", "red")]


def test_vicuna_reads_as_llava_wrote_it() -> None:
    system = CHAT_TEMPLATES["vicuna_v1"].system
    assert render_turns(CHAT_TEMPLATES["vicuna_v1"], [*ONE, ("human", "sure?"), ("gpt", "yes")]) == (
        f"{system} USER: <image>\nwhat colour is the circle? ASSISTANT: red</s>USER: sure? ASSISTANT: yes</s>"
    )


def test_chatml_reads_as_published() -> None:
    assert render_turns(CHAT_TEMPLATES["chatml"], ONE[:1], generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nwhat colour is the circle?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_keeps_only_the_image_of_a_question() -> None:
    assert (
        render_turns(CHAT_TEMPLATES["plain"], [("human", "Describe this.\n<image>"), ("gpt", "a cat")])
        == "<image>a cat\n"
    )


def test_empty_system_text_takes_its_marks_along() -> None:
    assert render_turns(CHAT_TEMPLATES["vicuna_v1"], ONE, system="").startswith("USER: ")
    assert render_turns(CHAT_TEMPLATES["chatml"], ONE, system="").startswith("<|im_start|>user")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("name", ["vicuna_v1", "chatml", "plain"])
def test_supervised_are_answers_and_what_ends_them(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    template = CHAT_TEMPLATES[name]
    turns = [*ONE, ("human", "what shape? émoji 🙂"), ("gpt", "çircle 🙂 yes")]
    encoded = encode_conversation(tokenizer, template, turns, image_tokens=[3], image_token_id=IMAGE)
    answers = [f"{template.gpt_lead}{text}{template.gpt_end}" for speaker, text in turns if speaker == "gpt"]
    assert supervised_text(tokenizer, encoded).split() == "".join(answers).split()
    assert len(encoded.supervised) == len(encoded.input_ids)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
def test_generation_prompt_is_the_beginning_of_the_training_tokens(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    arguments = {"image_tokens": [2], "image_token_id": IMAGE}
    whole = encode_conversation(tokenizer, CHAT_TEMPLATES[name], ONE, **arguments)
    prompt = encode_conversation(tokenizer, CHAT_TEMPLATES[name], ONE[:1], generation_prompt=True, **arguments)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.supervised.index(True) == len(prompt.input_ids)
    assert not any(prompt.supervised)


def test_every_token_of_one_chunk_is_that_of_the_whole_text(byte_level: Tokenizer) -> None:
    turns = [("human", "what shape?"), ("gpt", "circle")]
    encoded = encode_conversation(byte_level, CHAT_TEMPLATES["vicuna_v1"], turns, image_tokens=[], image_token_id=IMAGE)
    assert encoded.input_ids == byte_level.encode(render_turns(CHAT_TEMPLATES["vicuna_v1"], turns)).ids
    assert encoded.prefix_length == 0


def test_prefix_is_the_same_for_every_question_about_the_same_images(byte_level: Tokenizer) -> None:
    encodings = [
        encode_conversation(
            byte_level,
            CHAT_TEMPLATES["vicuna_v1"],
            [("human", f"<image>\n<image>\n{question}"), ("gpt", "yes")],
            image_tokens=[4, 3],
            image_token_id=IMAGE,
        )
        for question in ("is it red?", " \n?", "éa")
    ]
    prefixes = [encoding.input_ids[: encoding.prefix_length] for encoding in encodings]
    assert prefixes[0] == prefixes[1] == prefixes[2]
    assert prefixes[0][-3:] == [IMAGE] * 3


def test_image_spans_say_where_each_image_is(byte_level: Tokenizer) -> None:
    turns = [("human", "a<image>b<image>"), ("gpt", "yes"), ("human", "<image>"), ("gpt", "no")]
    encoded = encode_conversation(
        byte_level, CHAT_TEMPLATES["chatml"], turns, image_tokens=[1, 5, 2], image_token_id=IMAGE
    )
    assert [length for _, length in encoded.image_spans] == [1, 5, 2]
    at_images = [position for position, token in enumerate(encoded.input_ids) if token == IMAGE]
    assert at_images == [p for start, length in encoded.image_spans for p in range(start, start + length)]
    assert not any(encoded.supervised[position] for position in at_images)


def test_token_that_the_post_processor_puts_first_comes_once(byte_level: Tokenizer, metaspace: Tokenizer) -> None:
    arguments = {"image_tokens": [2], "image_token_id": IMAGE}
    with_bos = encode_conversation(byte_level, CHAT_TEMPLATES["vicuna_v1"], ONE, **arguments)
    assert with_bos.input_ids[0] == byte_level.token_to_id("<s>")
    assert with_bos.input_ids.count(byte_level.token_to_id("<s>")) == 1
    without = encode_conversation(metaspace, CHAT_TEMPLATES["vicuna_v1"], ONE, **arguments)
    assert metaspace.token_to_id("<s>") not in without.input_ids


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([("human", "a"), ("human", "b"), ("gpt", "c")], 0, 'turn 1 is by "human"'),
        ([("gpt", "a")], 0, 'turn 0 is by "gpt"'),
        ([("human", "a")], 0, 'ends with "human"'),
        ([], 0, "is empty"),
        ([("human", "a"), ("gpt", "<image>")], 1, "an answer with <image>"),
        ([("human", "<image>"), ("gpt", "a")], 0, "1 <image> and 0 images"),
        ([("human", "q"), ("gpt", "a")], 2, "0 <image> and 2 images"),
        ([("robot", "q"), ("gpt", "a")], 0, 'by "robot"'),
    ],
)
def test_bad_conversation_is_refused(
    byte_level: Tokenizer, turns: list[tuple[str, str]], images: int, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        encode_conversation(
            byte_level, CHAT_TEMPLATES["vicuna_v1"], turns, image_tokens=[1] * images, image_token_id=IMAGE
        )


def test_generation_prompt_after_an_answer_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RecordError, match="a question to answer"):
        render_turns(CHAT_TEMPLATES["vicuna_v1"], ONE, generation_prompt=True)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_stop_token_is_the_last_supervised_one(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoded = encode_conversation(tokenizer, CHAT_TEMPLATES[name], ONE, image_tokens=[1], image_token_id=IMAGE)
    counted = [token for token, counted in zip(encoded.input_ids, encoded.supervised, strict=True) if counted]
    # Neither tokenizer here has ### as one token; its first piece stops.
    stop = counted[-3] if CHAT_TEMPLATES[name].stop_splits else counted[-1]
    assert stop_token_ids(tokenizer, CHAT_TEMPLATES[name]) == [stop]


def test_template_that_a_tokenizer_cannot_end_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    with pytest.raises(RecipeError, match="</s>"):
        stop_token_ids(tokenizer, CHAT_TEMPLATES["vicuna_v1"])
    with pytest.raises(RecipeError, match="splits"):
        stop_token_ids(tokenizer, ChatTemplate(name="endless"))


def test_unknown_template_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match='Did you mean "vicuna_v1"'):
        get_chat_template("vicuna")


def test_template_survives_json_and_refuses_unknown_fields() -> None:
    template = CHAT_TEMPLATES["chatml"]
    assert ChatTemplate.from_dict(template.as_dict()) == template
    with pytest.raises(BundleError, match="colour"):
        ChatTemplate.from_dict({**template.as_dict(), "colour": "red"})
