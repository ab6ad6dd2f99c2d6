"""Variants of a recipe: subsets of encoders and grids of values."""

from __future__ import annotations

import json

import pytest

from manyeyes.errors import PipelineError, RecipeError
from manyeyes.harness.base import Reporter
from manyeyes.recipe import Recipe, change_recipe, load_recipe
from manyeyes.search.variant import (
    MAX_BATCHES,
    MAX_VARIANTS,
    Variant,
    batch_key,
    in_batches,
    keep_encoders,
    parse_batch,
    parse_variant,
    read_grid,
)
from manyeyes.steps.plan_ablation import plan_ablation
from tests.pinned_toys import pin


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny")


def test_change_replaces_values_and_checks_the_whole_again(recipe: Recipe) -> None:
    changed = change_recipe(recipe, {"stages.sft.epochs": 9, "stages.prealign": None})
    assert recipe.stages.sft is not None
    assert changed.stages.sft is not None
    assert (changed.stages.sft.epochs, changed.stages.prealign) == (9, None)
    assert recipe.stages.sft.epochs == 4
    assert changed.digest != recipe.digest
    with pytest.raises(RecipeError, match="epoch"):
        change_recipe(recipe, {"stages.sft.epoch": 9})


def test_kept_encoders_stand_in_the_recipes_order_and_nothing_names_the_others(recipe: Recipe) -> None:
    named = change_recipe(
        recipe,
        {
            "stages.sft.train": {"encoders.vit": 1e-4, "encoders.efficientnet": 2e-4, "projector": 1e-3},
            "stages.prealign.encoders": ["efficientnet"],
        },
    )
    kept = keep_encoders(named, ["vit"])
    assert [encoder.name for encoder in kept.model.encoders] == ["vit"]
    assert kept.stages.sft is not None
    assert kept.stages.sft.train == {"encoders.vit": 1e-4, "projector": 1e-3}
    assert kept.stages.prealign is None  # it trained nothing but the other encoder
    assert keep_encoders(named, ["efficientnet", "vit"]) == named


def test_unknown_encoder_is_named_with_the_nearest(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match='Did you mean "efficientnet"'):
        keep_encoders(recipe, ["vit", "eficientnet"])
    with pytest.raises(RecipeError, match="each once"):
        keep_encoders(recipe, ["vit", "vit"])
    with pytest.raises(RecipeError, match="one name at least"):
        keep_encoders(recipe, [])


def test_text_of_a_variant_comes_back_and_says_no_defaults() -> None:
    subset = Variant(encoders=("vit", "efficientnet"))
    assert subset.text() == '{"encoders":["vit","efficientnet"]}'
    assert parse_variant(subset.text()) == subset
    assert (subset.label, subset.key) == ("vit+efficientnet", "vit+efficientnet")
    changed = Variant(changes={"stages.sft": None, "model.fusion": {"strategy": "sequence-append", "grid": 4}})
    assert parse_variant(changed.text()) == changed
    assert json.loads(changed.text()) == {"changes": dict(changed.changes)}
    with pytest.raises(PipelineError, match="encoders"):
        parse_variant('["vit"]')


def test_keys_are_file_names_and_differ_where_labels_are_cut() -> None:
    long = [Variant(changes={"model.fusion.options": {"text": "x" * 200 + end}}) for end in ("a", "b")]
    assert long[0].key != long[1].key
    for variant in (*long, Variant(changes={"a/b": "../x y"}), Variant()):
        assert set(variant.key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=+-")
        assert len(variant.key) <= 70


def test_grid_makes_every_combination_and_the_last_line_changes_fastest() -> None:
    variants = read_grid("# two fusions\na.b=[x, as-is]\n\nstages.pretrain=[null, as-is]\n")
    assert [dict(variant.changes) for variant in variants] == [
        {"a.b": "x", "stages.pretrain": None},
        {"a.b": "x"},
        {"stages.pretrain": None},
        {},
    ]
    assert [variant.label for variant in variants] == [
        "a.b=x, stages.pretrain=null",
        "a.b=x",
        "stages.pretrain=null",
        "as-is",
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("", "0 variants"),
        ("a=[1]", "1 variants"),
        ("a=1", "recipe_overrides"),
        ("a", "path=value"),
        ("a=[1, 1]", "same variant twice"),
        ("a=[1, 2]\na=[3]", "twice"),
        (f"a={list(range(MAX_VARIANTS + 1))}", f"2 to {MAX_VARIANTS}"),
    ],
)
def test_wrong_grid_is_refused(grid: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_grid(grid)


def test_plan_checks_every_variant_before_anything_is_trained(recipe: Recipe) -> None:
    def plan(grid: str) -> list[str]:
        result = plan_ablation(Reporter("plan"), pinned=pin(recipe, "plan_ablation"), ablate_grid=grid)
        return list(result.values["batches"])

    texts = plan("model.fusion.grid=[4, 2]")
    assert [parse_variant(text).changes for text in texts] == [{"model.fusion.grid": 4}, {"model.fusion.grid": 2}]
    with pytest.raises(RecipeError, match="grid"):
        plan("model.fusion.grid=[4, none]")
    with pytest.raises(RecipeError, match="other questions"):
        plan("evaluation.max_items=[10, 20]")
    with pytest.raises(RecipeError, match="trains no model"):
        plan("stages={}".format("[as-is, {prealign: null}]"))


def test_batches_hold_every_variant_once_and_are_about_as_large_as_each_other() -> None:
    variants = read_grid("a=[1, 2, 3, 4, 5, 6]\nb=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")
    batches = [parse_batch(text) for text in in_batches(variants)]
    assert len(batches) == MAX_BATCHES
    assert {len(batch) for batch in batches} == {7, 8}
    assert sorted(variant.text() for batch in batches for variant in batch) == sorted(v.text() for v in variants)


def test_a_few_variants_are_trained_side_by_side_and_each_step_bears_its_variants_name() -> None:
    variants = read_grid("fusion.grid=[4, 2]")
    assert [parse_batch(text) for text in in_batches(variants)] == [[variants[0]], [variants[1]]]
    assert batch_key(variants[0].text()) == "fusion.grid=4"
    assert batch_key("\n".join(variant.text() for variant in variants)) == "fusion.grid=4 and 1 more"
    with pytest.raises(PipelineError, match="variant is"):
        parse_batch("no variant")


def test_a_grid_of_billions_is_counted_and_not_made() -> None:
    lines = [f"model.fusion.options.x{number}=[{', '.join(map(str, range(50)))}]" for number in range(20)]
    with pytest.raises(RecipeError, match="variants; 2 to 64"):
        read_grid("\n".join(lines))
