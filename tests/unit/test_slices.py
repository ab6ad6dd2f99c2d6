"""Which steps each field of a recipe concerns: a step is given what it reads, so nothing else can run it again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from manyeyes.errors import PipelineError, RecipeError
from manyeyes.harness.inputs import SLICES, Pinned, parse_pinned
from manyeyes.recipe import Recipe, change_recipe, load_recipe
from manyeyes.recipe.gate_rules import GATE_RULES
from manyeyes.recipe.model import STAGE_NAMES, DrawnSource, Strict, model_inside
from manyeyes.recipe.partial import one_encoder
from manyeyes.recipe.recipe import GraphPrecision
from tests.gate_toys import RULES

# Steps with one slice an encoder.
VIT, NET = "prealign_encoder[vit]", "prealign_encoder[efficientnet]"
JOINT = {"pretrain_projector", "sft", "export_onnx"}
TRIAL = {"start_search", "plan_ablation", "compare_trials", "train_trial"}
SCORE = {"evaluate", "gate", "plan_evaluation", "score_benchmark", "merge_scorecards"}
ALL_MODEL = {VIT, NET, *JOINT, *TRIAL}
VALIDATED = {"validate_data"}

# What must be so before a field can be flipped at all.
SHARED = {"model.preprocess": "shared", "model.shared": {}}
GRID = {"model.layout": {"tiling": "grid"}}
ROWS = {"model.layout": {"newline": True}}
LOOK = {"model.reinjection": {"stride": 1, "count": 1}}
JUDGE = {"evaluation.judge": {"endpoint": "https://judge.example/v1", "model": "m"}}
PRICED = {"evaluation.judge": {**JUDGE["evaluation.judge"], "price_in": 1.0, "price_out": 1.0}}
APPROVAL = {"registry.promotion": "approval"}
NOTHING: dict[str, Any] = {}

# Field: what it is flipped to, the steps that it concerns beside register (which keeps the whole recipe), and what
# must be so before.
FIELDS: dict[str, tuple[Any, set[str], dict[str, Any]]] = {
    "name": ("another", SCORE | TRIAL | {"export_onnx"}, NOTHING),
    "description": ("in other words", set(), NOTHING),
    "seed": (99, VALIDATED | ALL_MODEL | {"advance_search"}, NOTHING),
    "model.encoders.0.name": ("eye", VALIDATED | JOINT | TRIAL | {VIT}, NOTHING),
    "model.encoders.0.encoder": ("vit-small-p16-224", VALIDATED | JOINT | TRIAL | {VIT}, NOTHING),
    "model.encoders.0.source": ("scratch:", JOINT | TRIAL | {VIT}, NOTHING),
    "model.encoders.0.image_size": (32, VALIDATED | JOINT | TRIAL | {VIT}, NOTHING),
    "model.encoders.0.fill": ([1, 2, 3], VALIDATED | JOINT | TRIAL | {VIT}, NOTHING),
    "model.encoders.0.fit": ("crop", VALIDATED | JOINT | TRIAL | {VIT}, NOTHING),
    "model.encoders.0.small": (True, VALIDATED | JOINT | TRIAL | {VIT}, {"model.encoders.0.source": "scratch:"}),
    "model.preprocess": ("shared", VALIDATED | ALL_MODEL, NOTHING),
    "model.shared.image_size": (96, VALIDATED | ALL_MODEL, SHARED),
    "model.shared.base": ("efficientnet", VALIDATED | ALL_MODEL, SHARED),
    "model.shared.align_corners": (False, VALIDATED | ALL_MODEL, SHARED),
    "model.shared.antialias": (
        True,
        VALIDATED | ALL_MODEL,
        {"model.preprocess": "shared", "model.shared": {"align_corners": False}},
    ),
    "model.fusion.strategy": ("sequence-append", VALIDATED | JOINT | TRIAL, NOTHING),
    "model.fusion.grid": (8, VALIDATED | ALL_MODEL, NOTHING),
    "model.fusion.options": ({"a": 1}, VALIDATED | JOINT | TRIAL, NOTHING),
    "model.projector.kind": ("linear", VALIDATED | ALL_MODEL, NOTHING),
    "model.projector.depth": (3, VALIDATED | ALL_MODEL, NOTHING),
    "model.projector.options": ({"a": 1}, VALIDATED | ALL_MODEL, NOTHING),
    "model.reinjection.start": (1, VALIDATED | JOINT | TRIAL, LOOK),
    "model.reinjection.stride": (2, VALIDATED | JOINT | TRIAL, LOOK),
    "model.reinjection.count": (2, VALIDATED | JOINT | TRIAL, LOOK),
    "model.layout.tiling": ("grid", VALIDATED | JOINT | TRIAL, {"model.layout": {}}),
    "model.layout.pinpoints": ([[1, 2]], VALIDATED | JOINT | TRIAL, {"model.layout": {}}),
    "model.layout.image_grid": (3, VALIDATED | JOINT | TRIAL, GRID),
    "model.layout.newline": (True, VALIDATED | JOINT | TRIAL, {"model.layout": {}}),
    "model.layout.newline_at": ("end", VALIDATED | JOINT | TRIAL, ROWS),
    "model.layout.unpad": (True, VALIDATED | JOINT | TRIAL, {"model.layout": {}}),
    "model.layout.whole": (["vit"], VALIDATED | JOINT | TRIAL, GRID),
    "model.language_model.source": ("snapshot:pretrained/other", VALIDATED | ALL_MODEL, NOTHING),
    "model.language_model.max_length": (99, VALIDATED | ALL_MODEL, NOTHING),
    "model.chat.template": ("plain", VALIDATED | ALL_MODEL | SCORE, NOTHING),
    "model.chat.system": ("Be brief.", VALIDATED | ALL_MODEL | SCORE, NOTHING),
    "data.suite": ("other", VALIDATED, NOTHING),
    "data.eval_datasets": (["one-more"], VALIDATED, NOTHING),
    "data.contamination.benchmarks": (["one-more"], VALIDATED, NOTHING),
    "data.contamination.leave_out": (False, VALIDATED, NOTHING),
    "evaluation.benchmarks": (["easy-vqa", "gqa"], SCORE - {"score_benchmark"} | TRIAL, NOTHING),
    "evaluation.max_new_tokens": (99, SCORE | TRIAL | {"export_onnx"}, NOTHING),
    "evaluation.batch_size": (99, SCORE | TRIAL, NOTHING),
    "evaluation.max_items": (99, SCORE | TRIAL, NOTHING),
    "evaluation.prompts": ("llava", SCORE | TRIAL | {"export_onnx"}, NOTHING),
    "evaluation.variants": ({"easy-vqa": "x"}, SCORE | TRIAL | {"export_onnx"}, NOTHING),
    "evaluation.multiple_choice": ("prefill", SCORE | TRIAL | {"export_onnx"}, NOTHING),
    "evaluation.conditions": (["grey"], SCORE | TRIAL, NOTHING),
    "evaluation.judge.max_cost": (9.0, SCORE | TRIAL, PRICED),
    **{
        f"evaluation.judge.{name}": (value, SCORE | TRIAL, JUDGE)
        for name, value in {
            **{"endpoint": "https://other.example/v1", "model": "n", "temperature": 1, "key_from": "KEY"},
            **{"attempts": 9, "readings": 9, "concurrency": 9, "max_unjudged": 0.5},
            **{"timeout_s": 9, "requests_per_minute": 9, "price_in": 9, "price_out": 9},
        }.items()
    },
    "export.precision": ({"embed": "int8"}, {"export_onnx"}, NOTHING),
    "export.variants": ({"small": {"embed": "int8"}}, {"export_onnx"}, NOTHING),
    "export.opset": (21, {"export_onnx"}, NOTHING),
    "export.parity_items": (9, {"export_onnx"}, NOTHING),
    "registry.model": ("another", {"plan_evaluation"}, NOTHING),
    "registry.promotion": ("approval", set(), NOTHING),
    "registry.approvals": (2, set(), APPROVAL),
    "registry.four_eyes": (True, set(), APPROVAL),
}

# Field of a stage: what it is flipped to, and whether validation reads it, which refuses what a stage would.
RATES = {"projector": 1e-3, "language_model": 1e-3}
STAGE_FIELDS: dict[str, tuple[Any, bool]] = {
    "train": ({"projector": 0.5}, False),
    "encoders": (["vit"], False),
    "mixture.0.dataset": ("other", True),
    "mixture.0.turns": ("chained", True),
    "mixture.0.order": ("recorded", True),
    "mixture.0.image_dropout": (0.5, True),
    "mixture.0.max_samples": (9, False),
    "mixture.0.questions": ("brief", True),
    "draw.cap": (9, False),
    "draw.ratio": ({"OCR": 9}, False),
    "draw.total": (9, False),
    "draw.sources": ({"a": {"cap": 9}}, False),
    "draw.seed": (9, False),
    "epochs": (3, False),  # the draws of four are tried
    "max_steps": (9, False),
    "max_samples": (9, False),
    "batch_size": (9, False),
    "micro_batch_size": (9, False),
    "packing.tokens": (9, False),
    "packing.images": (9, False),
    "schedule.kind": ("linear", False),
    "schedule.warmup_ratio": (0.5, False),
    "weight_decay": (0.5, False),
    "betas": ([0.5, 0.5], False),
    "max_grad_norm": (9, False),
    "precision": ("bf16", False),
    "checkpoint_encoders": (True, False),
    "checkpoint_language_model": (True, False),
    "sharding": ("full", False),
    "torch_compile": (True, False),
    "keep_features": (True, False),
    "too_long": ("cut", True),
    "template": ("plain", True),
    "fit": ("crop", True),
    "model": ({"language_model.max_length": 99}, True),
    "lora.rank": (9, False),
    "lora.alpha": (9, False),
    "lora.dropout": (0.5, False),
    "lora.quantize": ("nf4", False),
    "checkpoint_every_s": (9, False),
}
OWN = {"prealign": {VIT, NET}, "pretrain": {"pretrain_projector"}, "sft": {"sft"}}
for stage in STAGE_NAMES:
    for name, (flipped, validated) in STAGE_FIELDS.items():
        concerned = OWN[stage] | TRIAL | {"export_onnx"} | (VALIDATED if validated else set())
        before: dict[str, Any] = {}
        if name.startswith("packing"):
            before = {f"stages.{stage}.packing": {"tokens": 5}}
        if name.startswith("draw"):
            before = {f"stages.{stage}.draw": {"cap": 5}}
        if name.startswith("lora"):
            before = {f"stages.{stage}.train": RATES, f"stages.{stage}.lora": {"rank": 2, "alpha": 2}}
        FIELDS[f"stages.{stage}.{name}"] = (flipped, concerned, before)
# Which encoders there will be, the joint stages must know; one that is trained anyway need not.
FIELDS["stages.prealign.encoders"] = (["vit"], VALIDATED | JOINT | TRIAL | {NET}, NOTHING)
# A checkpoint of pretrain is compared with what the recipe says of it.
FIELDS["stages.pretrain.model"][1].add("sft")

TWO = {"evaluation.benchmarks": ["easy-vqa", "gqa"]}
for number, rule in enumerate(RULES):
    for name, value in rule.items():
        if name != "rule":
            changed_value = "gqa" if name == "benchmark" else value / 2 or 9
            FIELDS[f"gate.{number}.{name}"] = (changed_value, {"gate"}, TWO)


def leaves(model: type[Strict], place: str = "") -> Iterator[str]:
    """Dotted path of every field that has no fields, and more than one value; of a list, those of its first entry."""
    for name, field in model.model_fields.items():
        where = f"{place}{name}"
        inner = model_inside(field.annotation)
        if name == "gate":
            for number, rule in enumerate(RULES):
                yield from leaves(GATE_RULES[rule["rule"]], f"gate.{number}.")
        elif inner is not None and issubclass(inner, Strict) and inner not in (GraphPrecision, DrawnSource):
            yield from leaves(inner, f"{where}.0." if str(field.annotation).startswith("tuple") else f"{where}.")
        elif get_origin(field.annotation) is not Literal or len(get_args(field.annotation)) > 1:
            yield where


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return change_recipe(load_recipe("tiny"), {"gate": RULES})


def slices(recipe: Recipe) -> dict[str, str]:
    pinned = Pinned(recipe, data_md5="d" * 32, data_remote="nowhere", code_digest="c" * 64)
    alone = {"vit": VIT, "eye": VIT, "efficientnet": NET}
    return {step: pinned.of(step).text() for step in SLICES if step != "prealign_encoder"} | {
        alone[name]: pinned.of("prealign_encoder", encoder=name).text() for name in recipe.prealigned_encoders()
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {step for step in before | after if before.get(step) != after.get(step)}


def test_every_field_has_its_row() -> None:
    assert set(FIELDS) == set(leaves(Recipe))
    assert {rule["rule"] for rule in RULES} == set(GATE_RULES)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_the_slices_of_the_steps_that_it_concerns_and_no_others(field: str, recipe: Recipe) -> None:
    value, concerned, before = FIELDS[field]
    first = change_recipe(recipe, before)
    assert changed(slices(first), slices(change_recipe(first, {field: value}))) == concerned | {"register"}


def test_a_step_that_reads_beyond_its_slice_is_told_which_field_and_where_to_add_it(recipe: Recipe) -> None:
    given = parse_pinned(slices(recipe)["sft"]).recipe
    assert given.stages.sft == recipe.stages.sft
    with pytest.raises(
        RuntimeError, match=r"^sft reads evaluation, which its slice of the recipe lacks: add it to SLI"
    ):
        assert given.evaluation
    with pytest.raises(RuntimeError, match=r"^sft reads stages\.pretrain\.epochs"):
        assert given.stages.pretrain.epochs  # type: ignore[union-attr]


def test_a_slice_is_read_back_whole_and_holds_no_default(recipe: Recipe) -> None:
    for step, text in slices(recipe).items():
        again = parse_pinned(text)
        assert again.text() == text
        if step != "register":
            assert yaml.safe_load(text)["step"] == step.partition("[")[0]
            assert again.of(step.partition("[")[0], encoder="vit" if step == VIT else "efficientnet") == again, step
    assert "weight_decay" not in slices(recipe)["sft"]
    for wrong in ("gate: [], ", "epochs: 4, epoch: 5, "):
        text = slices(recipe)["sft"]
        assert " recipe: {model: " in text
        with pytest.raises(PipelineError, match="preflight"):
            parse_pinned(text.replace("recipe: {model: ", f"recipe: {{{wrong}model: "))


@pytest.mark.parametrize(
    "words",
    [
        "off",
        "1e5",
        "12345678",
        "~",
        "a: b # c",
        "{x}",
        'it\'s "so"',
        "two\nlines\n\n  and more ",
        "é 図 \u2028 \x07",
        "- x",
    ],
)
def test_any_words_of_a_recipe_are_read_back(recipe: Recipe, words: str) -> None:
    pinned = Pinned(change_recipe(recipe, {"model.chat.system": words}), "0" * 32, words, "1e" + "7" * 62)
    text = pinned.text()
    assert "\n\n" in words or "\n" not in text
    assert parse_pinned(text) == pinned
    assert parse_pinned(text).text() == text


def test_steps_that_read_no_data_are_not_given_any(recipe: Recipe) -> None:
    without = {step for step, text in slices(recipe).items() if "data_md5" not in yaml.safe_load(text)}
    assert without == {"fetch_model", "advance_search", *TRIAL} - {"train_trial"}


def test_an_encoder_that_is_prealigned_knows_nothing_of_its_company(recipe: Recipe) -> None:
    more = [*recipe.model_dump(mode="json")["model"]["encoders"], {"name": "third", "encoder": "vit-tiny-p16-64"}]
    chosen = {"stages.prealign.encoders": ["vit", "efficientnet"]}
    three = change_recipe(recipe, {"model.encoders": more, **chosen})
    pinned = Pinned(three, data_md5="d" * 32, data_remote="nowhere", code_digest="c" * 64)
    assert pinned.of("prealign_encoder", encoder="vit").text() == slices(recipe)[VIT]
    # A step that trains it from its slice trains what the whole recipe would.
    alone = one_encoder(recipe, "vit")
    assert one_encoder(alone, "vit") == alone
    with pytest.raises(RecipeError, match="prealign trains vit, efficientnet"):
        pinned.of("prealign_encoder", encoder="vitt")


def test_validation_tries_the_draws_of_more_epochs_than_are_trained(recipe: Recipe) -> None:
    def validated(**changes: Any) -> str:
        return slices(change_recipe(recipe, {f"stages.sft.{name}": value for name, value in changes.items()}))[
            "validate_data"
        ]

    assert parse_pinned(validated(epochs=1)).recipe.stages.sft.epochs == 4  # type: ignore[union-attr]
    assert validated(epochs=1) == validated(epochs=4) != validated(epochs=5) == validated(epochs=8)
    still = recipe.model_dump(mode="json")["stages"]["sft"]["mixture"]
    still[0]["image_dropout"] = 0
    assert validated(mixture=still, epochs=1) == validated(mixture=still, epochs=100)


def test_validation_is_given_the_data_sets_that_the_gate_wants_compared(recipe: Recipe) -> None:
    changes: dict[str, Any] = {"data.eval_datasets": []}
    asked = parse_pinned(slices(change_recipe(recipe, changes))["validate_data"]).recipe
    assert asked.data.contamination.benchmarks == ("easy-vqa-test",)
    changes["gate"] = [{"rule": "validation"}]
    asked = parse_pinned(slices(change_recipe(recipe, changes))["validate_data"]).recipe
    assert asked.data.contamination.benchmarks == ()


def test_a_part_of_a_recipe_is_checked_as_the_whole_is(recipe: Recipe) -> None:
    given = parse_pinned(slices(recipe)["train_trial"]).recipe
    assert change_recipe(given, {"stages.sft.epochs": 7}).stages.sft.epochs == 7  # type: ignore[union-attr]
    for changes, message in (
        ({"stages.sft.epochs": "many"}, r"stages\.sft\.epochs"),
        ({"stages.sft.epoch": 7}, "Did you mean"),
        ({"stages.sft.train": {"encoders.none": 1e-3}}, r"encoders\.none"),
        ({"data.suite": "other"}, "train_trial reads no others"),
    ):
        with pytest.raises(RecipeError, match=message):
            change_recipe(given, changes)
