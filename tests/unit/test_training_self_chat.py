from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import SourceError
from manyeyes.training import self_chat
from manyeyes.training.self_chat import write_self_chat
from tests.model_toys import write_language_model

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    folder = write_language_model(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_chat, "BATCH", 4)


class Spoken:
    """Stands in for ``generate``: a batch's rows get the given texts, each ended."""

    def __init__(self, tokenizer: Any, batches: list[list[str]]) -> None:
        self.tokenizer, self.batches, self.prompts = tokenizer, batches, []

    def __call__(self, *, input_ids: torch.Tensor, **__: Any) -> torch.Tensor:
        self.prompts.append(self.tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        texts = self.batches.pop(0)
        assert len(texts) == len(input_ids)
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        longest = max(map(len, rows)) + 1
        # A text that ends with "..." was cut: no end of turn in it.
        ends = [0 if text.endswith("...") else self.tokenizer.eos_token_id for text in texts]
        padded = [row + [end] * (longest - len(row)) for row, end in zip(rows, ends, strict=True)]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def test_what_the_model_says_becomes_records_and_a_second_call_goes_on(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    spoken = Spoken(
        tokenizer,
        [
            ["who?", "cut...", "draw <GEN>", "why?"],
            ["me", "that", "no end so far..."],
            ["who?", "how?", "when?", ""],
            ["me", "So. And", "Now. 2. and..."],
        ],
    )
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", spoken)

    def interrupt(done: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    def write(**arguments: Any) -> int:
        out = tmp_path / "data"
        return write_self_chat(out, language_model=chat_model, licence="Apache-2.0", count=3, **arguments)

    with pytest.raises(KeyboardInterrupt):
        write(on_progress=interrupt)
    assert write() == 5  # cut, empty, a request for a picture, an answer without a sentence, and said before
    assert spoken.prompts[0] == ["[user]"] * 4
    assert spoken.prompts[1] == [f"[user]{text}[assistant]" for text in ("who?", "draw <GEN>", "why?")]
    snapshot = open_folder(tmp_path / "data")
    records = list(RecordReader(snapshot.shards("self-chat-train")))
    assert [[turn.text for turn in record.turns] for record in records] == [
        ["who?", "me"],
        ["how?", "So. And"],
        ["when?", "Now."],
    ]
    assert snapshot.dataset("self-chat-train").licence == "Apache-2.0"
    assert not spoken.batches


def test_a_model_that_never_ends_a_turn_is_refused(chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="ended none of its last 20 turns"):
        write_self_chat(
            tmp_path / "data", language_model=chat_model, licence="MIT", count=1, question_tokens=1, answer_tokens=1
        )


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "plain")
    with pytest.raises(SourceError, match="no chat template"):
        write_self_chat(tmp_path / "data", language_model=folder, licence="MIT", count=1)
