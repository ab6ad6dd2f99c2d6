"""Any Hugging Face causal language model: what differs between families must not matter here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.errors import RecipeError
from manyeyes.model import BranchBatch, build_model
from manyeyes.model.language_model import compute_logits, decoder_of
from tests.model_toys import ANY_MODEL, toy_config, toy_images, toy_spec, write_language_model

COMMON: dict[str, Any] = {**ANY_MODEL, "initializer_range": 0.2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama, tied": toy_config(300),
    "llama, untied": toy_config(300, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "phi": PhiConfig(**{**COMMON, "num_key_value_heads": 4}),
    "gemma2, sliding windows and capped logits": Gemma2Config(
        **COMMON, head_dim=8, sliding_window=24, final_logit_softcapping=5.0, attn_implementation="eager"
    ),
    "granite, divided logits": GraniteConfig(**COMMON, logits_scaling=4.0),
    "cohere, multiplied logits": CohereConfig(**COMMON, logit_scale=0.25),
    "gpt2, learned positions": GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_branches_compute_what_whole_conversations_compute(family: str, tmp_path: Path) -> None:
    """Logits of the family's own forward, and the loss of branches, in whatever way the family scales or masks."""
    folder = write_language_model(tmp_path, CONFIGS[family])
    model, processor = build_model(toy_spec(folder), snapshot_path=None, seed=1)
    images = toy_images(1)
    pairs = [("what colour?", "red"), ("is there a red circle to see here?", "no")]
    whole = processor(
        images=images * 2,
        conversations=[[("human", f"<image>\n{question}"), ("gpt", answer)] for question, answer in pairs],
    )
    embeds = model.embed(
        whole["input_ids"],
        visual_tokens=model.encode_images(processor.pixel_values(images * 2)),
        image_spans=whole["image_spans"],
    )
    own = model.language_model(inputs_embeds=embeds, attention_mask=whole["attention_mask"]).logits
    ours = compute_logits(
        model.language_model,
        decoder_of(model.language_model)(
            inputs_embeds=embeds, attention_mask=whole["attention_mask"]
        ).last_hidden_state,
    )
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    counted = whole["labels"][:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(
        own[:, :-1][counted].float(), whole["labels"][:, 1:][counted], reduction="sum"
    )
    torch.testing.assert_close(model(**whole, num_items_in_batch=1).loss, expected, rtol=1e-5, atol=1e-4)
    batch = processor.pad_groups([processor.encode_group(pairs, num_images=1)])
    cache = model.prefill_prefix(
        batch["prefix_ids"],
        batch["prefix_mask"],
        visual_tokens=model.encode_images(processor.pixel_values(images)),
        image_spans=batch["image_spans"],
    )
    output = model.forward_branches(
        BranchBatch(
            cache, batch["prefix_mask"], batch["rows"], batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
    )
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-4)
    assert output.num_supervised == counted.sum()


def test_family_with_another_kind_of_memory_is_refused_by_name(tmp_path: Path) -> None:
    config = FalconH1Config(
        **COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8
    )
    model, processor = build_model(toy_spec(write_language_model(tmp_path, config)), snapshot_path=None, seed=1)
    batch = processor.pad_groups([processor.encode_group([("what?", "red")], num_images=0)] * 2)
    cache = model.prefill_prefix(batch["input_ids"], batch["attention_mask"], visual_tokens=None, image_spans=None)
    with pytest.raises(RecipeError, match="the language model caches"):
        model.forward_branches(
            BranchBatch(cache, batch["attention_mask"], batch["rows"], batch["input_ids"], batch["attention_mask"])
        )
