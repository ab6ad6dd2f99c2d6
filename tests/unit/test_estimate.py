"""Estimates against the built model, torch's own counters on real tensors, and formulas by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from manyeyes.cli.recipes import recipe_as_json, recipe_as_text
from manyeyes.errors import RecipeError, SourceError
from manyeyes.estimate import GraphFacts, RecipeEstimate, RecipeFacts, _bundle_bytes, as_rows, dry_run
from manyeyes.estimate.dry_run import count_sample, image_shape
from manyeyes.estimate.memory import LOGITS_AT_ONCE, NF4_BYTES, StageFacts, find_fits, stage_memory, way_of
from manyeyes.estimate.skeleton import count_facts, estimate
from manyeyes.model import ManyEyesForConditionalGeneration, branches, build_model, build_skeleton
from manyeyes.model.language_model import decoder_layers, decoder_of, language_model_config, load_language_model_config
from manyeyes.recipe import PackingSpec, Recipe, StageSpec, load_recipe
from manyeyes.recipe.recipe import ExportSpec, GraphPrecision
from manyeyes.training.optimizer import freeze_others, learning_rates
from tests.model_toys import toy_spec, write_language_model

TEXT, SUPERVISED = 40, 24
TRAINED = {
    "projector alone": {"projector": 1e-3},
    "encoders and projector": {"encoders": 1e-3, "projector": 1e-3},
    "everything": {"encoders": 1e-3, "projector": 1e-3, "language_model": 1e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language-model"))


@pytest.fixture(scope="module")
def real(folder: Path) -> ManyEyesForConditionalGeneration:
    model, _ = build_model(toy_spec(folder), snapshot_path=None, seed=0)
    return model


def real_loss(model: ManyEyesForConditionalGeneration) -> Tensor:
    """One image behind the first token, and the loss of the last tokens, as training computes it."""
    visual = model.num_image_tokens
    pixels = {name: torch.zeros(1, 3, 64, 64) for name in model.encoders}
    labels = torch.full((1, TEXT + visual), -100)
    labels[:, -SUPERVISED:] = 5
    loss = model(
        input_ids=torch.full((1, TEXT + visual), 5),
        pixel_values=pixels,
        image_spans=torch.tensor([[0, 1, visual, 0]]),
        labels=labels,
        use_cache=False,
        num_items_in_batch=1,
    ).loss
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize("trained", TRAINED)
def test_flops_are_those_that_torch_counts_on_real_tensors(
    trained: str, real: ManyEyesForConditionalGeneration, folder: Path
) -> None:
    skeleton = build_skeleton(toy_spec(folder), text_config=load_language_model_config(folder))
    for model in (real, skeleton):
        groups = model.parameter_groups()
        freeze_others(groups, learning_rates(TRAINED[trained], groups))
        model.train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real_loss(real).backward()
    real.zero_grad()
    found = count_sample(
        skeleton, image_shape(skeleton), text_tokens=TEXT, longest_text=TEXT, supervised=SUPERVISED
    ).flops
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)


class PlainCounter(FlopCounterMode):
    """torch's own counter, which works every call out anew."""

    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def flops(self) -> int:
        return int(self.get_total_flops())


@pytest.mark.parametrize("trained", TRAINED)
def test_remembered_calls_cost_what_they_cost_when_worked_out(
    trained: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = build_skeleton(toy_spec(folder), text_config=load_language_model_config(folder))
    groups = skeleton.parameter_groups()
    freeze_others(groups, learning_rates(TRAINED[trained], groups))
    shape = image_shape(skeleton)
    lengths: dict[str, Any] = {"text_tokens": TEXT, "longest_text": 2 * TEXT, "supervised": SUPERVISED}
    monkeypatch.setattr(dry_run, "_CALLS", {})
    first = count_sample(skeleton, shape, **lengths)
    assert dry_run._CALLS
    assert count_sample(skeleton, shape, **lengths) == first
    monkeypatch.setattr(dry_run, "_OperationCounter", PlainCounter)
    assert count_sample(skeleton, shape, **lengths) == first


def test_bytes_kept_for_the_backward_pass_are_those_of_the_real_model(
    real: ManyEyesForConditionalGeneration, folder: Path
) -> None:
    skeleton = build_skeleton(toy_spec(folder), text_config=load_language_model_config(folder))
    for model in (real, skeleton):
        groups = model.parameter_groups()
        freeze_others(groups, learning_rates(TRAINED["everything"], groups))
        model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = real_loss(real)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert loss.requires_grad
    found = count_sample(
        skeleton, image_shape(skeleton), text_tokens=8, longest_text=TEXT, supervised=SUPERVISED
    ).saved_bytes
    assert found == pytest.approx(measured, rel=0.05)


FACTS = StageFacts(
    encoder=None,
    parameters={"encoders": 200_000_000, "fusion": 0, "projector": 20_000_000, "language_model": 1_000_000_000},
    trained={"encoders": 0, "fusion": 0, "projector": 20_000_000, "language_model": 1_000_000_000},
    matrices={"encoders": 190_000_000, "fusion": 0, "projector": 20_000_000, "language_model": 900_000_000},
    frozen_matrices={"encoders": 190_000_000, "fusion": 0, "projector": 0, "language_model": 0},
    layers=10,
    layers_parameters=900_000_000,
    layer_parameters=90_000_000,
    linear_widths=1_000_000,
    linear_parameters=800_000_000,
    vocabulary=32_000,
    image_bytes=10_000_000,
    layers_bytes=400_000_000,
    layer_bytes=40_000_000,
    inputs_bytes=50_000_000,
    attention_bytes=50_000_000,
    other_bytes=5_000_000,
    tokens=2048,
    text_tokens=1472,
    flops=1,
)


def spec_of(**fields: Any) -> StageSpec:
    given = {"train": {"projector": 1e-3, "language_model": 1e-3}, "mixture": [{"dataset": "d"}], "batch_size": 16}
    return StageSpec.model_validate({**given, "precision": "bf16", **fields})


def test_memory_of_one_process_is_the_formula_by_hand() -> None:
    spec = spec_of(precision="fp32", micro_batch_size=8)
    memory = stage_memory(FACTS, spec, way_of(spec, 1))
    assert (memory.weights, memory.gradients, memory.optimizer) == pytest.approx((4.88, 4.08, 8.16))
    assert memory.activations == pytest.approx(8 * 0.415)
    # Half a layer's bytes, logits of a chunk of 2^25 numbers, and the runtime.
    assert memory.working == pytest.approx(8 * 0.02 + 16 * 2**25 / 1e9 + 2)
    half = stage_memory(FACTS, spec_of(micro_batch_size=8), way_of(spec, 1))
    # What autocast copies; what it would round each time of the frozen encoders is in bf16 alone.
    assert half.weights == pytest.approx(4.88 + 2.44 - 4 * 0.19)


def test_memory_of_several_processes_that_hold_the_whole_is_less_by_their_share_of_the_batch_alone() -> None:
    spec = spec_of(micro_batch_size=8, checkpoint_language_model=True, sharding="none")
    memory = stage_memory(FACTS, spec, way_of(spec, 4, 24))
    assert way_of(spec, 4).micro_batch == 4  # 16 records over four processes
    assert (memory.weights, memory.gradients, memory.optimizer) == pytest.approx((6.56, 4.08, 8.16))
    assert memory.activations == pytest.approx(1.25 * 4 * (0.01 + 0.05 + 0.05 + 0.04 + 0.005))


def test_memory_of_processes_that_hold_parts_is_the_formula_by_hand() -> None:
    spec = spec_of(sharding="full")
    memory = stage_memory(FACTS, spec, way_of(spec, 4))
    # The encoders are whole in each, and among what is gathered.
    assert (memory.weights, memory.gradients, memory.optimizer) == pytest.approx((4.08 / 4, 4.08 / 4, 8.16 / 4))
    whole = stage_memory(FACTS, spec_of(sharding="none"), way_of(spec, 4))
    outside, layer = sum(FACTS.parameters.values()) - FACTS.layers_parameters, FACTS.layer_parameters
    trained = sum(FACTS.trained.values()) - FACTS.layers_parameters
    gathered = 2 * (outside + 2 * layer) + (2 + 4) * max(trained, layer)
    assert memory.working - whole.working == pytest.approx(gathered / 1e9)
    assert memory.activations == whole.activations
    # Encoders that train are gathered a block at a time, what they have besides for the whole of a micro-batch.
    seen = {"blocks_parameters": 190_000_000, "block_parameters": 100_000_000}
    eyes = FACTS.model_copy(update={"trained": {**FACTS.trained, "encoders": 200_000_000}, **seen})
    found, outside = stage_memory(eyes, spec, way_of(spec, 4)), outside - 190_000_000
    assert found.working - whole.working == pytest.approx((2 * (outside + 2 * 100e6) + (2 + 4) * 130e6) / 1e9)
    frozen = FACTS.model_copy(update={"trained": {**FACTS.trained, "language_model": 0}})
    assert stage_memory(frozen, spec, way_of(spec, 4)).weights == pytest.approx((4 * 0.02 + 2 * 0.9) / 4)
    # One process holds all there is, whatever the recipe says.
    assert stage_memory(FACTS, spec, way_of(spec, 1)) == stage_memory(FACTS, spec_of(), way_of(spec, 1))


def test_processes_hold_parts_where_the_whole_would_take_more_than_half_of_a_device() -> None:
    spec = spec_of()
    whole = 6.56 + 4.08 + 8.16
    large, small = (stage_memory(FACTS, spec, way_of(spec, 2, size)) for size in (2.01 * whole, 1.99 * whole))
    assert large.optimizer == pytest.approx(8.16)
    assert small.optimizer == pytest.approx(8.16 / 2)


def test_layers_in_4_bits_take_what_bitsandbytes_holds_them_in() -> None:
    held = bitsandbytes.nn.Params4bit(torch.randn(1024, 1024), quant_type="nf4").to("cpu")
    state = held.quant_state
    taken = held.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert taken / 1024**2 == pytest.approx(NF4_BYTES, rel=1e-3)
    adapted = FACTS.model_copy(update={"frozen_matrices": FACTS.matrices})
    plain, held_in_4 = (
        stage_memory(adapted, spec, way_of(spec, 1))
        for spec in (spec_of(lora={"rank": 8, "alpha": 8, "quantize": kind}) for kind in (None, "nf4"))
    )
    # 0.8 B numbers; one layer of 90 M is converted at a time.
    assert plain.weights - held_in_4.weights == pytest.approx(0.8 * (2 - NF4_BYTES))
    assert held_in_4.working - plain.working == pytest.approx(2 * 0.09)
    assert (held_in_4.gradients, held_in_4.activations) == (plain.gradients, plain.activations)


def test_computing_again_is_not_counted_on_where_questions_share_their_prefix() -> None:
    shared = spec_of(mixture=[{"dataset": "d", "turns": "independent"}], checkpoint_language_model=True)
    assert not way_of(shared, 1).recompute
    assert way_of(shared.model_copy(update={"packing": PackingSpec(tokens=4096)}), 1).recompute


def test_packed_rows_take_what_their_tokens_and_images_do() -> None:
    packed = spec_of(packing={"tokens": 4096, "images": 3}, checkpoint_language_model=True)
    memory = stage_memory(FACTS, packed, way_of(packed, 4))
    assert memory.activations == pytest.approx(1.25 * (3 * 0.01 + 2 * (0.05 + 0.05 + 0.04 + 0.005)))


def test_gpus_that_a_stage_fits_on_come_with_the_nearest_change_where_a_node_is_not_enough() -> None:
    large = FACTS.model_copy(
        update={
            "parameters": {**FACTS.parameters, "language_model": 34_000_000_000},
            "trained": {**FACTS.trained, "language_model": 34_000_000_000},
            "layers_parameters": 33_000_000_000,
            "layer_parameters": 550_000_000,
            "linear_parameters": 32_000_000_000,
            "matrices": {**FACTS.matrices, "language_model": 33_500_000_000},
        }
    )
    whole = {"batch_size": 512, "micro_batch_size": 8, "sharding": "none"}
    assert [str(fit) for fit in find_fits([large], spec_of(**whole))] == ["1 x 80 GB (LoRA)", "1 x 48 GB (QLoRA)"]
    parts = [str(fit) for fit in find_fits([large], spec_of(**{**whole, "sharding": "auto"}))]
    assert parts == ["16 x 80 GB", "1 x 80 GB (LoRA)", "2 x 48 GB (LoRA)", "6 x 24 GB (LoRA)"]
    few = {"linear_parameters": 1_000_000_000, "matrices": FACTS.matrices}
    fused = large.model_copy(update=few)  # experts, which have no adapters
    assert [str(fit) for fit in find_fits([fused], spec_of(**whole))] == []
    middle = large.model_copy(
        update={
            "parameters": {**FACTS.parameters, "language_model": 7_000_000_000},
            "trained": {**FACTS.trained, "language_model": 7_000_000_000},
            "linear_parameters": 6_500_000_000,
            "matrices": {**FACTS.matrices, "language_model": 6_700_000_000},
        }
    )
    shown = list(map(str, find_fits([middle], spec_of(**whole))))
    assert shown == ["1 x 80 GB (LoRA)", "1 x 48 GB (LoRA)", "1 x 24 GB (LoRA)"]
    adapted = spec_of(batch_size=512, micro_batch_size=1, lora={"rank": 64, "alpha": 16, "quantize": "nf4"})
    assert all(fit.change == "" for fit in find_fits([middle], adapted))
    assert not any("LoRA" in fit for fit in map(str, find_fits([FACTS], spec_of())))


def test_logits_are_made_in_the_chunks_that_the_estimate_counts() -> None:
    assert LOGITS_AT_ONCE == branches.LOGITS_AT_ONCE


@pytest.mark.parametrize("name", ["llava-1.5-7b", "mini-gemini-8x7b", "cambrian-1-8b"])
def test_two_layers_of_each_kind_tell_what_all_cost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = count_facts(load_recipe(name))

    def whole(stack: torch.nn.ModuleList, run: Any) -> Any:
        cost = run()
        with dry_run._only(stack, range(len(stack) - 1)):
            less = run()
        one = dry_run._Cost(cost.flops - less.flops, cost.saved - less.saved)
        return cost, [one] * len(stack)

    monkeypatch.setattr(dry_run, "_count_layers", whole)
    for stage, (facts,) in count_facts(load_recipe(name)).stages.items():
        counted = found.stages[stage][0]
        assert counted.flops == facts.flops
        assert counted.layers_bytes + counted.other_bytes == facts.layers_bytes + facts.other_bytes
        assert counted.image_bytes == facts.image_bytes


def test_layers_that_are_computed_again_keep_their_inputs(real: ManyEyesForConditionalGeneration, folder: Path) -> None:
    part = {"train": {"projector": 1e-3, "language_model": 1e-3}, "mixture": [{"dataset": "d"}], "batch_size": 1}
    values = {"model": toy_spec(folder).model_dump(), "stages": {"sft": part}}
    (facts,) = count_facts(load_recipe("tiny", overrides=values)).stages["sft"]
    inputs: list[int] = []
    layers = decoder_layers(real.language_model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].numel() * args[0].element_size()))
        for layer in layers
    ]
    width = real.config.text_config.hidden_size
    with torch.no_grad():
        decoder_of(real.language_model)(inputs_embeds=torch.zeros(1, facts.tokens, width), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert facts.inputs_bytes == sum(inputs)


@pytest.fixture(scope="module")
def toy(folder: Path) -> tuple[Recipe, RecipeEstimate]:
    recipe = load_recipe("tiny", overrides={"model": toy_spec(folder).model_dump()})
    return recipe, estimate(recipe)


def test_parameters_are_those_of_the_built_model(
    toy: tuple[Recipe, RecipeEstimate], real: ManyEyesForConditionalGeneration
) -> None:
    _, found = toy
    groups = {name: sum(p.numel() for _, p in members) for name, members in real.parameter_groups().items()}
    assert found.parameters.encoders == {
        "vit": groups["encoders.vit"],
        "efficientnet": groups["encoders.efficientnet"],
    }
    assert found.parameters.encoders == {"vit": 1_092_096, "efficientnet": 700_768}
    assert found.parameters.projector == groups["projector"]
    # Tied weights count once.
    assert found.parameters.language_model == groups["language_model"]
    assert (found.parameters.fusion, found.parameters.reinjection) == (0, 0)
    assert found.parameters.total == sum(groups.values())
    assert (found.visual_tokens, found.channels) == (16, 128 + 112)


def test_stages_need_what_they_train(toy: tuple[Recipe, RecipeEstimate]) -> None:
    recipe, found = toy
    total, projector = found.parameters.total, found.parameters.projector
    assert list(found.memory_gb) == ["prealign", "pretrain", "sft"] == list(found.flops_per_sample)
    assert found.memory_parts_gb["sft"].optimizer == pytest.approx(8 * total / 1e9)
    assert found.memory_parts_gb["pretrain"].optimizer == pytest.approx(8 * projector / 1e9)
    assert found.memory_parts_gb["pretrain"].weights == pytest.approx(4 * total / 1e9)
    assert found.memory_parts_gb["sft"].micro_batch == 16
    assert found.memory_parts_gb["sft"].tokens == recipe.model.language_model.max_length
    assert found.flops_per_sample["sft"] > found.flops_per_sample["pretrain"]
    assert found.disk_gb.running == pytest.approx(36 * total / 1e9, abs=1e-6)
    assert found.disk_gb.bundle >= 4 * total / 1e9 - 1e-6  # a table that is the head too stands in two graphs
    assert found.disk_gb.variants == {}
    shown = dict(as_rows(found))
    assert shown["parameters"] == total
    assert "micro-batch 16 of 256 tokens" in shown["memory of sft, one process"]


def test_each_precision_of_a_graph_takes_disk_once(toy: tuple[Recipe, RecipeEstimate]) -> None:
    recipe, _ = toy
    part = GraphFacts(parameters=1_100_000_000, matrices=1_000_000_000)
    facts = RecipeFacts.model_construct(graphs={"vision": part, "embed": part, "decoder": part})
    int8 = GraphPrecision(vision="int8", embed="int8", decoder="int8")
    int4 = GraphPrecision(vision="int8", embed="int4", decoder="int4")

    def written(**export: Any) -> tuple[float, dict[str, float]]:
        changed = recipe.model_copy(update={"export": ExportSpec(**export)})
        most, variants = _bundle_bytes(changed, facts)
        return most / 1e9, {name: size / 1e9 for name, size in variants.items()}

    most, variants = written(variants={"int8": int8, "int4": int4})
    assert variants == pytest.approx({"default": 13.2, "int8": 4.2, "int4": 1.4 + 2 * 1.025})
    assert most == pytest.approx(13.2 + 4.2 + 2 * 1.025), "int4's vision graph is int8's"
    assert written(precision=int8)[0] == pytest.approx(4.2 + 4.4), "what is rounded lies there in fp32 meanwhile"


def test_micro_batch_and_stages_change_memory_as_they_should(toy: tuple[Recipe, RecipeEstimate]) -> None:
    recipe, found = toy
    sft = recipe.stages.sft
    assert sft is not None
    stages = recipe.stages.model_copy(
        update={"prealign": None, "pretrain": None, "sft": sft.model_copy(update={"micro_batch_size": 4})}
    )
    smaller = estimate(recipe.model_copy(update={"stages": stages}))
    assert list(smaller.memory_gb) == ["sft"]
    assert smaller.memory_parts_gb["sft"].activations == pytest.approx(found.memory_parts_gb["sft"].activations / 4)


def test_llava_7b_costs_what_the_usual_formula_says_and_needs_no_network() -> None:
    part = {"mixture": [{"dataset": "d"}], "batch_size": 128, "micro_batch_size": 1, "precision": "bf16"}
    recipe = load_recipe(
        "tiny",
        overrides={
            "model.encoders": [{"name": "clip", "encoder": "clip-l14-336"}],
            "model.fusion": {"strategy": "channel-concat", "grid": 24},
            "model.language_model": {"source": "hub:lmsys/vicuna-7b-v1.5@main", "max_length": 2048},
            "stages": {"sft": {"train": {"projector": 2e-5, "language_model": 2e-5}, **part}},
        },
    )
    found = estimate(recipe)
    assert found.parameters.language_model == 6_738_415_616  # as published
    assert found.parameters.projector == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert (found.visual_tokens, found.channels) == (576, 1024)
    tokens, clip_tokens = 576 + 128, 577
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    forward = 2 * tokens * blocks + 32 * 4 * tokens**2 * 4096 + 2 * 64 * 4096 * 32000
    projector = 2 * 576 * found.parameters.projector
    # 23 of CLIP's 24 blocks are run, and frozen: forward only. What follows is forward, and twice that backward.
    clip = 23 * (2 * clip_tokens * 12 * 1024**2 + 4 * clip_tokens**2 * 1024)
    by_hand = clip + 3 * (forward + projector)
    assert found.flops_per_sample["sft"] == pytest.approx(by_hand, rel=0.05)


def test_language_model_without_a_committed_configuration_is_refused_without_a_snapshot() -> None:
    with pytest.raises(SourceError, match="no snapshot"):
        language_model_config("snapshot:pretrained/tiny-lm", snapshot_path=None)
    with pytest.raises(SourceError, match=r"a model with a config\.json"):
        language_model_config("scratch:", snapshot_path=None)
    assert language_model_config("scratch:hub:lmsys/vicuna-13b-v1.5@main", snapshot_path=None).hidden_size == 5120


def test_parts_that_do_not_fit_are_refused_without_building_them(folder: Path) -> None:
    spec = toy_spec(folder).model_copy(
        update={"fusion": toy_spec(folder).fusion.model_copy(update={"options": {"averge": True}})}
    )
    recipe = load_recipe("tiny", overrides={"model": spec.model_dump()})
    with pytest.raises(RecipeError, match="averge"):
        estimate(recipe)


def test_recipe_show_prints_what_the_recipe_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("tiny", overrides={"model": toy_spec(folder).model_dump()})
    shown = json.loads(recipe_as_json(recipe))
    assert shown["recipe"]["name"] == "tiny"
    assert set(shown["parameters"]) >= {"encoders", "fusion", "projector", "language_model", "reinjection"}
    assert (shown["visual_tokens"], shown["channels"]) == (16, 240)
    assert set(shown["memory_gb"]) == set(shown["flops_per_sample"]) == {"prealign", "pretrain", "sft"}
    # Outside a checkout the sizes of a language model in a snapshot are not known, and that is said.
    monkeypatch.chdir(folder)
    assert "data.dvc" in json.loads(recipe_as_json(load_recipe("tiny")))["not_estimated"]["found"]
    assert "# what it needs is not known here: " in recipe_as_text(load_recipe("tiny"))
