from __future__ import annotations

import pytest

from manyeyes.errors import ManyEyesError, RecipeError, did_you_mean
from manyeyes.recipe import Recipe, list_recipes, load_recipe, parse_overrides, parse_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_survives_its_own_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(recipe.canonical_json()) == recipe
    assert parse_recipe(recipe.canonical_json()).digest == recipe.digest


def test_digest_changes_with_any_field_and_not_with_order() -> None:
    recipe = load_recipe("tiny")
    assert load_recipe("tiny", overrides={"seed": recipe.seed + 1}).digest != recipe.digest
    tree = dict(reversed(recipe.model_dump(mode="json").items()))
    assert Recipe.model_validate(tree).digest == recipe.digest


def test_unknown_recipe_offers_the_nearest_spelling() -> None:
    with pytest.raises(RecipeError, match='Did you mean "tiny"') as caught:
        load_recipe("tinny")
    assert caught.value.as_dict()["retry"] is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"stages.sft.epoch": 1}, 'stages.sft.epoch; no such field. Did you mean "epochs"'),
        ({"gate.0.atleast": 1}, 'Did you mean "at_least"'),
        ({"stages.sft.train.language_modle": 1.0}, 'Did you mean "language_model"'),
        ({"model.fusion.grid": "wide"}, "model.fusion.grid is 'wide'"),
        ({"model.encoders.1.name": "vit"}, "encoder names must differ"),
        ({"gate.0.benchmark": "gqa"}, "evaluation.benchmarks lacks it"),
        ({"model.encoders.9.name": "x"}, "an index from 0 to"),
        ({"name.first": 1}, "goes below"),
    ],
)
def test_a_wrong_field_is_named(override: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", overrides=override)
    assert message in str(caught.value)


def test_group_names_with_a_dot_can_be_overridden() -> None:
    recipe = load_recipe("tiny", overrides={"stages.sft.train.encoders.vit": 0.5})
    assert recipe.stages.sft is not None
    assert recipe.stages.sft.train["encoders.vit"] == 0.5


def test_child_replaces_what_it_names_and_keeps_the_rest(tmp_path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: tiny\nname: child\nstages: {prealign: null, sft: {epochs: 7, train: {projector: 0.25}}}\n",
        encoding="utf-8",
    )
    recipe, parent = load_recipe(str(child)), load_recipe("tiny")
    assert recipe.stages.prealign is None
    assert recipe.stages.sft is not None
    assert recipe.stages.sft.epochs == 7
    assert recipe.stages.sft.train == {"projector": 0.25}
    assert recipe.stages.pretrain == parent.stages.pretrain
    assert recipe.model == parent.model


def test_a_grandparent_is_refused(tmp_path) -> None:
    middle, bottom = tmp_path / "middle.yaml", tmp_path / "bottom.yaml"
    middle.write_text("extends: tiny\nname: middle\n", encoding="utf-8")
    bottom.write_text(f"extends: {middle}\nname: bottom\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="one parent at most"):
        load_recipe(str(bottom))


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds NoneType"), ("a: [", "is not YAML"), ("name: x\n", "model is missing")]
)
def test_a_file_that_is_no_recipe_says_what_to_write(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)


def test_overrides_are_yaml_values() -> None:
    assert parse_overrides(["a.b=1", "c=[x, 2.5]", "d=null"]) == {"a.b": 1, "c": ["x", 2.5], "d": None}
    with pytest.raises(RecipeError, match="path=value"):
        parse_overrides(["a.b"])
    with pytest.raises(RecipeError, match="not YAML"):
        parse_overrides(["a=["])


def test_prealigned_encoders_follow_the_stage() -> None:
    assert load_recipe("tiny").prealigned_encoders() == ["vit", "efficientnet"]
    assert load_recipe("tiny", overrides={"stages.prealign.encoders": ["vit"]}).prealigned_encoders() == ["vit"]
    assert load_recipe("tiny", overrides={"stages.prealign": None}).prealigned_encoders() == []


def test_errors_say_found_needed_and_do() -> None:
    error = ManyEyesError("size is 3", "at least 4", "Give more.", retry=True)
    assert str(error) == "size is 3; at least 4. Give more."
    assert error.as_dict() == {
        "error": "ManyEyesError",
        "found": "size is 3",
        "needed": "at least 4",
        "do": "Give more.",
        "retry": True,
    }
    assert did_you_mean("zzzz", ["alpha"]) == ""
