"""Which chat template a published checkpoint gets: what its tokenizer holds tells what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyeyes.checkpoints import cambrian, eagle, mini_gemini
from manyeyes.checkpoints.source import OriginalCheckpoint

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
