"""Which chat template a published checkpoint gets: what its tokenizer holds tells what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from manyeyes.converters import cambrian, eagle, mini_gemini
from manyeyes.converters.logits import _encode_prompt
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.processor import ManyEyesProcessor
from manyeyes.runtime.chat import render_turns
from manyeyes.runtime.preprocess import ImageTransform
from tests.unit.test_runtime_templates import MARKS, make_tokenizer

LLAMA_3, CHATML = ["<|start_header_id|>", "<|eot_id|>"], ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("system", "model_type", "tokens", "template"),
    [
        (eagle, None, [], "vicuna_v1"),
        (eagle, None, LLAMA_3, "eagle_llama_3"),
        (eagle, None, CHATML, "chatml_direct"),
        (cambrian, "llama", [], "vicuna_v1"),
        (cambrian, "llama", LLAMA_3, "cambrian_llama_3"),
        (cambrian, "llama", CHATML, "cambrian_chatml"),
        (cambrian, "phi3", [], "phi_3"),
        (mini_gemini, "llama", [], "vicuna_v1"),
        (mini_gemini, "llama", LLAMA_3, "mini_gemini_llama_3"),
        (mini_gemini, "llama", CHATML, "chatml_direct"),
        (mini_gemini, "gemma", [], "mini_gemini_gemma"),
        (mini_gemini, "mixtral", [], "mini_gemini_mistral"),
    ],
)
def test_the_tokenizer_tells_the_template(
    tmp_path: Path, system: Any, model_type: str | None, tokens: list[str], template: str
) -> None:
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8"
    )
    checkpoint = OriginalCheckpoint(tmp_path, {}, {})
    given = () if model_type is None else (model_type,)
    assert system._template(checkpoint, *given) == template


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", ["llama_3", "cambrian_llama_3", "mini_gemini_llama_3", "vicuna_v1"])
def test_a_whole_prompt_begins_its_sequence_once_with_and_without_the_literal(name: str, adds: bool) -> None:
    """The published text holds it or leaves it to the tokenizer, depending on the system and its date."""
    bos = "<s>" if name == "vicuna_v1" else "<|begin_of_text|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(bos if adds else None), pad_token="<unk>", bos_token=bos
    )
    grey = ImageTransform(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).as_dict()
    processor = ManyEyesProcessor(
        tokenizer, {"toy": grey}, template=name, num_image_tokens=4, image_token_id=0, max_length=200
    )
    text = render_turns(processor.conversation_template, [("human", "<image>\nQ")], generation_prompt=True)
    for prompt in (text, text.removeprefix(bos)):
        ids = _encode_prompt(prompt, processor, num_images=1, sizes=[]).input_ids
        assert ids.count(MARKS[bos]) == (0 if name == "vicuna_v1" and not adds else 1)
        assert ids == processor.encode([("human", "<image>\nQ")], num_images=1).input_ids
