"""The published recipes against what their papers, scripts and checkpoints say.

Every model is built on the meta device, at its true size. Figures come from ``docs/recipes.md``'s sources.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from manyeyes.cli.main import cli
from manyeyes.data.builders import BUILDERS
from manyeyes.estimate import ParameterCounts
from manyeyes.estimate.dry_run import image_shape
from manyeyes.estimate.memory import find_fits
from manyeyes.estimate.skeleton import count_parameters, estimate
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.model import ManyEyesForConditionalGeneration, build_skeleton
from manyeyes.model.language_model import language_model_config
from manyeyes.recipe import Recipe, StageSpec, list_recipes, load_recipe
from manyeyes.runtime.templates import get_chat_template
from manyeyes.sources import committed_config
from manyeyes.steps.preflight import check_sources, kept_facts
from manyeyes.training.optimizer import learning_rates, split_groups

LLAVA = ["llava-7b-v0", "llava-13b-v0", "llava-13b-v0-scienceqa", "llava-1.5-7b", "llava-1.5-13b", "llava-1.5-7b-lora"]
EAGLE = [f"eagle-{name}" for name in ("x4-7b", "x4-13b", "x5-7b", "x5-13b", "x4-8b-plus", "x4-13b-plus")]
RELEASED = [f"{name}-released" for name in EAGLE]
CAMBRIAN = [f"cambrian-1-{size}" for size in ("8b", "13b", "34b")]
MINI_GEMINI = [f"mini-gemini-{size}" for size in ("2b", "7b", "13b", "8b", "7b-hd", "8x7b", "34b-hd")]
PUBLISHED = [*LLAVA, *EAGLE, *RELEASED, *CAMBRIAN, *MINI_GEMINI]
TWINS = [f"tiny-{name}" for name in ("llava", "eagle-x5", "cambrian", "mini-gemini", "mini-gemini-hd")]


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(name)


@cache
def skeleton(name: str) -> ManyEyesForConditionalGeneration:
    spec = recipe(name).model
    return build_skeleton(spec, text_config=language_model_config(spec.language_model.source, snapshot_path=None))


@cache
def counts(name: str) -> ParameterCounts:
    return count_parameters(skeleton(name))


def stage(name: str, which: str) -> StageSpec:
    spec = getattr(recipe(name).stages, which)
    assert isinstance(spec, StageSpec)
    return spec


def millions(count: int) -> float:
    return round(count / 1e6, 1)


def test_the_list_of_recipes_is_this_one() -> None:
    assert set(PUBLISHED) | set(TWINS) | {"tiny", "smol"} <= set(list_recipes())
    assert len(PUBLISHED) == 28


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_builds_offline_and_every_stage_trains_what_it_names(name: str) -> None:
    found = recipe(name)
    get_chat_template(found.model.chat.template)
    assert set(found.evaluation.benchmarks) <= set(BENCHMARKS)
    assert committed_config(found.model.language_model.source) is not None
    groups = skeleton(name).parameter_groups()
    for which, spec in found.present_stages():
        rates = learning_rates(spec.train, split_groups(groups, spec.train))
        assert set(rates.values()) == set(spec.train.values()), which
        if spec.template is not None:
            get_chat_template(spec.template)
        # A forward pass on each device goes into an optimizer step a whole number of times.
        assert spec.micro_batch_size is not None
        assert spec.batch_size % spec.micro_batch_size == 0
        assert spec.precision == "bf16"
        assert (spec.weight_decay, spec.betas, spec.max_grad_norm) == (0.0, (0.9, 0.999), 1.0)


def test_smol_is_a_published_language_model_that_keeps_its_own_chat_and_adapts_by_few_weights() -> None:
    found = recipe("smol")
    assert counts("smol").language_model == 134_515_008  # as its model card says
    assert image_shape(skeleton("smol")).tokens == 9
    assert found.model.chat.template == "tokenizer"
    for which, spec in found.present_stages():
        assert not any(group.startswith("encoders") for group in spec.train)
        assert spec.keep_features
        assert (spec.lora is not None) == (which == "sft")
        builders = {part.dataset.rpartition("-")[0] for part in spec.mixture}
        assert builders <= {*BUILDERS, "self-chat"}
        assert not {part.dataset for part in spec.mixture} & set(found.data.eval_datasets)


@pytest.mark.parametrize("system", ["llava", "eagle", "cambrian", "mini-gemini"])
def test_a_published_recipe_asks_what_its_paper_reports_in_its_papers_words(system: str) -> None:
    found = [recipe(name).evaluation for name in PUBLISHED if name.startswith(system)]
    reported = {name for name, row in BENCHMARKS.items() if system in row.reported_by}
    assert {evaluation.prompts for evaluation in found} == {system}
    for evaluation in found:
        assert set(evaluation.benchmarks) <= reported
    assert {name for evaluation in found for name in evaluation.benchmarks} == reported


@pytest.mark.parametrize("name", [*PUBLISHED, *TWINS])
def test_a_recipe_says_where_its_values_come_from(name: str) -> None:
    text = resources.files("manyeyes").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    parent = next((line.removeprefix("extends: ") for line in text.splitlines() if line.startswith("extends: ")), None)
    assert text.startswith("# ")
    assert "arXiv:" in text or (parent is not None and (parent == "tiny" or f"{parent}, whose head names" in text))
    assert f"\nname: {name}\n" in text


@pytest.mark.parametrize(
    ("name", "tokens", "channels"),
    [
        ("llava-7b-v0", 256, 1024),
        ("llava-1.5-7b", 576, 1024),
        ("eagle-x4-7b", 1024, 6656),
        ("eagle-x4-13b-released", 1024, 6656),
        ("eagle-x5-7b-released", 1024, 7680),
        ("eagle-x5-13b", 1024, 7680),
        # 24 rows of 24 and a newline each; papers count 576.
        ("cambrian-1-8b", 600, 1024),
        ("mini-gemini-7b", 576, 1024),
        ("mini-gemini-34b-hd", 2880, 1024),
    ],
)
def test_visual_tokens_and_channels_are_the_published_ones(name: str, tokens: int, channels: int) -> None:
    assert (image_shape(skeleton(name)).tokens, skeleton(name).fusion.channels) == (tokens, channels)


@pytest.mark.parametrize(
    ("name", "billions"), [("eagle-x4-13b", 15.04), ("eagle-x4-13b-plus", 15.04), ("eagle-x5-13b", 15.37)]
)
def test_eagles_sizes_are_those_of_the_published_checkpoints(name: str, billions: float) -> None:
    # Published files also hold what is never computed: ConvNeXt's head and CLIP's last norm, 3 M and less.
    assert counts(name).total / 1e9 == pytest.approx(billions, abs=0.015)


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("llava-1.5-7b", 21.0),
        ("llava-1.5-13b", 31.5),
        ("eagle-x4-7b", 44.0),
        ("eagle-x4-13b", 60.3),
        ("eagle-x5-7b", 48.2),
        ("eagle-x5-13b", 65.5),
        ("cambrian-1-34b", 58.7),
        ("mini-gemini-2b", 6.3),
    ],
)
def test_projectors_have_the_published_sizes(name: str, projector: float) -> None:
    assert millions(counts(name).projector) == projector


@pytest.mark.parametrize(
    ("name", "reinjection", "layers"),
    [
        ("cambrian-1-8b", 220.6, range(0, 28, 3)),
        ("cambrian-1-13b", 241.5, range(0, 37, 4)),
        ("cambrian-1-34b", 255.1, range(0, 57, 7)),
    ],
)
def test_cambrians_parts_have_the_published_sizes_and_places(name: str, reinjection: float, layers: range) -> None:
    model = skeleton(name)
    projections = sum(parameter.numel() for parameter in model.get_submodule("fusion.projections").parameters())
    assert millions(projections) == 13.9
    assert millions(counts(name).fusion - projections) == 47.3
    assert millions(counts(name).reinjection) == reinjection
    assert model.reinjection is not None
    assert model.reinjection.layers == tuple(layers)


def test_mini_geminis_mining_has_the_published_size() -> None:
    assert [round(counts(name).fusion / 1e6, 2) for name in MINI_GEMINI] == [6.96] * len(MINI_GEMINI)


def test_language_models_have_the_known_sizes() -> None:
    known = {"llava-1.5-7b": 6.738, "eagle-x4-13b": 13.016, "cambrian-1-8b": 8.030, "mini-gemini-2b": 2.506}
    known |= {"cambrian-1-34b": 34.389, "mini-gemini-8x7b": 46.703}
    assert {name: round(counts(name).language_model / 1e9, 3) for name in known} == known


def test_eagle_prealigns_the_experts_that_know_no_text_and_its_release_none() -> None:
    assert recipe("eagle-x4-7b").prealigned_encoders() == ["det", "pix2struct"]
    assert recipe("eagle-x5-13b").prealigned_encoders() == ["sam", "det", "pix2struct"]
    for name in EAGLE:
        clip, released = (recipe(which).model.encoders[0].encoder for which in (name, f"{name}-released"))
        assert (clip, released) == ("clip-l14-448-eagle", "clip-l14-336-eagle")
        assert recipe(f"{name}-released").stages.prealign is None
        # Nothing else differs.
        own, other = recipe(name), recipe(f"{name}-released")
        assert own.model.encoders[1:] == other.model.encoders[1:]
        assert (own.stages.pretrain, own.stages.sft) == (other.stages.pretrain, other.stages.sft)


@pytest.mark.parametrize(
    ("name", "which", "expected"),
    [
        # batch size, rates, warm-up, epochs
        ("llava-13b-v0", "pretrain", (128, {"projector": 2e-3}, 0.03, 1)),
        ("llava-13b-v0", "sft", (32, {"projector": 2e-5, "language_model": 2e-5}, 0.03, 3)),
        ("llava-13b-v0-scienceqa", "sft", (128, {"projector": 2e-5, "language_model": 2e-5}, 0.03, 12)),
        ("llava-1.5-13b", "pretrain", (256, {"projector": 1e-3}, 0.03, 1)),
        ("llava-1.5-13b", "sft", (128, {"projector": 2e-5, "language_model": 2e-5}, 0.03, 1)),
        ("llava-1.5-7b-lora", "sft", (128, {"projector": 2e-5, "language_model": 2e-4}, 0.03, 1)),
        ("eagle-x5-13b", "pretrain", (256, {"projector": 1e-3}, 0.03, 1)),
        ("eagle-x5-13b", "sft", (128, {"encoders": 2e-5, "projector": 2e-5, "language_model": 2e-5}, 0.03, 1)),
        (
            "cambrian-1-8b",
            "pretrain",
            (512, {"fusion": 1e-4, "fusion.projections": 1e-3, "projector": 1e-3}, 0.06, 1),
        ),
        ("cambrian-1-13b", "sft", (512, {"fusion": 4e-5, "projector": 4e-5, "language_model": 4e-5}, 0.03, 1)),
        ("cambrian-1-34b", "sft", (1024, {"fusion": 2e-5, "projector": 2e-5, "language_model": 2e-5}, 0.03, 1)),
        ("mini-gemini-8b", "pretrain", (256, {"fusion": 1e-3, "projector": 1e-3}, 0.03, 1)),
        ("mini-gemini-2b", "sft", (128, {"fusion": 2e-5, "projector": 2e-5, "language_model": 2e-5}, 0.03, 1)),
        ("mini-gemini-34b-hd", "sft", (128, {"fusion": 2e-5, "projector": 2e-5, "language_model": 1e-5}, 0.03, 1)),
    ],
)
def test_stages_have_the_published_hyperparameters(
    name: str, which: str, expected: tuple[int, dict[str, float], float, int]
) -> None:
    spec = stage(name, which)
    assert (spec.batch_size, spec.train, spec.schedule.warmup_ratio, spec.epochs) == expected
    assert spec.schedule.kind == "cosine"


def test_a_part_of_the_fusion_has_its_own_rate() -> None:
    train = stage("cambrian-1-8b", "pretrain").train
    groups = split_groups(skeleton("cambrian-1-8b").parameter_groups(), train)
    rates = learning_rates(train, groups)
    own = {name for name, _ in groups["fusion.projections"]}
    others = {name for name, _ in groups["fusion"]}
    assert rates == {"fusion": 1e-4, "fusion.projections": 1e-3, "projector": 1e-3}
    assert own
    assert all(name.startswith("fusion.projections.") for name in own)
    assert {name.split(".")[0] for name in others} == {"fusion", "reinjection"}
    assert not own & others
    assert {name for name, _ in groups["projector"]} >= {"newline"}


def test_the_first_stage_of_llava_eagle_and_mini_gemini_sees_captions_alone_in_square_crops() -> None:
    for name in ("llava-1.5-7b", "eagle-x5-7b-released", "mini-gemini-13b"):
        first, second = stage(name, "pretrain"), stage(name, "sft")
        assert (first.template, first.fit) == ("plain", "crop")
        assert (second.template, second.fit) == (None, None)
    assert stage("mini-gemini-8b", "pretrain").template == "mini_gemini_llama_3"
    assert stage("cambrian-1-8b", "pretrain").template is None
    assert {encoder.fit for encoder in recipe("llava-7b-v0").model.encoders} == {"crop"}


def test_adapters_take_most_of_the_optimizers_memory_off() -> None:
    whole, adapted = (estimate(recipe(name)) for name in ("llava-1.5-7b", "llava-1.5-7b-lora"))
    # 7 linear layers in each of 32 layers, rank 128: (4 * (4096 + 4096) + 3 * (4096 + 11008)) * 128 * 32 parameters.
    adapters = (4 * 8192 + 3 * 15104) * 128 * 32
    projector = whole.parameters.projector
    assert adapted.memory_parts_gb["sft"].optimizer == pytest.approx(8 * (adapters + projector) / 1e9)
    assert whole.memory_parts_gb["sft"].optimizer == pytest.approx(8 * (6_738_415_616 + projector) / 1e9)
    assert adapted.parameters == whole.parameters


def test_experts_of_a_mixture_count_once_for_each_token_that_goes_to_them() -> None:
    found = estimate(recipe("mini-gemini-8x7b"))
    tokens = found.visual_tokens + found.text_tokens
    active = 12.88e9  # Mixtral's active parameters a token, arXiv:2401.04088
    # Frozen language model: forward, and backward for the tokens' gradients alone; encoders on top.
    assert found.flops_per_sample["pretrain"] == pytest.approx(4 * active * tokens, rel=0.1)


def test_show_prints_the_estimate_of_a_published_recipe_as_json() -> None:
    result = CliRunner().invoke(cli, ["recipe", "show", "mini-gemini-2b", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["visual_tokens"], shown["channels"]) == (576, 1024)
    assert set(shown["parameters"]) >= {"encoders", "fusion", "projector", "language_model", "reinjection"}
    assert set(shown["memory_gb"]) == set(shown["flops_per_sample"]) == {"pretrain", "sft"}


def test_a_hub_out_of_reach_is_a_problem_of_each_part_and_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_args: object, **_kwargs: object) -> None:
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", no_network)
    rows = check_sources(recipe("mini-gemini-2b"), None)
    assert [row.subject for row in rows] == ["encoder clip", "encoder convnext", "language model"]
    assert {row.state for row in rows} == {"problem"}
    assert all("HF_HUB_OFFLINE=1" in row.do for row in rows)


def test_twins_have_the_structure_of_their_originals() -> None:
    originals = ["llava-1.5-7b", "eagle-x5-7b", "cambrian-1-8b", "mini-gemini-7b", "mini-gemini-7b-hd"]
    for twin, original in zip(TWINS, originals, strict=True):
        own, other = recipe(twin).model, recipe(original).model
        assert [encoder.name for encoder in own.encoders] == [encoder.name for encoder in other.encoders]
        assert (own.preprocess, own.fusion.strategy, own.projector) == (
            other.preprocess,
            other.fusion.strategy,
            other.projector,
        )
        assert own.layout == other.layout
        assert (own.reinjection is None) == (other.reinjection is None)
        assert recipe(twin).prealigned_encoders() == recipe(original).prealigned_encoders()
        assert recipe(twin).stages.pretrain is not None
        assert recipe(twin).stages.sft is not None


@pytest.mark.parametrize("name", ["mini-gemini-7b-hd", "mini-gemini-34b-hd", "tiny-mini-gemini-hd"])
def test_high_resolution_is_for_sft_alone(name: str) -> None:
    """Mini-Gemini-HD starts from the projector of the normal resolution's first stage."""
    normal = recipe(name.removesuffix("-hd").replace("34b", "7b"))
    hd = recipe(name)
    first, last = hd.stage_model("pretrain"), hd.stage_model("sft")
    other = {"language_model": last.language_model, "chat": last.chat}
    assert first.model_copy(update=other) == normal.model.model_copy(update=other)
    assert first.language_model.max_length == normal.model.language_model.max_length
    assert last == hd.model


@pytest.mark.parametrize("name", ["llava-1.5-7b-lora", "mini-gemini-2b"])
def test_each_stage_trains_on_one_large_gpu(name: str) -> None:
    given = recipe(name)
    facts = kept_facts(given, None)
    for stage_name, spec in given.present_stages():
        first = find_fits(facts.stages[stage_name], spec)[0]
        assert (first.devices, first.device_gb, first.change) == (1, 80, ""), stage_name
