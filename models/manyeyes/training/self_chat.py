"""Conversations that a language model writes itself, so that it keeps its language while it learns to see.

A chat model that is given the start of a user's turn writes a question; given that question, it answers. Training on
these beside questions about images holds it where it was. Answers are drawn from its own distribution, at a temperature
of one: where it stands, their expected gradient is zero, while greedy answers would sharpen it. A long answer ends
behind its last whole sentence.

Source: Magpie, arXiv:2406.08464.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import Record, Turn, check_record
from manyeyes.data.shards import ShardWriter
from manyeyes.errors import RecordError, SourceError
from manyeyes.model.language_model import load_language_model
from manyeyes.storage import cache_dir, content_digest, file_lock, new_folder, storage_errors
from manyeyes.tokenizer_files import load_tokenizer

BATCH = 32
_MARK = "\x00"
_MAX_EMPTY_BATCHES = 5


def write_self_chat(
    out: Path,
    *,
    language_model: Path,
    licence: str,
    count: int,
    seed: int = 1,
    question_tokens: int = 48,
    answer_tokens: int = 96,
    on_progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write ``self-chat-train`` into a snapshot folder: one question and its answer a record, no images.

    A question that does not end within its tokens is left out, and so are answers without a whole sentence in theirs,
    and questions that came before.
    Batches are kept in the cache as they come; a second call goes on behind the last one.

    Args:
        out: The snapshot's folder; made when missing. ``out/self-chat`` is replaced, the rest stays.
        language_model: A Hugging Face folder with a chat template.
        licence: SPDX name of the language model's licence.
        count: Records.
        seed: Of the questions.
        question_tokens: Most tokens of a question.
        answer_tokens: Most tokens of an answer.
        on_progress: Called with the number of records that are there.

    Returns:
        How many pairs were left out.

    Raises:
        SourceError: No chat template, or a model that ends hardly any of its turns.
        StorageError: No space or no permission.
    """
    model, tokenizer = load_language_model(language_model, pretrained=True), load_tokenizer(language_model)
    facts = [content_digest(language_model), seed, question_tokens, answer_tokens, BATCH]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    records: dict[str, Record] = {}
    left_out = 0
    with file_lock(cache_dir() / "self_chat" / f"{name}.lock"):
        kept = cache_dir() / "self_chat" / f"{name}.jsonl"
        limits = {"question_tokens": question_tokens, "answer_tokens": answer_tokens}
        batches = _batches(model, tokenizer, kept, seed=seed, **limits)
        empty = 0
        while len(records) < count:
            before = len(records)
            for question, answer in next(batches):
                record = _as_record(question, answer, number=len(records))
                if record is None or question in records:
                    left_out += 1
                else:
                    records[question] = record
            empty = 0 if len(records) > before else empty + 1
            if empty == _MAX_EMPTY_BATCHES:
                raise SourceError(
                    f"{language_model} ended none of its last {empty * BATCH} turns",
                    "a model that was trained to chat by its own template",
                    "Name an instruct model, or allow longer turns.",
                )
            on_progress(min(len(records), count))
    with new_folder(out / "self-chat") as folder, ShardWriter(folder, "train") as writer:
        for record in list(records.values())[:count]:
            writer.write(record)
    how = f"questions and answers by {language_model.name} itself (Magpie, arXiv:2406.08464), seed {seed}"
    write_snapshot_manifest(out, provenance={"self-chat-train": Provenance(licence, how)})
    return left_out


def _as_record(question: str, answer: str, *, number: int) -> Record | None:
    """None for a text that is missing, or that means something else to a record, such as ``<image>``."""
    turns = (Turn("human", question), Turn("gpt", answer))
    record = Record(id=f"self-chat/{number}", source="self-chat", images=(), turns=turns)
    try:
        check_record(record)
    except RecordError:
        return None
    return record


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kept: Path,
    *,
    seed: int,
    question_tokens: int,
    answer_tokens: int,
) -> Iterator[list[tuple[str, str]]]:
    """Batches of question and answer, first those that are kept; a text that did not end is empty."""
    start, behind = _around_question(tokenizer)
    with storage_errors(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        lines = kept.read_text(encoding="utf-8").splitlines(keepends=True) if kept.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    for line in whole:
        yield [(question, answer) for question, answer in json.loads(line)]
    number = len(whole)
    with storage_errors(kept), kept.open("w", encoding="utf-8") as file:  # without a last line that was cut short
        file.writelines(whole)
        while True:
            torch.manual_seed(seed * 1_000_003 + number)
            said = _write(model, tokenizer, [start] * BATCH, max_new_tokens=question_tokens, top_p=0.95)
            questions = [text if ended else "" for text, ended in said]
            asked = [question for question in questions if question]
            prompts = [start + question + behind for question in asked]
            said = _write(model, tokenizer, prompts, max_new_tokens=answer_tokens, top_p=1.0)
            answers = iter([text if ended else _whole_sentences(text) for text, ended in said])
            batch = [(question, next(answers) if question else "") for question in questions]
            file.write(json.dumps(batch) + "\n")
            file.flush()
            number += 1
            yield batch


def _around_question(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts in front of a first question, and between it and the answer."""
    if not tokenizer.chat_template:
        raise SourceError(
            f"{tokenizer.name_or_path} has no chat template",
            "a model that was trained to chat",
            "Name an instruct model.",
        )
    text = str(
        tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True)
    )
    start, _, behind = text.partition(_MARK)
    return start, behind


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    top_p: float,
) -> list[tuple[str, bool]]:
    """What the model writes behind each prompt, and whether it came to the end of its turn."""
    if not prompts:
        return []
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    rows = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        do_sample=True,
        temperature=1.0,
        top_p=top_p,
        top_k=0,
    )
    written = rows[:, inputs["input_ids"].shape[1] :]
    return [
        (str(tokenizer.decode(row, skip_special_tokens=True)).strip(), tokenizer.eos_token_id in row.tolist())
        for row in written
    ]


def _whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; empty without one. "1." ends none."""
    ends = [found.end() for found in re.finditer(r"(?<!\d)[.!?](?=\s)", text)]
    return text[: ends[-1]] if ends else ""
