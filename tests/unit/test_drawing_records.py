"""Records that teach a model to ask for pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from data_samples import make_record, make_snapshot
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from manyeyes.data.profile import build_profile
from manyeyes.data.records import Record, Turn, check_record
from manyeyes.data.shards import RecordReader, write_shards
from manyeyes.errors import RecordError
from manyeyes.runtime.chat import CHAT_TEMPLATES, encode_conversation


def drawing_record(answer: str, *, question: str = "Draw a cat. <GEN>", number: int = 0) -> Record:
    turns = (Turn("human", question), Turn("gpt", answer))
    return dataclasses.replace(make_record(number, num_images=0), turns=turns)


GOOD = drawing_record("Here it is. <h> a red cat </h>")


def test_a_text_only_record_that_asks_for_a_picture_passes_and_survives_its_shard(tmp_path: Path) -> None:
    check_record(GOOD)
    reader = RecordReader(write_shards([GOOD], tmp_path, "train"))
    assert reader.read(0) == GOOD


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Here it is.", "turn 1 (gpt) answers <GEN> without a prompt"),
        ("Here: <h> a red cat", "turn 1 (gpt): <h> at character 6 of the answer has no </h>"),
        ("Here: <h></h>", "turn 1 (gpt): nothing stands between <h> and </h>"),
    ],
)
def test_an_answer_that_cannot_be_drawn_is_refused(answer: str, found: str) -> None:
    with pytest.raises(RecordError) as caught:
        check_record(drawing_record(answer))
    assert found in caught.value.found


def test_tags_mean_nothing_where_no_picture_was_asked_for() -> None:
    check_record(drawing_record("write </h> at its end", question="how does a heading end?"))


def test_validation_quarantines_what_cannot_be_drawn(tmp_path: Path) -> None:
    records = [GOOD, drawing_record("no prompt", number=1)]
    profile = build_profile(make_snapshot(tmp_path, {"train": records}), ["toy-train"], eval_datasets=[])
    assert [bool(problem) for problem in profile["problem"]] == [False, True]
    assert "without a prompt" in profile["problem"][1]


def test_the_loss_counts_the_prompt_with_its_tags() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False)
    )
    turns = [(turn.speaker, turn.text) for turn in GOOD.turns]
    encoded = encode_conversation(tokenizer, CHAT_TEMPLATES["vicuna_v1"], turns, image_tokens=[], image_token_id=9999)
    counted = [token for token, keep in zip(encoded.input_ids, encoded.supervised, strict=True) if keep]
    assert "<h> a red cat </h>" in tokenizer.decode(counted, skip_special_tokens=False)
    assert "<GEN>" not in tokenizer.decode(counted, skip_special_tokens=False)
