"""Keys and values are joined, or written into a buffer: the same answers, and the buffer keeps its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from manyeyes.export.graphs import export_decoder
from manyeyes.export.precision import quantize_graph
from manyeyes.runtime.bundle import Bundle, Group, load_bundle
from manyeyes.runtime.bundle_contents import DECODER
from manyeyes.runtime.decoding import CACHE_PROPERTY, TAKES_BUFFER
from manyeyes.runtime.engine import Chat, Engine
from manyeyes.runtime.sessions import CPU, Graph
from tests.export_toys import Toy, picture

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}
NAMES = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
ROWS, PAST, SLOTS = 3, 7, 13


@pytest.fixture(scope="module", params=["llama", "gemma", "llama fp16", "llama int8"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    family, _, precision = request.param.partition(" ")
    torch.manual_seed(3)
    config, model = FAMILIES[family]
    language_model: PreTrainedModel = model(config(**SIZES)).eval()
    out = tmp_path_factory.mktemp("graphs") / "decoder.onnx"
    export_decoder(language_model.half() if precision == "fp16" else language_model, out, opset=20)
    if precision == "int8":
        onnx_ir.save(quantize_graph(out, "int8"), out.with_name("rounded.onnx"))
        out = out.with_name("rounded.onnx")
    return Graph(out, providers=[CPU], threads=1)


def draw_inputs(query: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.float32]]]:
    """Inputs of a step, the first row with padding, and keys and values of ``PAST`` tokens."""
    drawn = np.random.default_rng(query)
    mask = np.ones((ROWS, PAST + query), np.int64)
    mask[0, :2] = 0
    inputs = {
        "inputs_embeds": drawn.standard_normal((ROWS, query, 32), np.float32),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -query:],
        "num_logits_to_keep": np.array(0),
    }
    return inputs, {f"past_key_values.{name}": drawn.standard_normal((ROWS, 2, PAST, 8), np.float32) for name in NAMES}


@pytest.mark.parametrize("query", [1, 3, SLOTS - PAST])
def test_a_buffer_gives_what_joining_gives_and_is_written_where_it_lies(decoder: Graph, query: int) -> None:
    inputs, past = draw_inputs(query)
    joined = decoder.run(inputs | past, on_host=["logits"])
    room = SLOTS - PAST
    buffers = {name: np.pad(value, ((0, 0), (0, 0), (0, room), (0, 0))) for name, value in past.items()}
    before = {name: buffer.copy() for name, buffer in buffers.items()}
    values = {name: decoder.to_device(buffer) for name, buffer in buffers.items()}
    behind = np.zeros((ROWS, room - query), np.int64)
    longer = {"attention_mask": np.concatenate([inputs["attention_mask"], behind], axis=1)}
    outputs = decoder.run(
        {**inputs, **longer, **values},
        on_host=["logits"],
        into={f"present.{name}": values[f"past_key_values.{name}"] for name in NAMES},
    )
    np.testing.assert_allclose(outputs["logits"].numpy(), joined["logits"].numpy(), rtol=0, atol=2e-6)
    for name in NAMES:
        found, wanted = buffers[f"past_key_values.{name}"], joined[f"present.{name}"].numpy()
        end = PAST + query
        np.testing.assert_allclose(found[:, :, PAST:end], wanted[:, :, PAST:], rtol=0, atol=2e-6)
        for untouched in (slice(PAST), slice(end, None)):
            assert np.array_equal(found[:, :, untouched], before[f"past_key_values.{name}"][:, :, untouched])


class Steps:
    """Runs of a bundle's decoder: slots of the cache, and whether they were written in place."""

    def __init__(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slots: list[int] = []
        self.in_place: list[bool] = []
        graph: Graph = bundle.decoder._decoder
        run = graph.run

        def running(inputs: Mapping[str, Any], *, into: Mapping[str, Any], **options: Any) -> Any:
            self.slots.append(inputs["past_key_values.0.key"].shape()[2])
            self.in_place.append(bool(into))
            return run(inputs, into=into, **options)

        monkeypatch.setattr(graph, "run", running)


@pytest.fixture(scope="module")
def joining(toy_bundle: Toy) -> Bundle:
    """The toy's bundle as one was before its decoder could write into a buffer."""
    bundle = load_bundle(toy_bundle.bundle, threads=1)
    bundle.decoder._takes_buffer = False
    return bundle


def test_every_answer_is_that_of_a_bundle_whose_graph_only_joins(
    loaded_bundle: Bundle, joining: Bundle, toy_bundle: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = {entry.key: entry.value for entry in onnx.load(toy_bundle.bundle / DECODER).metadata_props}
    assert properties == {CACHE_PROPERTY: TAKES_BUFFER}
    groups = [
        Group((), ("what colour is the circle?", "red?")),
        Group((picture(0), picture(1, 90, 50)), ("is it yes or no?", "a b c d e f g h", "é🙂")),
    ]
    steps, joined = Steps(loaded_bundle, monkeypatch), Steps(joining, monkeypatch)
    for tokens in (1, 5, 60):
        found = loaded_bundle.answer_groups(groups, max_new_tokens=tokens)
        wanted = joining.answer_groups(groups, max_new_tokens=tokens)
        assert [[a.token_ids for a in row] for row in found] == [[a.token_ids for a in row] for row in wanted]
    assert max(len(answer.token_ids) for row in found for answer in row) > 20, "no buffer was outgrown"
    assert not any(joined.in_place)
    # One token at a time goes into the buffer; prefixes and questions are joined.
    assert sum(steps.in_place) > 0.8 * len(steps.in_place)
    assert len(set(steps.slots)) < 0.5 * len(set(joined.slots))


def test_the_engine_takes_no_more_slots_than_were_reserved(
    loaded_bundle: Bundle, joining: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [Chat.ask("a b c " * count, max_new_tokens=count * 12) for count in (1, 2, 5)]
    with Engine(joining) as engine:
        alone = [engine.answer(chat) for chat in chats]
    steps = Steps(loaded_bundle, monkeypatch)
    with Engine(loaded_bundle) as engine:
        assert [engine.answer(chat) for chat in chats] == alone
    assert any(steps.in_place)
    assert max(steps.slots) <= max(
        answer.prompt_tokens + 12 * count for answer, count in zip(alone, (1, 2, 5), strict=True)
    )


def test_a_prompt_of_several_pieces_leaves_room_for_its_answer(
    loaded_bundle: Bundle, joining: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [Group((picture(0), picture(1, 90, 50)), ("is it yes or no?", "a b c d e f g h")), Group((), ("é🙂",))]
    for bundle in (loaded_bundle, joining):
        whole = bundle.answer_groups(groups, max_new_tokens=20)
        monkeypatch.setattr(bundle.decoder, "_piece", 3)
        steps = Steps(bundle, monkeypatch)
        assert bundle.answer_groups(groups, max_new_tokens=20) == whole
        # The last piece goes where the answer's tokens go behind it.
        assert sum(steps.in_place) == (20 if bundle is loaded_bundle else 0)


# RMS norms of two layers and the last one, those with a sum in front of them, and rotary embeddings.
FUSED = {
    "gemma": (GemmaConfig, GemmaForCausalLM, {}, (5, 4, 4)),  # norms multiply by the weight and 1
    "phi": (PhiConfig, PhiForCausalLM, {"partial_rotary_factor": 0.5}, (0, 0, 4)),  # rotates half of each head
    "cohere": (CohereConfig, CohereForCausalLM, {}, (3, 0, 0)),  # rotates pairs that lie side by side
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_operators_change_no_result(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    config, model, own, (norms, sums, rotated) = FUSED[family]
    language_model: PreTrainedModel = model(config(**SIZES, **own)).eval()
    export_decoder(language_model, tmp_path / "fused.onnx", opset=20)
    with monkeypatch.context() as patched:
        patched.setattr("manyeyes.export.graphs.fuse", lambda _: None)
        export_decoder(language_model, tmp_path / "plain.onnx", opset=20)
    counts = {
        name: Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node)
        for name in ("fused", "plain")
    }
    assert counts["fused"]["RotaryEmbedding"] == counts["plain"]["Neg"] - counts["fused"]["Neg"] == rotated
    assert counts["fused"]["SkipSimplifiedLayerNormalization"] == sums
    # Nothing is added up in front of the first norm.
    assert counts["fused"]["SimplifiedLayerNormalization"] == norms - sums
    assert counts["plain"]["ReduceMean"] - counts["fused"]["ReduceMean"] == norms
    inputs, past = draw_inputs(3)
    fused, plain = (
        Graph(tmp_path / f"{name}.onnx", providers=[CPU], threads=1).run(inputs | past, on_host=["logits"])
        for name in ("fused", "plain")
    )
    np.testing.assert_allclose(fused["logits"].numpy(), plain["logits"].numpy(), rtol=1e-5, atol=2e-6)
