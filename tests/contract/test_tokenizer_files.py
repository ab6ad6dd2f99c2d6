"""Published tokenizers, read without their own code: ids are those of the originals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import (
    AutoTokenizer,
)

from manyeyes.errors import CheckpointError
from manyeyes.tokenizer_files import build_sentencepiece, load_published_tokenizer, load_tokenizer, parse_sentencepiece
from tests import published_toys as toys
from tests.model_toys import write_tokenizer
from tests.published_toys import PROMPT

TEXTS = [
    PROMPT.replace("<image>", ""),
    "  two  spaces ",
    "na\u00efve \ufb01 \u4f60\u597d \U0001f642\n\ttab  x",
    "USER: USER:",
    " ",
    "",
    "\n",
    "a\u2581b",
]


@pytest.mark.parametrize(
    ("kind", "normalization", "remove"),
    [("bpe", "identity", False), ("bpe", "identity", True), ("unigram", "nmt_nfkc", True), ("bpe", "nmt_nfkc", True)],
)
def test_sentencepiece_ids_are_sentencepieces_own(tmp_path: Path, kind: str, normalization: str, remove: bool) -> None:
    toys.write_sentencepiece(tmp_path, kind=kind, normalization=normalization, remove_extra_whitespaces=remove)
    parsed = parse_sentencepiece((tmp_path / "tokenizer.model").read_bytes(), name="tokenizer.model")
    tokenizer = build_sentencepiece(parsed, legacy=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == pieces.encode(text), text


def test_newer_llama_rule_puts_a_space_in_front_of_the_first_text_alone(tmp_path: Path) -> None:
    toys.write_sentencepiece(tmp_path)
    parsed = parse_sentencepiece((tmp_path / "tokenizer.model").read_bytes(), name="tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    first = pieces.encode("\nred circle")
    # Behind a byte of its own no space is put: two tokens, then the bare text.
    second = pieces.encode("\nis there")[2:]
    found = build_sentencepiece(parsed, legacy=False).encode("\nred circle</s>is there", add_special_tokens=False).ids
    assert found == [*first, 2, *second]


def test_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = "what colour</s>is the shape?"
    expected = AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert expected[0] == 1
    assert load_published_tokenizer(tmp_path, model_type="llama")(text).input_ids == expected


def test_llama_settings_decide_about_the_beginning_of_sequence(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": False,
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_published_tokenizer(tmp_path, model_type="llama")
    assert tokenizer("what").input_ids == tokenizer("what", add_special_tokens=False).input_ids


def test_truncated_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    toys.write_sentencepiece(tmp_path)
    data = (tmp_path / "tokenizer.model").read_bytes()
    with pytest.raises(CheckpointError, match="it ends in the middle of a field"):
        parse_sentencepiece(data[:-3], name="tokenizer.model")


def test_marks_that_take_the_white_space_behind_them_along_do_so_here(tmp_path: Path) -> None:
    marks = ("<|end|>", "<|user|>")
    size = toys.write_sentencepiece(tmp_path, added=marks)
    file = tmp_path / "tokenizer_config.json"
    # As Phi-3 describes its own.
    described = {str(size - 2 + place): {"content": token, "rstrip": True} for place, token in enumerate(marks)}
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "added_tokens_decoder": described}),
        encoding="utf-8",
    )
    tokenizer = load_published_tokenizer(tmp_path, model_type="phi3")
    spaced, tight = (tokenizer(f"red<|end|>{gap}<|user|>{gap}is there").input_ids for gap in ("\n", ""))
    assert spaced == tight
    assert spaced.count(size - 1) == 1


def test_newer_llama_rule_puts_a_space_before_a_mark_or_a_space_that_starts_a_text(tmp_path: Path) -> None:
    marks = ("<|im_start|>", "<|im_end|>")
    size = toys.write_sentencepiece(tmp_path, added=marks)
    file = tmp_path / "tokenizer_config.json"
    # The mark that ends answers is the tokenizer's own end, as in Nous-Hermes-2-Yi-34B.
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "legacy": False, "eos_token": "<|im_end|>"}),
        encoding="utf-8",
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_published_tokenizer(tmp_path, model_type="llama")

    def inner(text: str) -> list[int]:
        # Llama's Python class: no space in front of a text behind a mark.
        return list(pieces.encode("<unk>" + text)[len(pieces.encode("<unk>")) :])

    start, end, space = size - 2, size - 1, pieces.piece_to_id("▁")
    expected = [1, space, start, *inner("red"), end, start, *inner("is there")]
    assert tokenizer("<|im_start|>red<|im_end|><|im_start|>is there").input_ids == expected
    assert tokenizer("red<|im_start|>is there").input_ids == [1, *pieces.encode("red"), start, *inner("is there")]
    assert tokenizer("<|im_end|>red").input_ids == [1, end, *inner("red")]
    assert tokenizer(" red</s><|im_start|>").input_ids == [1, space, *pieces.encode("red"), 2, start]


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    size = toys.write_sentencepiece(tmp_path, added=("<im_start>", "<im_end>"))
    tokenizer = load_published_tokenizer(tmp_path, model_type="llama")
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [size - 2, size - 1]
    assert tokenizer("<im_start>red").input_ids == [
        1,
        *toys.piece_ids(tmp_path, "<im_start>red", added=("<im_start>",))[1:],
    ]


def test_recipe_source_with_sentencepieces_model_alone_is_read_as_convert_reads_it(tmp_path: Path) -> None:
    toys.write_sentencepiece(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.pad_token_id is not None
    for text in TEXTS:
        assert tokenizer(text).input_ids == load_published_tokenizer(tmp_path, model_type="llama")(text).input_ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "a"}}, "added_tokens_decoder"),
        ("added_tokens.json", {"<x>": "1"}, "whole number"),
        ("tokenizer.json", {"model": {}}, "is no tokenizer"),
        ("tokenizer.json", {"model": "[" * 9}, "has no model"),
        ("tokenizer.json", {}, "has no model"),
    ],
)
def test_files_of_a_tokenizer_with_wrong_types_are_refused(
    tmp_path: Path, name: str, content: object, message: str | None
) -> None:
    toys.write_sentencepiece(tmp_path)
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    if message is None:
        load_published_tokenizer(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        load_published_tokenizer(tmp_path)
