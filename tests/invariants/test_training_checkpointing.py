"""Computing activations again changes nothing that is learned, and keeps less."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from manyeyes.encoders import Encoder
from manyeyes.model import checkpoint_digest
from manyeyes.model import language_model as language_models
from manyeyes.model.language_model import decoder_of, recompute_layers
from manyeyes.recipe import StageName, change_recipe
from tests.model_toys import write_language_model
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot


def test_checkpointed_encoders_learn_the_same_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_snapshot(tmp_path / "data")
    switched: list[bool] = []
    switch = Encoder.set_checkpointing

    def watched(self: Encoder, on: bool) -> None:
        switched.append(on)
        switch(self, on)

    monkeypatch.setattr(Encoder, "set_checkpointing", watched)
    reports = {}
    for on in (False, True):
        recipe = toy_recipe(checkpoint_encoders=on)
        reports[on] = run_toy_stage(
            "sft",
            recipe=recipe,
            snapshot=tmp_path / "data",
            inputs=tmp_path,
            out=tmp_path / str(on),
            work_dir=tmp_path / f"work-{on}",
            checkpoint=None,
        )
    assert switched == [False, False, True, True]
    assert checkpoint_digest(tmp_path / "True") == checkpoint_digest(tmp_path / "False")
    # A run that ends for lack of memory goes on where it was once the option is set.
    assert reports[True].stage_digest == reports[False].stage_digest


CHAINED, SHARED = [{"dataset": "toy-train"}], [{"dataset": "toy-train", "turns": "independent"}]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"mixture": CHAINED}),
        ("sft", {"mixture": CHAINED}),
        ("sft", {"mixture": SHARED}),
        ("sft", {"mixture": SHARED, "packing": {"tokens": 128}}),
        ("sft", {"mixture": CHAINED, "lora": {"rank": 2, "alpha": 4, "dropout": 0.5}}),
        ("sft", {"mixture": SHARED, "lora": {"rank": 2, "alpha": 4, "quantize": "nf4"}}),
        ("sft", {"mixture": CHAINED, "lora": {"rank": 2, "alpha": 4, "quantize": "nf4"}, "precision": "bf16"}),
    ],
    ids=["frozen", "chained", "shared prefixes", "packed", "adapters", "4 bits", "4 bits in bf16"],
)
def test_a_recomputed_language_model_learns_the_same_bit_for_bit(
    stage: StageName, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_snapshot(tmp_path / "data")
    recomputed: list[bool] = []
    run = language_models._again

    def watched(*args: Any, **kwargs: Any) -> Any:
        recomputed.append(True)
        return run(*args, **kwargs)

    monkeypatch.setattr(language_models, "_again", watched)
    digests = []
    for on in (False, True):
        assert not recomputed
        fields = {"checkpoint_language_model": on, **changes}
        recipe = change_recipe(toy_recipe(), {f"stages.{stage}.{field}": value for field, value in fields.items()})
        given: dict[str, Any] = {"encoder_checkpoints": {}} if stage == "pretrain" else {"checkpoint": None}
        report = run_toy_stage(
            stage,
            recipe=recipe,
            snapshot=tmp_path / "data",
            inputs=tmp_path,
            out=tmp_path / str(on),
            work_dir=tmp_path / f"work-{on}",
            **given,
        )
        digests.append((checkpoint_digest(tmp_path / str(on)), report.stage_digest))
    assert digests[0] == digests[1]
    assert recomputed


def test_prefixes_and_branches_in_bf16_are_computed_again(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    losses = []
    for on in (False, True):
        fields = {"checkpoint_language_model": on, "mixture": SHARED, "precision": "bf16"}
        report = run_toy_stage(
            "sft",
            recipe=change_recipe(toy_recipe(), {f"stages.sft.{field}": value for field, value in fields.items()}),
            snapshot=tmp_path / "data",
            inputs=tmp_path,
            out=tmp_path / str(on),
            work_dir=tmp_path / f"work-{on}",
            checkpoint=None,
        )
        losses.append([point.loss for point in report.history])
    # A gradient's parts from prefixes and from branches are added in fp32 there, in bf16 here.
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "falcon", "bloom", "gemma2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_recomputed_layers_write_to_a_shared_cache_once(frozen: bool, family: str) -> None:
    # transformers' families name sizes each in its own way.
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"n_embd": 32, "n_layer": 2, "n_head": 2, "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 4}
    own: dict[str, Any] = {
        **sizes,
        **(more if family in ("gpt2", "qwen2", "gemma2") else {}),
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **own, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.train(not frozen).requires_grad_(not frozen)
    again = deepcopy(plain)
    recompute_layers(again)
    prefix, branches = (torch.randn(rows, width, 32, requires_grad=True) for rows, width in ((2, 9), (3, 5)))

    def run(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
        decoder, cache = decoder_of(model), DynamicCache(config=config)
        mask = torch.ones(2, 9, dtype=torch.long)
        decoder(inputs_embeds=prefix, attention_mask=mask, past_key_values=cache, use_cache=True)
        rows = torch.tensor([0, 0, 1])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        mask = torch.ones(3, 14, dtype=torch.long)
        hidden = decoder(inputs_embeds=branches, attention_mask=mask, past_key_values=cache, use_cache=True)
        keys = [layer.keys for layer in cache.layers]
        trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        loss = hidden.last_hidden_state.square().sum()
        gradients = torch.autograd.grad(loss, [prefix, branches, *trained], allow_unused=True)
        return keys, [gradient for gradient in gradients if gradient is not None]

    found, expected = run(again), run(plain)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 1
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# torch says that what attention keeps does not pass such hooks yet.
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_recomputed_layer_keeps_its_input_and_its_attention_alone(frozen: bool, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(write_language_model(tmp_path / "lm"), dtype=torch.float32)
    plain.train(not frozen).requires_grad_(not frozen)
    again = deepcopy(plain)
    recompute_layers(again)
    again = deepcopy(again)  # computes with its own layers
    embeddings = torch.randn(2, 24, plain.config.hidden_size, requires_grad=True)

    def kept_and_gradients(model: PreTrainedModel) -> tuple[int, list[Tensor]]:
        own = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        wanted = [embeddings, *(parameter for parameter in model.model.layers.parameters() if not frozen)]
        return sum(kept.values()), list(torch.autograd.grad(hidden.square().sum(), wanted))

    whole, expected = kept_and_gradients(plain)
    less, gradients = kept_and_gradients(again)
    assert less < whole / 2
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients, strict=True))
    assert again.model.layers[0].forward.forward.__self__ is again.model.layers[0]
