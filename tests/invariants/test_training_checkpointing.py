"""Computing activations again changes nothing that is learned, and keeps less."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from manyeyes.encoders import Encoder
from manyeyes.model import checkpoint_digest
from manyeyes.model import language_model as language_models
from manyeyes.model.language_model import recompute_layers
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
    ],
    ids=["frozen", "chained", "shared prefixes", "packed", "adapters"],
)
def test_a_recomputed_language_model_learns_the_same_bit_for_bit(
    stage: StageName, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_snapshot(tmp_path / "data")
    recomputed: list[bool] = []
    run = torch.utils.checkpoint.checkpoint

    def watched(*args: Any, **kwargs: Any) -> Any:
        recomputed.append(True)
        return run(*args, **kwargs)

    monkeypatch.setattr(language_models, "checkpoint", watched)
    shared = changes == {"mixture": SHARED}
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
    assert bool(recomputed) is not shared


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
