"""The language model looks back at the image: the same in training, in generation and in shared prefixes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.export import Dim
from transformers import (
    AutoConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.errors import RecipeError
from manyeyes.fusion.cross_attention import VisualWindows
from manyeyes.model import BranchBatch, ManyEyesConfig, ManyEyesForConditionalGeneration
from manyeyes.model.connection import VisualTokens
from manyeyes.model.reinjection import VisualContext
from manyeyes.recipe import LoraSpec, ReinjectionSpec
from manyeyes.training.adapters import add_adapters, merge_adapters

ROWS, WIDTH, TOKENS = 2, 24, 16
LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ENCODERS = [
    {"name": "a", "encoder": "vit-tiny-p16-64", "image_size": 64, "small": True},
    {"name": "b", "encoder": "efficientnet-lite0", "image_size": 128, "small": True},
]
AGGREGATOR = {
    "strategy": "spatial-vision-aggregator",
    "grid": 4,
    "options": {"channels": 16, "num_heads": 4, "depth": 1},
}


def _model(text_config: PreTrainedConfig | None = None, **changes: Any) -> ManyEyesForConditionalGeneration:
    values: dict[str, Any] = {
        "encoders": ENCODERS,
        "fusion": AGGREGATOR,
        "projector": {"kind": "mlp", "depth": 2},
        "reinjection": {"start": 0, "stride": 2, "count": None},
    }
    torch.manual_seed(1)
    config = ManyEyesConfig(text_config=text_config or LlamaConfig(**LLAMA), **{**values, **changes})
    return ManyEyesForConditionalGeneration(config).eval()


def _batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(3, 64, (ROWS, WIDTH), generator=generator),
        "attention_mask": torch.ones(ROWS, WIDTH, dtype=torch.long),
        "pixel_values": {
            "a": torch.randn(ROWS, 3, 64, 64, generator=generator),
            "b": torch.randn(ROWS, 3, 128, 128, generator=generator),
        },
        "image_spans": torch.tensor([[0, 1, TOKENS, 0], [1, 3, TOKENS, 1]]),
    }


@pytest.fixture(scope="module")
def model() -> ManyEyesForConditionalGeneration:
    return _model()


@torch.no_grad()
def test_blocks_change_visual_tokens_right_after_their_layer_and_nothing_else(
    model: ManyEyesForConditionalGeneration,
) -> None:
    batch, seen = _batch(), []
    # In front of layer 1 stands the output of layer 0, after whose output the first block ran.
    second_layer = model.language_model.model.layers[1]
    handle = second_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(**batch)
    plain = _model(reinjection=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("reinjection")})
    plain.language_model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    plain(**batch)
    handle.remove()
    looked, before = seen
    visual = model.encode_images(batch["pixel_values"])
    assert isinstance(visual, VisualTokens)
    for row, start in ((0, 1), (1, 3)):
        span = slice(start, start + TOKENS)
        windows = visual.windows.select(torch.arange(row * TOKENS, (row + 1) * TOKENS))
        assert model.reinjection is not None
        torch.testing.assert_close(looked[row, span], model.reinjection.samplers[0](before[row, span], windows))
        text = [place for place in range(WIDTH) if not start <= place < start + TOKENS]
        assert torch.equal(looked[row, text], before[row, text])


@torch.no_grad()
def test_generation_sees_what_training_sees(model: ManyEyesForConditionalGeneration) -> None:
    batch = _batch()
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    # The whole answer at once, as in training, must choose the same tokens one place earlier.
    mask = torch.ones(ROWS, WIDTH + 4, dtype=torch.long)
    logits = model(**{**batch, "input_ids": answers, "attention_mask": mask}).logits
    assert torch.equal(logits[:, WIDTH - 1 : -1].argmax(-1), answers[:, WIDTH:])
    visual = model.encode_images(batch["pixel_values"])
    assert isinstance(visual, VisualTokens)
    blind = model(
        input_ids=answers, attention_mask=mask, visual_tokens=visual.tokens, image_spans=batch["image_spans"]
    ).logits
    assert not torch.allclose(blind, logits, atol=1e-3), "without looking back the logits differ"


@torch.no_grad()
def test_beams_look_at_their_own_image(model: ManyEyesForConditionalGeneration) -> None:
    batch = _batch()
    together = model.generate(**batch, max_new_tokens=3, num_beams=3, do_sample=False, eos_token_id=None)
    for row in range(ROWS):
        alone = model.generate(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            pixel_values={name: pixels[row : row + 1] for name, pixels in batch["pixel_values"].items()},
            image_spans=torch.tensor([[0, int(batch["image_spans"][row, 1]), TOKENS, 0]]),
            max_new_tokens=3,
            num_beams=3,
            do_sample=False,
            eos_token_id=None,
        )
        assert torch.equal(together[row], alone[0])


@torch.no_grad()
def test_shared_prefixes_look_back_too(model: ManyEyesForConditionalGeneration) -> None:
    batch = _batch()
    visual = model.encode_images(batch["pixel_values"])
    cut, rows = WIDTH - 3, torch.arange(ROWS)
    prefix_mask = batch["attention_mask"][:, :cut]
    cache = model.prefill_prefix(
        batch["input_ids"][:, :cut], prefix_mask, visual_tokens=visual, image_spans=batch["image_spans"]
    )
    ends = batch["input_ids"][:, cut:]
    branches = model.forward_branches(BranchBatch(cache, prefix_mask, rows, ends, torch.ones_like(ends)))
    torch.testing.assert_close(branches.logits, model(**batch).logits[:, -1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: ManyEyesForConditionalGeneration) -> None:
    batch = _batch()
    padded = {
        **batch,
        "input_ids": torch.cat([torch.zeros(ROWS, 5, dtype=torch.long), batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(ROWS, 5, dtype=torch.long), batch["attention_mask"]], 1),
        "image_spans": batch["image_spans"] + torch.tensor([0, 5, 0, 0]),
    }
    torch.testing.assert_close(model(**padded).logits[:, 5:], model(**batch).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_nothing_is_remembered_between_calls(model: ManyEyesForConditionalGeneration) -> None:
    batch = _batch()
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    before = model(**text).logits
    model(**batch)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(model(**text).logits, before)


@torch.no_grad()
def test_newlines_are_left_as_they_are() -> None:
    model = _model(layout={"newline": True})
    batch = _batch()
    row = [4 * line + cell if cell < 4 else -1 for line in range(3) for cell in range(5)]
    layout = torch.tensor([row, [place + 16 if place >= 0 else -1 for place in row]])
    visual = model.encode_images(batch["pixel_values"], layout=layout)
    assert isinstance(visual, VisualTokens)
    assert model.newline is not None
    assert torch.equal(visual.tokens[:, 4::5], model.newline.expand(2, 3, -1))
    unlaid = model.encode_images(batch["pixel_values"])
    assert isinstance(unlaid, VisualTokens)
    assert torch.equal(visual.tokens[1, 5:9], unlaid.tokens[1, 4:8])
    batch["image_spans"][:, 2] = 15
    seen: list[Tensor] = []
    model.language_model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(**batch, layout=layout)
    model(input_ids=batch["input_ids"], visual_tokens=visual.tokens, image_spans=batch["image_spans"])
    changed = (seen[0] != seen[1]).any(-1)
    expected = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    for image, start in enumerate((1, 3)):
        expected[image, start : start + 15] = layout[image] >= 0
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_images_can_be_picked_before_they_are_placed(model: ManyEyesForConditionalGeneration) -> None:
    batch = _batch()
    pixels = batch.pop("pixel_values")
    visual = model.encode_images(pixels)
    assert isinstance(visual, VisualTokens)
    swapped = visual[torch.tensor([1, 0], device=visual.device)]
    expected = model(**batch, pixel_values={name: values.flip(0) for name, values in pixels.items()}).logits
    torch.testing.assert_close(model(**batch, visual_tokens=swapped).logits, expected)


class _Decoder(torch.nn.Module):
    def __init__(self, model: ManyEyesForConditionalGeneration) -> None:
        super().__init__()
        self.language_model = model.language_model

    def forward(
        self, embeds: Tensor, mask: Tensor, places: Tensor, keys: Tensor, seen: Tensor, overall: Tensor
    ) -> Tensor:
        context = VisualContext(places, VisualWindows(keys, seen, overall))
        return self.language_model(inputs_embeds=embeds, attention_mask=mask, visual_context=context).logits


def test_a_decoder_that_looks_back_exports_and_takes_no_windows_while_it_decodes(
    model: ManyEyesForConditionalGeneration, tmp_path: Path
) -> None:
    generator, decoder = torch.Generator().manual_seed(4), _Decoder(model).eval()

    def inputs(rows: int, width: int, looks: int) -> tuple[Tensor, ...]:
        mask = torch.ones(rows, width, dtype=torch.long)
        mask[0, 0] = 0
        places = torch.randperm(rows * width, generator=generator)[:looks]
        keys, overall = torch.randn(looks, 5, 16, generator=generator), torch.randn(looks, 16, generator=generator)
        seen = torch.ones(looks, 5, dtype=torch.bool)
        seen[:, 3:] = False
        return torch.randn(rows, width, 32, generator=generator), mask, places, keys, seen, overall

    names = ["inputs_embeds", "attention_mask", "places", "keys", "seen", "overall"]
    rows, width, looks = Dim("rows"), Dim("width"), Dim("looks")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name: .* will not be used", category=UserWarning)
        program = torch.onnx.export(
            decoder,
            inputs(2, 6, 3),
            dynamo=True,
            input_names=names,
            dynamic_shapes=({0: rows, 1: width}, {0: rows, 1: width}, *({0: looks},) * 4),
            verbose=False,
        )
    assert program is not None
    program.save(str(tmp_path / "decoder.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    for sample in (inputs(2, 6, 3), inputs(3, 9, 7), inputs(2, 2, 0)):
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, sample, strict=True)})
        with torch.no_grad():
            expected, real = decoder(*sample).numpy(), sample[1].bool().numpy()
        np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


def test_every_block_learns_and_belongs_to_the_fusion_group() -> None:
    model = _model()
    model(**_batch(), labels=_batch()["input_ids"]).loss.backward()
    assert model.reinjection is not None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.reinjection.parameters())
    assert "reinjection.samplers.1.mlp.2.weight" in dict(model.parameter_groups()["fusion"])


def test_blocks_look_as_before_through_adapters_and_after_they_are_merged() -> None:
    model = _model()
    keys = list(model.state_dict())
    before = model(**_batch()).logits
    add_adapters(model, LoraSpec(rank=2, alpha=4), seed=1)
    assert torch.equal(model(**_batch()).logits, before)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    adapted = model(**_batch()).logits
    assert (adapted - before).abs().max() > 1e-2
    merge_adapters(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(**_batch()).logits, adapted, rtol=0, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**_batch(), labels=_batch()["input_ids"]).loss.backward()
        assert model.reinjection is not None
        gradients.append([parameter.grad for parameter in model.reinjection.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_saved_and_copied_models_look_back_alike(model: ManyEyesForConditionalGeneration, tmp_path: Path) -> None:
    batch = _batch()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = ManyEyesForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**batch).logits, expected)
    assert copied.reinjection is not None
    copied.reinjection.samplers[0].mlp[2].weight.zero_()
    assert not torch.equal(copied(**batch).logits, expected), "a copy looks through its own blocks"
    assert torch.equal(model(**batch).logits, expected)


FAMILIES = [
    MistralConfig(**LLAMA),
    Qwen2Config(**LLAMA),
    Gemma2Config(**LLAMA, head_dim=8),
    Phi3Config(**LLAMA),
    GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2),
]


@pytest.mark.parametrize("text_config", FAMILIES, ids=lambda config: config.model_type)
@torch.no_grad()
def test_other_families_look_back_or_are_refused_by_name(text_config: PreTrainedConfig) -> None:
    batch = _batch()
    model = _model(text_config)
    looked = model(**batch).logits
    visual = model.encode_images(batch["pixel_values"])
    assert isinstance(visual, VisualTokens)
    blind = model(**{**batch, "pixel_values": None, "visual_tokens": visual.tokens}).logits
    assert not torch.allclose(looked, blind, atol=1e-4)


def test_a_family_that_drops_keywords_is_refused_by_name() -> None:
    text_config = MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=4)
    with pytest.raises(RecipeError, match=r"model\.reinjection with a Mpt"):
        _model(text_config)(**_batch())


def test_a_decoder_that_drops_the_windows_is_refused_when_it_does(
    model: ManyEyesForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model.language_model.model
    forward = type(decoder).forward

    def without_keywords(self: PreTrainedModel, **kwargs: Any) -> Any:
        return forward(self, **{key: value for key, value in kwargs.items() if key != "visual_context"})

    monkeypatch.setattr(type(decoder), "forward", without_keywords)
    with pytest.raises(RecipeError, match=r"model\.reinjection with a LlamaForCausalLM"):
        model(**_batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": {"strategy": "channel-concat", "grid": 4}}, 'with the fusion "channel-concat"'),
        ({"projector": {"kind": "pixel-unshuffle", "depth": 1}}, "must keep its cell"),
        ({"reinjection": {"start": 0, "stride": 2, "count": 3}}, "where 2 blocks fit"),
        ({"reinjection": {"start": 4, "stride": 1, "count": None}}, "where 0 blocks fit"),
    ],
)
def test_what_cannot_be_combined_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _model(**changes)


def test_configuration_keeps_everything(tmp_path: Path) -> None:
    config = _model().config
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).reinjection == ReinjectionSpec(stride=2)
