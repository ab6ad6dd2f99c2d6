from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyeyes.data.snapshot import Snapshot
from manyeyes.encoders import build_encoder, load_encoder_weights
from manyeyes.model.language_model import find_image_token_id, load_language_model
from manyeyes.runtime.chat import encode_conversation, get_chat_template, stop_token_ids
from manyeyes.tokenizer_files import load_tokenizer
from manyeyes.training.warmup import (
    LanguageModelPlan,
    MaskedImagePlan,
    pretrain_encoder,
    pretrain_language_model,
    train_tokenizer,
)
from tests.training_toys import toy_snapshot

PLAN = LanguageModelPlan(
    vocabulary=400, hidden=32, layers=2, heads=2, feed_forward=48, steps=240, turn_rows=24, text_rows=2, text_tokens=32
)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return toy_snapshot(tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def warm(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "lm"
    prose = [f"The {noun} of a module is described here at some length." for noun in ("name", "use", "aim")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyeyes.training.warmup.standard_library_prose", lambda: iter(prose * 3))
        pretrain_language_model(folder, snapshot=snapshot, seed=1, dataset="toy-train", plan=PLAN)
    return folder


def answer(folder: Path, question: str) -> str:
    tokenizer, model = load_tokenizer(folder), load_language_model(folder, pretrained=True)
    template = get_chat_template("vicuna_v1")
    encoded = encode_conversation(
        tokenizer.backend_tokenizer,
        template,
        [("human", question)],
        image_tokens=[],
        image_token_id=find_image_token_id(tokenizer, model.config),
        system="",
        generation_prompt=True,
    )
    ids = torch.tensor([encoded.input_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_warm_model_knows_what_a_question_allows(warm: Path) -> None:
    assert answer(warm, "what colour is it?") in ("red", "green", "blue")
    assert answer(warm, "is there a red shape?") in ("yes", "no")


def test_warm_model_answers_from_text_in_front_of_the_question(warm: Path) -> None:
    answers = {colour: answer(warm, f"{colour} {colour} {colour}\nwhat colour is it?") for colour in ("red", "blue")}
    assert answers == {"red": "red", "blue": "blue"}


def test_files_are_small_and_computed_in_float32(warm: Path) -> None:
    assert json.loads((warm / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(warm / "model.safetensors").values()} == {torch.bfloat16}


def test_tokenizer_keeps_special_tokens_whole_and_puts_the_first_one_in_front() -> None:
    tokenizer = train_tokenizer(["what colour is the shape?"] * 3, vocabulary=300)
    encoding = tokenizer.encode("what</s><image>")
    assert encoding.tokens[0] == "<s>"
    assert encoding.tokens[-2:] == ["</s>", "<image>"]
    assert stop_token_ids(tokenizer, get_chat_template("vicuna_v1")) == [tokenizer.token_to_id("</s>")]
    assert tokenizer.decode(tokenizer.encode("naïve 图").ids) == "naïve 图"


def test_encoder_learns_to_fill_holes_and_loads_into_its_row(snapshot: Snapshot, tmp_path: Path) -> None:
    short, longer = (
        pretrain_encoder(
            tmp_path / str(epochs),
            snapshot=snapshot,
            seed=1,
            dataset="toy-train",
            plan=MaskedImagePlan(epochs=epochs, batch_size=6),
        )
        for epochs in (1, 12)
    )
    assert longer < 0.8 * short
    encoder = build_encoder("vit-tiny-p16-64")
    load_encoder_weights(encoder, "vit-tiny-p16-64", tmp_path / "12")
    stored = load_file(tmp_path / "12" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in encoder.state_dict().items())


def test_same_seed_gives_the_same_encoder(snapshot: Snapshot, tmp_path: Path) -> None:
    for name in ("a", "b"):
        random.seed(name)
        plan = MaskedImagePlan(epochs=1, batch_size=6)
        pretrain_encoder(tmp_path / name, snapshot=snapshot, seed=4, dataset="toy-train", plan=plan)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
