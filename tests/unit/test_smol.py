"""What ``bench.smol`` measures, on something small."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.smol import is_sentence, perplexity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, there is a circle.", True),
        ("The shape is red.", True),
        ("No, there is no gray shape.\n", True),
        ("red", False),
        ("Red.", False),
        ("Yes.", False),
        ("the shape is red.", False),
        ("The shape is red", False),
        ("The shape is red. The shape is", False),
    ],
)
def test_a_sentence_has_a_capital_some_words_and_a_full_stop(text: str, expected: bool) -> None:
    assert is_sentence(text) == expected


def test_perplexity_is_the_vocabulary_of_who_knows_nothing_and_one_of_who_knows_all() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=False, **sizes)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    blocks = torch.randint(0, 50, (3, 12))
    assert perplexity(model, blocks) == pytest.approx(50)
    # Without a say of its own the head repeats token 7.
    model.lm_head = torch.nn.Linear(8, 50)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(7), 50) * 40.0)
    assert perplexity(model, torch.full((2, 6), 7)) == pytest.approx(1, abs=1e-4)
