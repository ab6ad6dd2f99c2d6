"""Logits of supervised positions alone, in chunks where they are many: the same loss and gradients in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.chat import IGNORE_INDEX
from manyeyes.model import branches, build_model
from manyeyes.model.branches import summed_loss
from tests.model_toys import toy_config, toy_images, toy_spec, write_language_model

WIDTH, VOCABULARY, CHUNK = 16, 1000, 8
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
# Cohere and Gemma 2 do more to their logits than the head.
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "cohere": CohereConfig(**SIZES, logit_scale=0.5),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, attn_implementation="eager"),
}


def make_head(family: str) -> nn.Module:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(FAMILIES[family])


def make_batch() -> tuple[Tensor, Tensor]:
    """Hidden states and labels of three rows; 45 tokens are supervised."""
    torch.manual_seed(4)
    labels = torch.randint(0, VOCABULARY, (3, 40))
    labels[:, :25] = IGNORE_INDEX
    return torch.randn(3, 40, WIDTH), labels


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], list[int], int]:
    """Loss, gradients, numbers in every output of the head, and the bytes that were kept for the backward pass."""
    hidden, labels = make_batch()
    hidden.requires_grad_()
    model.zero_grad()
    heads: list[int] = []
    kept: dict[int, int] = {}
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: heads.append(call[2].numel()))

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, count = summed_loss(model, hidden, labels)
    loss.backward()
    hook.remove()
    assert count == 45
    assert hidden.grad is not None
    head = model.get_output_embeddings().weight
    assert head.grad is not None
    return loss.detach(), {"hidden": hidden.grad, "head": head.grad.clone()}, heads, sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_same_loss_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_head(family)
    loss, gradients, heads, _ = run(model)
    assert heads == [45 * VOCABULARY]
    monkeypatch.setattr(branches, "LOGITS_AT_ONCE", CHUNK * VOCABULARY)
    chunked, in_chunks, heads, _ = run(model)
    # Six chunks in the forward pass, and again in the backward pass.
    assert sorted(heads) == sorted(2 * [*[CHUNK * VOCABULARY] * 5, 5 * VOCABULARY])
    torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(in_chunks[name], gradient, rtol=1e-6, atol=1e-6)


def test_chunks_keep_no_logits_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_head("llama")
    *_, whole = run(model)
    assert whole >= 45 * VOCABULARY * 4
    monkeypatch.setattr(branches, "LOGITS_AT_ONCE", CHUNK * VOCABULARY)
    *_, kept = run(model)
    assert kept < CHUNK * VOCABULARY * 4


def test_up_to_the_bound_nothing_changes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_head("llama")
    loss, gradients, _, _ = run(model)
    monkeypatch.setattr(branches, "LOGITS_AT_ONCE", 45 * VOCABULARY)
    again, same, heads, _ = run(model)
    assert heads == [45 * VOCABULARY]
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())


def test_vocabulary_beyond_the_bound_goes_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_head("llama")
    loss, *_ = run(model)
    monkeypatch.setattr(branches, "LOGITS_AT_ONCE", VOCABULARY - 1)
    one_by_one, _, heads, _ = run(model)
    assert set(heads) == {VOCABULARY}
    torch.testing.assert_close(one_by_one, loss, rtol=1e-6, atol=0)


def test_training_never_sees_the_logits_of_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a batch of whole conversations nor of branches, whatever the bound."""
    source = write_language_model(tmp_path, toy_config(300, tie_word_embeddings=False))
    model, processor = build_model(toy_spec(source), snapshot_path=None, seed=1)
    turns = [[("human", "<image>\nwhat colour is the shape?"), ("gpt", "red red red")]] * 3
    batch = processor(images=[[image] for image in toy_images(3)], conversations=turns)
    heads: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *call: heads.append(call[2].numel()))
    supervised = int((batch["labels"] != IGNORE_INDEX).sum())
    gradients = {}
    for at_once in (2**25, 4 * 300):
        monkeypatch.setattr(branches, "LOGITS_AT_ONCE", at_once)
        heads.clear()
        model.zero_grad()
        model(**batch).loss.backward()
        vocabulary = model.get_output_embeddings().weight.shape[0]
        assert max(heads) == min(supervised, max(1, at_once // vocabulary)) * vocabulary
        gradients[at_once] = {name: each.grad.clone() for name, each in model.named_parameters()}
    for name, gradient in gradients[2**25].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[4 * 300][name], gradient, rtol=1e-6, atol=1e-6 * max(1.0, scale))


def test_chunks_compute_in_the_precision_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed logits are bf16 where the first ones were, though the backward pass runs outside of autocast."""
    model, kinds = make_head("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda *call: kinds.append(call[2].dtype))
    monkeypatch.setattr(branches, "LOGITS_AT_ONCE", CHUNK * VOCABULARY)
    hidden, labels = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, hidden.requires_grad_(), labels)[0]
    loss.backward()
    assert len(kinds) == 12
    assert set(kinds) == {torch.bfloat16}
