"""Variants of a bundle: graphs in fp16, int8 and int4 beside fp32, files shared by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from manyeyes.errors import BundleError
from manyeyes.export.bundle import record_parity
from manyeyes.export.graphs import save_graph
from manyeyes.export.overflow import find_overflow
from manyeyes.export.parity import ParityReport, measure_parity
from manyeyes.export.precision import BLOCK, for_many_tokens, quantize_blocks, quantize_graph
from manyeyes.model import load_checkpoint
from manyeyes.recipe import Recipe, change_recipe
from manyeyes.runtime.bundle import Group, load_bundle
from manyeyes.runtime.bundle_contents import DECODER, PREFILL, needed_files, variant_files
from manyeyes.runtime.sessions import CPU, Graph
from tests.export_toys import Toy, make_groups, make_toy, picture, rewrite_manifest

VARIANTS = {
    "int8": {"vision": "int8", "embed": "int8", "decoder": "int8"},
    "int4": {"vision": "int8", "embed": "int4", "decoder": "int4"},
    "small": {"vision": "int4", "embed": "int4", "decoder": "int4"},
    "half": {"vision": "fp16", "embed": "fp16", "decoder": "fp16"},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Toy:
    recipe = change_recipe(tiny_recipe, {"export.variants": VARIANTS, "gate": [{"rule": "precision", "margin": -2}]})
    folder = tmp_path_factory.mktemp("variants")
    return make_toy(folder, recipe, encoders={"vit": "vit-tiny-p16-64"}, calibration=make_groups())


@pytest.fixture(scope="module")
def report(toy: Toy) -> ParityReport:
    return measure_parity(toy.checkpoint, toy.bundle, make_groups(), items=100, max_new_tokens=4)


def test_each_variant_follows_torch_as_closely_as_its_precision_lets_it(toy: Toy, report: ParityReport) -> None:
    assert report.precision == "fp32"
    assert report.token_match == 1.0
    assert set(report.variants) == set(VARIANTS)
    spread = np.ptp(load_bundle(toy.bundle).answer_groups(make_groups()[:1], first_logits=True)[0][0].first_logits)
    limits = {"half": 0.02, "int8": 0.4, "int4": 0.7, "small": 0.8}
    for name, limit in limits.items():
        figures = report.variants[name]
        # Further from torch than fp32 is, else nothing was rounded.
        assert 10 * report.max_abs_logit < figures.max_abs_logit < limit * spread, name
    assert report.variants["half"].token_match > 0.8
    manifest = record_parity(toy.bundle, report)
    assert manifest.variants["int4"].parity.max_abs_logit == report.variants["int4"].max_abs_logit


def test_equal_graphs_are_one_file(toy: Toy) -> None:
    variants = toy.manifest.variants
    assert variants["int8"].graphs["vision"] == variants["int4"].graphs["vision"]
    graphs = {name for variant in variants.values() for files in variant.graphs.values() for name in files}
    weights = "onnx/decoder_model_merged_q4.onnx_data"
    assert {name for name in toy.manifest.files if ".onnx" in name} == {*graphs, PREFILL}
    assert len(graphs) == 3 + 3 + 3 + len({"embed", "decoder", weights, "vision"})
    assert set(toy.manifest.graphs) == {*graphs, PREFILL} - {weights}
    assert {name for name, variant in variants.items() if PREFILL in variant_files(variant)} == {"int4", "small"}
    # Both decoders read one copy of the weights.
    prefill = onnx.load(toy.bundle / PREFILL, load_external_data=False)
    places = [entry.value for w in prefill.graph.initializer for entry in w.external_data if entry.key == "location"]
    assert set(places) == {Path(weights).name}


def test_one_variant_needs_no_file_of_another(toy: Toy, tmp_path: Path) -> None:
    """Of a folder with the files of one variant alone, that one is loaded."""
    needed = needed_files(toy.manifest.model_dump(), toy.manifest.variants["int4"])
    (tmp_path / "onnx").mkdir()
    for name in [*needed, "manifest.json"]:
        shutil.copy(toy.bundle / name, tmp_path / name)
    pulled = load_bundle(tmp_path)
    assert pulled.variant == "int4"
    whole = load_bundle(toy.bundle, variant="int4").answer_groups(make_groups(), max_new_tokens=4)
    assert pulled.answer_groups(make_groups(), max_new_tokens=4) == whole
    with pytest.raises(BundleError, match=r"decoder_model_merged\.onnx is missing"):
        load_bundle(tmp_path, variant="default")
    with pytest.raises(BundleError, match='variant is "int5"'):
        load_bundle(tmp_path, variant="int5")
    (tmp_path / "onnx/decoder_model_merged_q4.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="decoder_model_merged_q4"):
        load_bundle(tmp_path, variant="int4")


def test_weights_beyond_one_files_limit_lie_in_files_of_their_own(toy: Toy, tmp_path: Path) -> None:
    """The limit is 2 GiB; here 20 kB, and no file but the graph's own is larger."""
    bundle = shutil.copytree(toy.bundle, tmp_path / "bundle")
    save_graph(onnx_ir.load(toy.bundle / DECODER), bundle / DECODER, most_bytes=20_000)
    shards = sorted(file.relative_to(bundle).as_posix() for file in bundle.glob(f"{DECODER}_data*"))
    assert len(shards) > 2
    assert {f"{DECODER}_data", f"{DECODER}_data_1"} < set(shards)
    assert max((bundle / name).stat().st_size for name in shards) <= 2 * 20_000
    manifest = toy.manifest.model_dump(mode="json")
    manifest["files"] |= dict.fromkeys(shards)
    manifest["variants"]["default"]["graphs"]["decoder"] += shards
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rewrite_manifest(bundle)
    answers = (load_bundle(folder).answer_groups(make_groups(), max_new_tokens=4) for folder in (bundle, toy.bundle))
    assert next(answers) == next(answers)
    (bundle / shards[1]).unlink()
    with pytest.raises(BundleError, match=f"{shards[1]} is missing"):
        load_bundle(bundle)
    assert load_bundle(bundle, variant="int8").answer("red?")


def test_given_tokens_run_through_one_graph_and_written_ones_through_the_other(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(toy.bundle, variant="int4", threads=1)
    decoder = bundle.decoder
    assert decoder._prefill is not decoder._decoder
    runs: dict[str, list[int]] = {"prefill": [], "decoder": []}
    for name, graph in (("prefill", decoder._prefill), ("decoder", decoder._decoder)):

        def running(inputs: Any, run: Any = graph.run, tokens: Any = runs[name], **options: Any) -> Any:
            tokens.append(inputs["inputs_embeds"].shape[1])
            return run(inputs, **options)

        monkeypatch.setattr(graph, "run", running)
    groups = make_groups()
    together = bundle.answer_groups(groups, max_new_tokens=6)
    assert len(runs["prefill"]) == 2  # prefixes, questions
    assert set(runs["decoder"]) == {1}
    # A question of one token is given too, and company changes no answer.
    alone = [
        bundle.answer_groups([Group(group.images, (q,))], max_new_tokens=6) for group in groups for q in group.questions
    ]
    assert [answer for row in together for answer in row] == [answer for ((answer,),) in alone]
    runs["decoder"].clear()
    assert bundle.answer_groups([Group((), ("a",))], max_new_tokens=1)
    assert runs["decoder"] == []


def test_the_second_graph_can_be_left_out(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    both, one = (load_bundle(toy.bundle, variant="int4", threads=1, prefill=prefill) for prefill in (True, False))
    assert one.decoder._prefill is one.decoder._decoder
    (((quick,),), ((plain,),)) = (
        bundle.answer_groups([Group((picture(0),), ("red?",))], first_logits=True) for bundle in (both, one)
    )
    assert 0 < np.abs(quick.first_logits - plain.first_logits).max() < 0.1 * np.ptp(plain.first_logits)
    monkeypatch.setenv("MANYEYES_PREFILL", "0")
    assert load_bundle(toy.bundle, variant="int4").decoder._prefill.name == "decoder_model_merged_q4.onnx"
    monkeypatch.setenv("MANYEYES_PREFILL", "no")
    with pytest.raises(BundleError, match=r"MANYEYES_PREFILL is 'no'.*0 or 1 is needed"):
        load_bundle(toy.bundle)


def _write_graph(path: Path, op_type: str, weight: NDArray[np.float32], rank: int) -> Path:
    node = helper.make_node(op_type, ["x", "w"], ["y"])
    shape = ["rows", *(["a", "b", "c"][: rank - 1])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_for_many_tokens_four_bits_are_multiplied_by_inputs_as_they_are(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    weight = drawn.standard_normal((70, 48)).astype(np.float32)
    model = quantize_graph(_write_graph(tmp_path / "whole.onnx", "MatMul", weight, 2), "int4")
    onnx_ir.save(model, tmp_path / "int4.onnx")
    for_many_tokens(model)
    onnx_ir.save(model, tmp_path / "many.onnx")
    packed, scales = quantize_blocks(weight.T)
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(48, -1, BLOCK).astype(np.float32) - 8
    restored = (numbers * scales[..., None]).reshape(48, -1)[:, :70].T
    rows = drawn.standard_normal((9, 70)).astype(np.float32)
    few, many = (
        Graph(tmp_path / f"{name}.onnx", providers=[CPU], threads=1).run({"x": rows}, on_host=["y"])["y"].numpy()
        for name in ("int4", "many")
    )
    np.testing.assert_allclose(many, rows @ restored, rtol=1e-4, atol=1e-4)
    assert 0.001 < np.abs(few - many).max() < 0.02 * np.ptp(many)


@pytest.mark.parametrize(("precision", "least"), [("int8", 3.5), ("int4", 5.5)])
def test_a_convolution_is_stored_in_fewer_bits_and_is_fp32_when_loaded(
    precision: str, least: float, tmp_path: Path
) -> None:
    drawn = np.random.default_rng(1)
    weight = drawn.standard_normal((64, 16, 5, 5)).astype(np.float32)
    whole = _write_graph(tmp_path / "whole.onnx", "Conv", weight, 4)
    onnx_ir.save(quantize_graph(whole, precision), tmp_path / "less.onnx")
    assert whole.stat().st_size > least * (tmp_path / "less.onnx").stat().st_size
    pixels = drawn.standard_normal((2, 16, 9, 9)).astype(np.float32)
    whole_result, less = (
        Graph(path, providers=[CPU], threads=1).run({"x": pixels}, on_host=["y"])["y"].numpy()
        for path in (whole, tmp_path / "less.onnx")
    )
    off = np.abs(less - whole_result).std() / whole_result.std()
    assert 0.001 < off < {"int8": 0.02, "int4": 0.15}[precision]
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(tmp_path / "less.onnx", options, providers=[CPU])
    assert [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node] == ["Conv"]


def test_rounding_to_four_bits_is_off_by_a_step_at_most() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    packed, scales = quantize_blocks(rows)
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(5, 3, 32).astype(np.float32) - 8
    restored = (numbers * scales[..., None]).reshape(5, -1)[:, :70]
    assert np.all(np.abs(restored - rows) <= np.repeat(np.abs(scales), 32, axis=1)[:, :70] * (1 + 1e-6))
    furthest = np.abs(rows[:, :32]).argmax(axis=1)
    np.testing.assert_allclose(restored[range(5), furthest], rows[range(5), furthest], rtol=1e-6)


def test_an_encoder_that_overflows_fp16_is_named(toy: Toy) -> None:
    model, processor = load_checkpoint(toy.checkpoint)
    groups = [Group((picture(0),), ("red?",))]
    model.eval().half()
    find_overflow(model, processor, groups, graphs=["vision", "decoder"])
    layer = dict(model.named_modules())
    name = next(name for name in layer if name.startswith("encoders.vit") and name.endswith("fc1"))
    with torch.no_grad():
        layer[name].weight.copy_(6e4 * layer[name].weight.sign())
    with pytest.raises(BundleError, match=rf"fp16 of the vision graph overflows at {name}"):
        find_overflow(model, processor, groups, graphs=["vision"])
    find_overflow(model, processor, groups, graphs=["decoder"])
    with pytest.raises(BundleError, match="without an image to try it on"):
        find_overflow(model, processor, [], graphs=["vision"])
