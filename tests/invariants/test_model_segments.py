"""Samples side by side in one row: each is what it is alone, whatever stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.chat import IGNORE_INDEX
from manyeyes.errors import RecipeError, ShapeError
from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor, build_model, segments
from manyeyes.model.language_model import decoder_of
from manyeyes.model.segments import (
    SegmentGroup,
    Segments,
    attend_by_segment,
    check_packable,
    packed_attention,
    runs_flex,
)
from manyeyes.training.packing import pack_row
from tests.model_toys import toy_config, toy_images, toy_spec, write_language_model

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LONGEST = 256
PACKED: dict[str, PreTrainedConfig] = {
    "llama": toy_config(300, initializer_range=0.3, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "gemma": GemmaConfig(**COMMON, head_dim=8),
    "phi": PhiConfig(**{**COMMON, "num_key_value_heads": 4}),
    "cohere": CohereConfig(**COMMON),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=3),
    "mistral, window as long as samples": MistralConfig(**COMMON, sliding_window=LONGEST),
    "gpt2, learned positions": GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "mistral": (MistralConfig(**COMMON, sliding_window=24), "windows of 24 tokens over samples of up to 256"),
    "gemma2": (Gemma2Config(**COMMON, head_dim=8, sliding_window=LONGEST), "caps attention scores"),
    "bloom": (BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4), "attention is its own"),
    "falcon": (
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        "ALiBi",
    ),
    "mpt": (MptConfig(vocab_size=300, d_model=32, n_heads=4, n_layers=2), "attention is its own"),
    "mamba": (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2), "state from token to token"),
    "lfm2": (Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]), "layers of conv"),
}
QUESTIONS: list[tuple[int, list[tuple[str, str]]]] = [
    (2, [("what colour?", "red"), ("is there a red circle in it, or to the left of it?", "no"), ("a shape?", "yes")]),
    (0, [("is it red?", "yes"), ("what?", "red")]),
    (1, [("what colour is the circle?", "red")]),
    (1, [(f"is shape {number} red{' or blue, or green' * (number % 4)}?", "no") for number in range(8)]),
]
CHAINS = [
    (1, [("human", "<image>\nwhat colour?"), ("gpt", "red"), ("human", "is it a circle?"), ("gpt", "no")]),
    (0, [("human", "is there a shape?"), ("gpt", "yes")]),
    (2, [("human", "<image>\n<image>\nwhich is red, or what colour is it?"), ("gpt", "red red red")]),
]
Parts = tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]


def build(folder: Path, config: PreTrainedConfig | None = None, **changes: Any) -> Parts:
    model, processor = build_model(
        toy_spec(write_language_model(folder, config), **changes), snapshot_path=None, seed=1
    )
    return model.eval(), processor


def separate(parts: Parts) -> list[tuple[list[Any], list[tuple[str, str]]]]:
    """Images and turns of every conversation alone, in the order of the row."""
    pictures = iter(toy_images(sum(count for count, _ in (*QUESTIONS, *CHAINS))))
    alone = []
    for count, pairs in QUESTIONS:
        own = [next(pictures) for _ in range(count)]
        alone += [(own, [("human", "<image>\n" * count + asked), ("gpt", answer)]) for asked, answer in pairs]
    for count, turns in CHAINS:
        alone.append(([next(pictures) for _ in range(count)], turns))
    return alone


def row_of(parts: Parts) -> tuple[dict[str, Tensor], Segments, Any]:
    model, processor = parts
    groups = [processor.encode_group(pairs, num_images=count) for count, pairs in QUESTIONS]
    chains = [processor.encode(turns, num_images=count) for count, turns in CHAINS]
    row, found = pack_row(groups, chains)
    visual = model.encode_images(processor.pixel_values(toy_images(sum(count for count, _ in (*QUESTIONS, *CHAINS)))))
    return row, found, visual


def run_row(parts: Parts, *, labels: bool = True) -> Any:
    row, found, visual = row_of(parts)
    if not labels:
        del row["labels"]
    return parts[0](
        **row, visual_tokens=visual, segments=found, use_cache=False, num_items_in_batch=1 if labels else None
    )


@pytest.mark.parametrize("family", PACKED)
def test_loss_and_gradients_are_those_of_conversations_one_by_one(family: str, tmp_path: Path) -> None:
    parts = build(tmp_path, PACKED[family])
    model, processor = parts
    model.train()
    model.encoders.eval()
    alone, counted = torch.zeros(()), 0
    for images, turns in separate(parts):
        batch = processor(images=[images] if images else None, conversations=[turns])
        output = model(**batch, num_items_in_batch=1)
        output.loss.backward()
        alone, counted = alone + output.loss.detach(), counted + int(output.num_supervised)
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.enable_packing(longest=LONGEST)
    output = run_row(parts)
    output.loss.backward()
    assert int(output.num_supervised) == counted
    torch.testing.assert_close(output.loss.detach(), alone, rtol=1e-5, atol=0)
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@torch.no_grad()
def test_logits_are_those_of_conversations_one_by_one(tmp_path: Path) -> None:
    parts = build(tmp_path)
    model, processor = parts
    expected = []
    for images, turns in separate(parts):
        batch = processor(images=[images] if images else None, conversations=[turns])
        labels = batch.pop("labels")
        expected.append(model(**batch).logits[0, :-1][labels[0, 1:] != IGNORE_INDEX])
    model.enable_packing(longest=LONGEST)
    row, *_ = row_of(parts)
    found = run_row(parts, labels=False).logits[0, :-1][row["labels"][0, 1:] != IGNORE_INDEX]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(5))
def test_what_is_changed_in_one_sample_moves_no_bit_of_another(changed: int, tmp_path: Path) -> None:
    """The text of a branch of the first image, of a text alone, of the last branch, of a chain; or an image."""
    parts = build(tmp_path)
    model, _ = parts
    model.enable_packing(longest=LONGEST)
    row, found, visual = row_of(parts)
    own, continued = found.owners()
    before = model(
        input_ids=row["input_ids"], image_spans=row["image_spans"], visual_tokens=visual, segments=found
    ).logits
    ids = row["input_ids"].clone()
    if changed < 4:
        number = [1, 5, int(own[continued != own].max()), int(own.max())][changed]
        touched = own == number
        text = touched.clone()
        for _, start, length, _ in row["image_spans"].tolist():
            text[start : start + length] = False
        ids[0, text] = (ids[0, text] + 7) % 200 + 10
    else:
        visual = visual.clone()
        visual[3] += 1.0  # the fourth image: of the group of eight questions
        start, length = row["image_spans"][3, 1:3].tolist()
        touched = torch.isin(continued, own[start : start + length])
    after = model(input_ids=ids, image_spans=row["image_spans"], visual_tokens=visual, segments=found).logits
    assert 0 < int(touched.sum()) < len(touched)
    assert torch.equal(after[0, ~touched], before[0, ~touched])
    # All that follows a change moves; only what stands before the image in its own sample does not.
    assert (after[0, touched] != before[0, touched]).any(-1).float().mean() > 0.5


@torch.no_grad()
def test_rows_of_one_sample_each_are_computed_as_before_bit_for_bit(tmp_path: Path) -> None:
    model, processor = build(tmp_path)
    batch = processor(images=[toy_images(1), toy_images(2)], conversations=[CHAINS[0][1], CHAINS[2][1]])
    before = model(**batch).loss
    asked = processor(images=[toy_images(1)], text=["what?"])
    ids = model.generate(**asked, max_new_tokens=4, do_sample=False)
    model.enable_packing(longest=LONGEST)
    assert torch.equal(model(**batch).loss, before)
    assert torch.equal(model.generate(**asked, max_new_tokens=4, do_sample=False), ids)


def test_packing_leaves_the_configuration_as_it_was(tmp_path: Path) -> None:
    model, _ = build(tmp_path)
    before = model.config.to_json_string()
    model.enable_packing(longest=LONGEST)
    assert model.config.to_json_string() == before


@torch.no_grad()
def test_segments_without_packing_or_for_another_row_are_refused(tmp_path: Path) -> None:
    parts = build(tmp_path)
    with pytest.raises(ShapeError, match="enable_packing"):
        run_row(parts)
    parts[0].enable_packing(longest=LONGEST)
    row, _, visual = row_of(parts)
    with pytest.raises(ShapeError, match="one row of 5"):
        parts[0](**row, visual_tokens=visual, segments=Segments((SegmentGroup(5),)))


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_cannot_keep_samples_apart_is_refused(family: str) -> None:
    config, reason = REFUSED[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RecipeError, match=reason):
        check_packable(type(model), config, longest=LONGEST)


@pytest.mark.parametrize("more", [{"s_aux": torch.ones(4)}, {"softcap": 30.0}, {"sliding_window": 4}])
def test_attention_that_does_more_than_a_softmax_is_refused_where_it_runs(more: dict[str, Any]) -> None:
    """What no field of a configuration says, a family still hands to its attention."""
    states = [torch.randn(1, 4, 8, 16) for _ in range(3)]
    with pytest.raises(RecipeError, match=next(iter(more))):
        packed_attention(
            torch.nn.Module(), *states, None, segments=Segments((SegmentGroup(3), SegmentGroup(5))), **more
        )


@torch.no_grad()
def test_layer_that_drops_the_keyword_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build(tmp_path)
    parts[0].enable_packing(longest=LONGEST)
    layer = decoder_of(parts[0].language_model).layers[1]
    forward = layer.forward

    def drop(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "segments": None})

    monkeypatch.setattr(layer, "forward", drop)
    with pytest.raises(RecipeError, match="not all of its layers are told"):
        run_row(parts)


@pytest.mark.parametrize("reinjection", [None, {"stride": 1}])
def test_recomputed_blocks_give_the_same_gradients(reinjection: Any, tmp_path: Path) -> None:
    """Branches share no cache here, so blocks may compute their activations again."""
    aggregator = {
        "strategy": "spatial-vision-aggregator",
        "grid": 4,
        "options": {"channels": 16, "num_heads": 4, "depth": 1},
    }
    parts = build(tmp_path, fusion=aggregator, reinjection=reinjection)
    model, _ = parts
    model.train().encoders.eval()
    model.enable_packing(longest=LONGEST)
    gradients = []
    for again in (False, True):
        if again:
            model.language_model.activation_checkpointing_enable()
        model.zero_grad()
        run_row(parts).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


# --- attention and its mask ----------------------------------------------------------------------------------------

SHAPES = {
    "alone": (SegmentGroup(7),),
    "chains": (SegmentGroup(3), SegmentGroup(1), SegmentGroup(9)),
    "branches": (SegmentGroup(4, (2, 3, 1)), SegmentGroup(2, (5,))),
    "texts alone": (SegmentGroup(0, (3, 2)), SegmentGroup(0, (4,))),
    "all": (SegmentGroup(5, (40, 30, 2)), SegmentGroup(6), SegmentGroup(0, (70, 3)), SegmentGroup(3, (1,))),
}


def dense_mask(groups: tuple[SegmentGroup, ...]) -> Tensor:
    """``[T, T]``, written token by token."""
    tokens = []  # group, branch (-1 for the prefix)
    for number, group in enumerate(groups):
        tokens += [(number, -1)] * group.prefix
        for branch, length in enumerate(group.branches):
            tokens += [(number, branch)] * length
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for query, (group, branch) in enumerate(tokens):
        for key, (other, part) in enumerate(tokens[: query + 1]):
            mask[query, key] = group == other and part in (-1, branch)
    return mask


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_function_lets_each_token_see_its_own_sample(shape: str) -> None:
    found = Segments(SHAPES[shape])
    sees = found.mask_function("cpu")
    places = torch.arange(found.num_tokens)
    nothing = torch.zeros((), dtype=torch.long)
    assert torch.equal(sees(nothing, nothing, places[:, None], places[None, :]), dense_mask(found.groups))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_by_segment_is_attention_with_the_whole_mask(shape: str) -> None:
    found = Segments(SHAPES[shape])
    torch.manual_seed(0)
    states = [torch.randn(1, 4, found.num_tokens, 16, requires_grad=True) for _ in range(3)]
    expected = scaled_dot_product_attention(*states, attn_mask=dense_mask(found.groups)).transpose(1, 2)
    wanted = torch.autograd.grad(expected.square().sum(), states)
    attended = attend_by_segment(*states, found)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(torch.autograd.grad(attended.square().sum(), states), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_attention_with_the_block_mask_is_attention_by_segment(shape: str) -> None:
    """What runs on a GPU, uncompiled on the CPU; heads share keys as in grouped attention."""
    found = Segments(SHAPES[shape])
    torch.manual_seed(0)
    query = torch.randn(1, 4, found.num_tokens, 16)
    key, value = (torch.randn(1, 2, found.num_tokens, 16) for _ in range(2))
    mask = found.block_mask(torch.device("cpu"))
    assert found.block_mask(torch.device("cpu")) is mask
    flex = flex_attention(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)
    by_segment = attend_by_segment(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), found)
    torch.testing.assert_close(flex, by_segment, rtol=1e-5, atol=1e-6)


def test_block_mask_skips_what_nobody_sees() -> None:
    """Four samples of two blocks each: of 8 x 8 blocks only 12 are ever computed."""
    found = Segments((SegmentGroup(256),) * 4)
    mask = create_block_mask(found.mask_function("cpu"), None, None, 1024, 1024, device="cpu")
    assert int(mask.to_dense().sum()) == 12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_gpu_path_gives_the_cpu_logits_through_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build(tmp_path, LlamaConfig(**COMMON, head_dim=16))
    parts[0].enable_packing(longest=LONGEST)
    expected = run_row(parts, labels=False).logits
    calls = []
    monkeypatch.setattr(segments, "runs_flex", lambda *_, **__: True)
    monkeypatch.setattr(
        segments, "_flex", lambda: lambda *args, **kwargs: calls.append(1) or flex_attention(*args, **kwargs)
    )
    torch.testing.assert_close(run_row(parts, labels=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_flex_runs_on_an_ampere_gpu_with_triton_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capability, found = torch.device("cuda", 0), [(8, 0)], [object()]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr(segments, "find_spec", lambda _: found[0])
    assert runs_flex(cuda, width=64, dropout=0.0)
    assert not runs_flex(torch.device("cpu"), width=64, dropout=0.0)
    assert not runs_flex(cuda, width=8, dropout=0.0)
    assert not runs_flex(cuda, width=64, dropout=0.1)
    capability[0] = (7, 5)
    assert not runs_flex(cuda, width=64, dropout=0.0)
    capability[0], found[0] = (9, 0), None
    assert not runs_flex(cuda, width=64, dropout=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: packed attention on one is not compared with the CPU's"
)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_attention_on_a_gpu_is_the_cpus(shape: str) -> None:
    found = Segments(SHAPES[shape])
    torch.manual_seed(0)
    states = [torch.randn(1, heads, found.num_tokens, 64) for heads in (4, 2, 2)]
    layer = torch.nn.Module()
    on_gpu = [each.cuda().requires_grad_() for each in states]
    on_cpu = [each.requires_grad_() for each in states]
    outputs = [packed_attention(layer, *each, None, segments=found)[0] for each in (on_gpu, on_cpu)]
    torch.testing.assert_close(outputs[0].cpu(), outputs[1], rtol=1e-2, atol=1e-2)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=2e-2, atol=2e-2)
