"""Options are tokenised as they stand behind the prompt, and checked before they are asked."""

from __future__ import annotations

import re

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from manyeyes.errors import RecipeError, RecordError
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.chat import (
    CHAT_TEMPLATES,
    encode_answers,
    encode_conversation,
    get_chat_template,
    stop_token_ids,
)
from manyeyes.runtime.decoding import OptionEncoder, leading_options

LETTERS = ("A", "B")
ASCII = [chr(code) for code in range(33, 127)]


def build(alphabet: list[str], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's way: a mark for a space, and one in front of every text."""
    tokenizer = build(["▁", *ASCII, "\n"], [("▁", "A"), ("▁", "B")], ["</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def byte_level(special: list[str], *merges: tuple[str, str]) -> Tokenizer:
    """GPT-2's way: a letter for every byte, and words that begin with their space."""
    tokenizer = build(sorted(pre_tokenizers.ByteLevel.alphabet()), list(merges), special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def tokens_of(
    tokenizer: Tokenizer, template: str, answers: tuple[str, ...], question: str = "Which?"
) -> list[list[str]]:
    row = get_chat_template(template)
    stop_ids = stop_token_ids(tokenizer, row)
    turns = [("human", "<image>\nWhich?")]
    encoded = encode_answers(tokenizer, row, turns, answers, stop_ids=stop_ids)
    return [[str(tokenizer.id_to_token(token)) for token in ids] for ids in encoded]


def test_sentencepiece_joins_an_option_with_the_space_in_front_of_it() -> None:
    tokenizer = sentencepiece()
    assert tokens_of(tokenizer, "vicuna_v1", LETTERS) == [["▁A", "</s>"], ["▁B", "</s>"]]
    # On its own the option has other tokens: the tokenizer puts a space of its own in front.
    assert tokenizer.encode(" A").tokens == ["▁", "▁A"]


def test_bytes_join_an_option_with_the_space_in_front_of_it() -> None:
    tokenizer = byte_level(["</s>"], ("Ġ", "A"), ("Ġ", "B"))
    assert tokens_of(tokenizer, "vicuna_v1", LETTERS) == [["ĠA", "</s>"], ["ĠB", "</s>"]]


def test_an_option_behind_a_header_has_no_space() -> None:
    # GPT-2's pre-tokenizer cuts the header's two newlines apart where a text follows them, and not at the prompt's end.
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(special, ("Ġ", "A"), ("Ġ", "B"), ("Ċ", "Ċ"))
    assert tokens_of(tokenizer, "llama_3", LETTERS) == [["A", "<|eot_id|>"], ["B", "<|eot_id|>"]]


def test_an_option_of_several_tokens_ends_with_the_turn() -> None:
    tokenizer = byte_level(["</s>"], ("Ġ", "1"))
    assert tokens_of(tokenizer, "vicuna_v1", ("1", "12")) == [["Ġ1", "</s>"], ["Ġ1", "2", "</s>"]]


def test_the_end_of_a_turn_of_ordinary_characters_is_its_first_token() -> None:
    # LLaVA of April 2023 was trained on one text and is asked with another, whose answers follow "Assistant:".
    tokenizer = byte_level([], ("Ġ", "A"), ("Ġ", "B"))
    assert tokens_of(tokenizer, "llava_v0", LETTERS) == [["ĠA", "#"], ["ĠB", "#"]]


def test_a_tokenizer_that_joins_prompt_and_option_is_refused() -> None:
    tokenizer = build([" ", *ASCII, "\n"], [(":", " ")], ["</s>"])
    with pytest.raises(RecipeError, match=r"joins the end of the prompt, '.*ASSISTANT:', with the answer 'A'"):
        tokens_of(tokenizer, "vicuna_v1", LETTERS)


def test_a_tokenizer_that_drops_an_option_is_refused() -> None:
    tokenizer = build([" ", *ASCII, "\n"], [], ["</s>"])
    tokenizer.normalizer = normalizers.Replace(" é", "")
    with pytest.raises(RecipeError, match="for the answer 'é' and the end of the turn"):
        tokens_of(tokenizer, "vicuna_v1", ("é",))


@pytest.mark.parametrize("name", [name for name, row in CHAT_TEMPLATES.items() if not row.asked_as])
def test_options_have_the_tokens_that_training_counts(name: str) -> None:
    row = get_chat_template(name)
    texts = [value for value in row.as_dict().values() if isinstance(value, str)]
    special = sorted({mark for text in texts for mark in re.findall(r"<[^<>]+>|\[/?INST\]", text)} | {"</s>"})
    tokenizer = byte_level(special, ("Ġ", "A"), ("Ċ", "Ċ"))
    trained = encode_conversation(
        tokenizer, row, [("human", "<image>\nWhich?"), ("gpt", "A")], image_tokens=[1], image_token_id=0
    )
    counted = [token for token, real in zip(trained.input_ids, trained.supervised, strict=True) if real]
    (option,) = tokens_of(tokenizer, name, ("A",))
    assert option == [tokenizer.id_to_token(token) for token in counted[: len(option)]]
    assert tokenizer.token_to_id(option[-1]) in stop_token_ids(tokenizer, row)
    assert len(option) >= 2


@pytest.mark.parametrize(
    ("scores", "leading"),
    [
        ([1.0, 3.0, 2.0], [1]),
        # The first two begin with the same token.
        ([2.0, 2.0, 1.0], [0, 1]),
        # Equally likely, other tokens: the first option.
        ([2.0, 2.0, 2.0], [0, 1]),
        ([-5.0, -5.0, -1.0], [2]),
    ],
)
def test_options_that_share_the_likeliest_first_token_lead(scores: list[float], leading: list[int]) -> None:
    options = [(7, 0), (7, 8, 0), (9, 0)] if scores != [1.0, 3.0, 2.0] else [(7, 0), (8, 0), (9, 0)]
    assert leading_options(scores, options) == leading


def test_options_are_encoded_once_a_question_and_must_leave_room() -> None:
    encoder = OptionEncoder(sentencepiece(), get_chat_template("vicuna_v1"), system=None, max_length=60)
    first = encoder.encode("Which?", LETTERS, num_images=1, prompt_length=50)
    assert first is encoder.encode("Which?", LETTERS, num_images=1, prompt_length=59)
    assert first is not encoder.encode("What?", LETTERS, num_images=1, prompt_length=50)
    with pytest.raises(RecordError, match=r"'Which\?' with its images and its longest option is 61 tokens long"):
        encoder.encode("Which?", LETTERS, num_images=1, prompt_length=60)


def test_every_question_has_options_or_none_has() -> None:
    assert Group((), ("a?", "b?"), (("A",), ())).options(1) == ()
    assert Group((), ("a?", "b?")).options(0) == ()
    with pytest.raises(RecordError, match="2 questions have 1 lists of options"):
        Group((), ("a?", "b?"), (("A", "B"),))


@pytest.mark.parametrize("options", [("A", "A"), ("A", " A"), ("A", ""), ("A", " ")])
def test_options_that_cannot_be_told_apart_are_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(RecordError, match="options that are not empty and that differ"):
        Group((), ("a?",), (options,))
