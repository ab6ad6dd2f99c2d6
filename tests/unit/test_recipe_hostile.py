"""Recipes that are wrong in every way there is: each is a RecipeError that names the place, and none a traceback."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from manyeyes.errors import RecipeError
from manyeyes.recipe import (
    STAGE_NAMES,
    JudgeSpec,
    LayoutSpec,
    LoraSpec,
    Recipe,
    ReinjectionSpec,
    SharedSpec,
    change_recipe,
    list_recipes,
    load_recipe,
    parse_overrides,
    parse_recipe,
    partial,
    read_recipe_text,
    write_recipe_text,
)
from manyeyes.recipe.gate_rules import GATE_RULES
from manyeyes.recipe.model import Strict
from manyeyes.recipe.service import ServiceSpec
from tests.gate_toys import RULES
from tests.pinned_toys import pin


def full_recipe() -> Recipe:
    """Every numeric field of every part has a value."""
    recipe = load_recipe("tiny")
    stage = recipe.model_dump(mode="json")["stages"]["sft"]
    stage |= {"max_steps": 2, "max_samples": 2, "micro_batch_size": 2, "lora": {"rank": 2, "alpha": 2}}
    stage["mixture"][0]["max_samples"] = 2
    stage["draw"] = {
        "cap": 2,
        "ratio": {"general": 1},
        "total": 2,
        "sources": {"*": {"category": "general", "cap": 2}},
        "seed": 1,
    }
    packed = {**stage, "micro_batch_size": None, "lora": None, "packing": {"tokens": 2, "images": 2}}
    return change_recipe(
        recipe,
        {
            "model.encoders.0.image_size": 64,
            "model.encoders.0.fill": [1, 2, 3],
            "model.preprocess": "shared",
            "model.shared": {"image_size": 64},
            "model.reinjection": {"stride": 1, "count": 1},
            "model.layout": {},
            "stages.sft": stage,
            "stages.pretrain": packed,
            "evaluation.max_new_tokens": 8,
            "evaluation.max_items": 8,
            "evaluation.judge": {
                "endpoint": "https://judge.example/v1",
                "model": "m",
                "temperature": 0,
                "requests_per_minute": 1,
                "price_in": 1,
                "max_cost": 1,
                "price_out": 1,
            },
            "gate": RULES,
        },
    )


def numbers_of(part: BaseModel, place: str = "") -> Iterator[tuple[type, str, str]]:
    """Class, field and dotted path of each number in a recipe."""
    for name, value in ((name, getattr(part, name)) for name in type(part).model_fields):
        where = f"{place}.{name}" if place else name
        entries = list(value.items() if isinstance(value, dict) else enumerate(value)) if is_many(value) else []
        for key, entry in [("", value), *((f".{key}", entry) for key, entry in entries)]:
            if isinstance(entry, BaseModel):
                yield from numbers_of(entry, where + key)
            elif is_many(entry) and key:
                yield from ((type(part), name, f"{where}{key}.{index}") for index, _ in enumerate(entry))
            elif isinstance(entry, int | float) and not isinstance(entry, bool):
                yield type(part), name, where + key


def is_many(value: Any) -> bool:
    return isinstance(value, dict | tuple)


def subclasses(of: type[Strict]) -> set[type[Strict]]:
    below = set(of.__subclasses__())
    return below.union(*(subclasses(part) for part in below))


def types_in(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*(types_in(part) for part in inner)) if inner else {annotation}


PLACES = sorted({place for _, _, place in numbers_of(full_recipe())})
BELOW_ZERO_IS_FINE = {"margin"}


def test_the_sweep_reaches_every_numeric_field() -> None:
    seen = {(part, field) for part, field, _ in numbers_of(full_recipe())}
    every = {
        (part, name)
        for part in subclasses(Strict)
        # Those of partial are made of these classes as steps read them, and other tests make their own.
        if part.__module__.startswith("manyeyes.")
        and part.__module__ != partial.__name__
        and part is not ServiceSpec  # in a recipe it is a judge
        for name, field in part.model_fields.items()
        if types_in(field.annotation) & {int, float} and Any not in types_in(field.annotation)
    }
    assert every <= seen
    assert {LayoutSpec, ReinjectionSpec, SharedSpec, LoraSpec, JudgeSpec} <= {part for part, _ in every}
    assert {GATE_RULES[name] for name in GATE_RULES if name != "validation"} <= {part for part, _ in every}


@pytest.mark.parametrize("place", PLACES)
def test_no_number_takes_what_means_nothing(place: str) -> None:
    recipe = full_recipe()
    field = next(part for part in reversed(place.split(".")) if not part.isdigit())
    wrong: list[Any] = [math.nan, math.inf, -math.inf, "nan", ".inf", -1, 10**30, 1e300, "many", True, False, [], {}]
    for value in wrong:
        if value == -1 and not isinstance(value, bool) and field in BELOW_ZERO_IS_FINE:
            continue
        with pytest.raises(RecipeError) as caught:
            change_recipe(recipe, {place: value})
        assert field in str(caught.value), value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("stages.sft.train.projector", -1, "greater than 0"),
        ("stages.sft.betas", [2, 3], "less than 1"),
        ("stages.sft.weight_decay", -0.1, "greater than or equal to 0"),
        ("stages.sft.epochs", True, "epochs needs a number, not true or false"),
        ("stages.sft.epochs", 1.5, "valid integer"),
        ("stages.sft.schedule.warmup_ratio", 1.01, "less than or equal to 1"),
        ("stages.sft.model", {"fusion.grid": -1}, "stages.sft.model changes model.fusion.grid"),
        ("seed", -1, "greater than or equal to 0"),
        ("model.fusion.options", {"x": math.nan}, "model.fusion.options.x is nan"),
        ("name", "", "at least 1 character"),
        ("name", "a\x00b", "without NUL"),
        ("description", "half \ud83d", "half characters"),
    ],
)
def test_the_message_says_what_is_needed(place: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        change_recipe(load_recipe("tiny"), {place: value})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{{', '.join(f'{b}{n}: 1' for n in range(9))}, <<: [{', '.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10,000 values"),
        (MERGES, "merges"),
        ("a: &a [*a]\n", "nested too deep"),
        ("[" * 100_000, "nested too deep"),
        ("a: " + "[" * 5_000 + "]" * 5_000, "nested too deep"),
        ("name: x\nname: y\n", 'the key "name" twice'),
        ("stages: {sft: {epochs: 1, epochs: 2}}\n", 'the key "epochs" twice'),
        ("name:\tx\n\tseed: 1\n", "is not YAML"),
        ("1: x\n", "has the key 1"),
        ("extends: tiny\nseed: {2: 3}\n", "seed has the key 2"),
        ("? [a, b]\n: c\n", "is not YAML"),
        ("extends: tiny\nname: 2026-01-01\n", "name is datetime.date"),
        ("extends: tiny\nname: 2026-13-41\n", "is not YAML"),
        ("extends: tiny\ndescription: !!binary aGk=\n", "description is b'hi'"),
        ("extends: tiny\ndescription: !!set {a, b}\n", "description is {"),
        ("extends: tiny\nseed: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (f"extends: tiny\nseed: {'9' * 5_000}\n", "is not YAML"),
        (f"extends: tiny\nseed: 0x{'f' * 5_000}\n", "an integer of 20,000 bits"),
        ("extends: tiny\nseed: .nan\n", "seed is nan"),
        ("extends: [tiny]\n", "extends is"),
        ("extends: nowhere.yaml\n", "no such file"),
        ("name: a\x00b\n", "is not YAML"),
        ("--- a\n--- b\n", "is not YAML"),
        ("just text\n", "holds str"),
        ("extends: tiny\nstages: 7\n", "stages is 7"),
        ("extends: tiny\ndescription: " + "x" * 200_000 + "\n", "takes 20"),
        ("# " + "x" * 300_000 + "\nextends: tiny\n", "262,144 at most"),
    ],
)
def test_yaml_that_attacks_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe_text(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("extends: tiny\nname: größe\n".encode("latin-1"), "is not UTF-8 (byte 0xf6 in line 2)"),
        ("extends: tiny\n".encode("utf-16"), "is UTF-16"),
        (bytes(range(256)), "is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8"),
        (b"extends: tiny\nname: a\x00b\n", "is not YAML"),
        (b"", "holds NoneType"),
        (b"x" * 300_000, "has 300,000 bytes"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_a_folder_and_a_name_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name, message in (("folder.yaml", "this is a folder"), (f"{'x' * 5_000}.yaml", "too long"), ("a\0.yaml", "no")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfextends: tiny\nname: gr\xc3\xb6\xc3\x9fe\n")
    assert load_recipe(str(path)).name == "größe"


def test_a_parent_file_lies_beside_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text("extends: null\n", encoding="utf-8")
    base = yaml.safe_dump(json.loads(load_recipe("tiny").canonical_json()) | {"seed": 41})
    (tmp_path / "recipes" / "base.yaml").write_text(base, encoding="utf-8")
    (tmp_path / "recipes" / "child.yaml").write_text("extends: base.yaml\nname: child\n", encoding="utf-8")
    (tmp_path / "base.yaml").write_text("this: is another\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/child.yaml").seed == 41


def test_the_longest_recipe_fits_a_command_line_with_its_quotes_doubled_twice() -> None:
    recipe = load_recipe("tiny")
    longest = change_recipe(recipe, {"description": '"' * ((32_768 - len(recipe.canonical_json())) // 2)})
    inside = json.dumps({"pinned": pin(longest, "register")})
    assert len(inside) < 131_072
    assert parse_recipe(longest.canonical_json()) == longest


@pytest.mark.parametrize(
    "assignment",
    [
        "gate.0.rule.x=1",
        "model.layout.pinpoints.0.0.x=1",
        "evaluation.benchmarks.0.x=1",
        "gate.²=1",
        f"gate.{'9' * 5_000}=1",
        "gate.-1=1",
        "a..b=1",
        ".=1",
        "evaluation.variants.gqa.x.y=2026-01-01",
        "seed=.inf",
        f"seed={'[' * 3_000}",
        f"seed={'9' * 5_000}",
        "stages.sft.train=5",
        "stages.sft.train.=5",
    ],
)
def test_an_override_that_fits_nothing_is_refused(assignment: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("tiny", overrides={"model.layout": {"pinpoints": [[1, 2]]}, **parse_overrides([assignment])})


SEED = 20_261
VALUES: list[Any] = [None, True, -1, 0, 1e308, math.nan, math.inf, "", "\x00", "\ud800", "x" * 300, [], {}, [[]]]
VALUES += [{"a": {}}, [None], 2**70, "1e-3", -0.0, {"": 1}, "hub:x", "../..", "\u2028", [1, 2, 3], {"rule": "floor"}]
PIECES = [
    "\t",
    "\x00",
    "&a ",
    "*a",
    "<<: ",
    "!!set ",
    "{",
    "[",
    "'",
    '"',
    ": ",
    "- ",
    "\ufeff",
    "\u2028",
    "---\n",
    "? ",
]


def branches(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree if isinstance(tree, dict) else range(len(tree))):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from branches(tree[key])


def survives(text: str) -> bool:
    """Whether the text is a recipe; whatever is none must say so as a user's error, and whatever is one must last."""
    try:
        recipe = read_recipe_text(text)
    except RecipeError as error:
        str(error).encode()
        return False
    assert parse_recipe(recipe.canonical_json()).digest == recipe.digest
    assert read_recipe_text(write_recipe_text(recipe)) == recipe
    assert all(getattr(recipe.stages, name) is None or getattr(recipe.stages, name).mixture for name in STAGE_NAMES)
    return True


def test_values_exchanged_at_random_never_end_in_a_traceback() -> None:
    draw = random.Random(SEED)
    outcomes = []
    texts = [load_recipe(name).canonical_json() for name in list_recipes()]
    for _ in range(150):
        tree = json.loads(draw.choice(texts))
        for _ in range(draw.randint(1, 3)):
            node, key = draw.choice(list(branches(tree)))
            node[key] = draw.choice(VALUES)
        outcomes.append(survives(json.dumps(tree)))
    assert 0 < sum(outcomes) < len(outcomes) / 2


def test_text_cut_doubled_and_salted_at_random_never_ends_in_a_traceback() -> None:
    draw = random.Random(SEED)
    outcomes = []
    whole = yaml.safe_dump(json.loads(load_recipe("tiny").canonical_json()))
    for _ in range(150):
        text = whole
        for _ in range(draw.randint(1, 3)):
            at, length = draw.randrange(len(text)), draw.randint(0, 40)
            piece = draw.choice([*PIECES, text[at : at + length] * 2, chr(draw.randrange(0xD800)), ""])
            text = text[:at] + piece + text[at + length :]
        outcomes.append(survives(text))
    assert 0 < sum(outcomes) < len(outcomes)
