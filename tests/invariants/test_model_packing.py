"""Questions side by side in one row: each is answered as it would be alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, Gemma2Config, GPT2Config, MistralConfig, PhiConfig, Qwen3Config
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.model import BranchBatch, ManyEyesForConditionalGeneration, branches, build_model
from manyeyes.model.branches import can_pack, plan_packs
from manyeyes.processor import ManyEyesProcessor
from tests.model_toys import ANY_MODEL, toy_config, toy_images, toy_spec, write_language_model

COMMON: dict[str, Any] = {**ANY_MODEL, "initializer_range": 0.3}
GPT2 = GPT2Config(
    vocab_size=300,
    n_embd=32,
    n_layer=2,
    n_head=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
PACKED: dict[str, PreTrainedConfig] = {
    "llama": toy_config(300, initializer_range=0.3, tie_word_embeddings=False),
    "llama, eager": toy_config(300, initializer_range=0.3, attn_implementation="eager"),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "phi": PhiConfig(**{**COMMON, "num_key_value_heads": 4}),
    "gpt2, learned positions": GPT2,
}
NOT_PACKED: dict[str, PreTrainedConfig] = {
    "gemma2, sliding windows": Gemma2Config(**COMMON, head_dim=8, sliding_window=24, attn_implementation="eager"),
    "mistral, sliding windows": MistralConfig(**COMMON, sliding_window=24),
    "bloom, no positions": BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
}
# Images and questions of each group. The second image has many questions of unlike length, more than one row holds.
GROUPS: list[tuple[int, list[str]]] = [
    (1, ["what colour?", "is there a red circle to the left of the blue square, or is there none?"]),
    (1, [f"is shape {number} red{' or blue, or green' * (number % 4)}?" for number in range(14)]),
    (2, ["no?"]),
    (0, ["what is red?", "why?", "what colour is yellow?"]),
]
Parts = tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]


def _build(folder: Path, config: PreTrainedConfig) -> Parts:
    model, processor = build_model(toy_spec(write_language_model(folder, config)), snapshot_path=None, seed=1)
    return model.eval(), processor


def _prefill(parts: Parts, groups: list[tuple[int, list[str]]]) -> BranchBatch:
    model, processor = parts
    encoded = [processor.encode_group([(each, None) for each in asked], num_images=count) for count, asked in groups]
    batch = processor.pad_groups(encoded)
    images = toy_images(sum(count for count, _ in groups))
    visual_tokens = model.encode_images(processor.pixel_values(images)) if images else None
    cache = model.prefill_prefix(
        batch["prefix_ids"], batch["prefix_mask"], visual_tokens=visual_tokens, image_spans=batch["image_spans"]
    )
    return BranchBatch(cache, batch["prefix_mask"], batch["rows"], batch["input_ids"], batch["attention_mask"])


def _generate(parts: Parts, groups: list[tuple[int, list[str]]], stops: list[int]) -> list[list[int]]:
    model, processor = parts
    pictures, answers = iter(toy_images(sum(count for count, _ in groups))), []
    for count, asked in groups:
        own = [next(pictures) for _ in range(count)]
        for question in asked:
            inputs = processor(
                images=[own] if own else None, conversations=[[("human", "<image>\n" * count + question)]]
            )
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=stops)
            new = ids[0, inputs["input_ids"].shape[1] :].tolist()
            answers.append(new[: next((place for place, token in enumerate(new) if token in stops), len(new))])
    return answers


@torch.no_grad()
@pytest.mark.parametrize("family", PACKED)
def test_packed_answers_are_those_of_generate_one_by_one(family: str, tmp_path: Path) -> None:
    parts = _build(tmp_path, PACKED[family])
    model, processor = parts
    asked = _prefill(parts, GROUPS)
    assert can_pack(model.language_model, asked.prefix_cache)
    plan = plan_packs(
        asked.rows.tolist(), asked.attention_mask.sum(1).tolist(), room=asked.prefix_mask.shape[1], spare=6
    )
    assert any(len(pack.branches) > 1 for packs in plan for pack in packs), "nothing is packed"
    # A stop token that random weights do write, so that answers differ in length.
    first = model.forward_branches(asked).logits
    assert first is not None
    stops = [int(first[3].argmax()), *processor.stop_token_ids]
    found = model.decode_branches(asked, max_new_tokens=6, stop_token_ids=stops)
    assert found.token_ids == _generate(parts, GROUPS, stops)
    assert len({len(ids) for ids in found.token_ids}) > 1
    torch.testing.assert_close(found.first_logits, first, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", NOT_PACKED)
def test_family_that_makes_its_own_mask_is_asked_in_rows_of_its_own(family: str, tmp_path: Path) -> None:
    parts = _build(tmp_path, NOT_PACKED[family])
    asked = _prefill(parts, GROUPS[:2])
    assert not can_pack(parts[0].language_model, asked.prefix_cache)


@torch.no_grad()
def test_neighbours_in_a_row_are_not_seen(tmp_path: Path) -> None:
    parts = _build(tmp_path, PACKED["llama"])
    stops = parts[1].stop_token_ids
    asked = ["what colour?", "is it red?", "is it blue?"]
    first = parts[0].decode_branches(_prefill(parts, [(1, asked)]), max_new_tokens=4, stop_token_ids=stops)
    changed = [asked[0], "no red circle?", asked[2]]
    second = parts[0].decode_branches(_prefill(parts, [(1, changed)]), max_new_tokens=4, stop_token_ids=stops)
    for branch in (0, 2):
        torch.testing.assert_close(second.first_logits[branch], first.first_logits[branch], rtol=1e-5, atol=1e-5)
        assert second.token_ids[branch] == first.token_ids[branch]
    assert not torch.allclose(second.first_logits[1], first.first_logits[1], atol=1e-2)


@torch.no_grad()
def test_cache_that_is_shared_stays_as_it_is(tmp_path: Path) -> None:
    parts = _build(tmp_path, PACKED["llama"])
    asked = _prefill(parts, GROUPS)
    before = [layer.keys.clone() for layer in asked.prefix_cache.layers]
    once, again = (parts[0].decode_branches(asked, max_new_tokens=3, stop_token_ids=[2]).token_ids for _ in range(2))
    assert once == again
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(asked.prefix_cache.layers, before, strict=True))


@torch.no_grad()
def test_packed_and_unpacked_agree_without_any_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _build(tmp_path, PACKED["llama"])
    whole = _prefill(parts, [(0, ["what colour?", "is it a red circle?", "no?"])])
    no_ids, no_mask = whole.input_ids[:1, :0], whole.attention_mask[:1, :0]
    nothing = parts[0].prefill_prefix(no_ids, no_mask, visual_tokens=None, image_spans=None)
    asked = replace(whole, prefix_cache=nothing, prefix_mask=no_mask)
    packed = parts[0].decode_branches(asked, max_new_tokens=5, stop_token_ids=[2]).token_ids
    monkeypatch.setattr(branches, "can_pack", lambda *_: False)
    assert packed == parts[0].decode_branches(asked, max_new_tokens=5, stop_token_ids=[2]).token_ids


def test_plan_fills_rows_evenly_and_keeps_narrow_ones_apart() -> None:
    # Seven branches of 5 + 3 tokens on the first prefix and room for 20: 56 tokens are three packs of about 19.
    plan = plan_packs([0] * 7 + [1], [5] * 7 + [4], room=20, spare=3)
    packs = [(pack.row, pack.branches, pack.width) for together in plan for pack in together]
    assert packs == [(0, (0, 1, 2), 15), (0, (3, 4), 10), (0, (5, 6), 10), (1, (7,), 4)]
    # 10 of 15 tokens are two thirds; 4 are less.
    assert [len(together) for together in plan] == [3, 1]


def test_branch_longer_than_the_room_stands_alone() -> None:
    plan = plan_packs([0, 0, 0], [50, 60, 70], room=10, spare=8)
    assert [[pack.branches for pack in together] for together in plan] == [[(2,), (1,), (0,)]]
