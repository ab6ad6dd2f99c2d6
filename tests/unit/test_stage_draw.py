"""Draws of a stage: what it trains on of its data sets, and the balance that compares several."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from manyeyes.data.curation.stage_draw import count_drawn, draw_of_stage, drawn_rows
from manyeyes.data.mixture import Mixture
from manyeyes.data.records import Record, Turn
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import DataError, RecipeError
from manyeyes.harness.base import Reporter, StepResult
from manyeyes.recipe import DrawSpec, MixturePart, Recipe, change_recipe, load_recipe
from manyeyes.search.variant import balance_grid, parse_batch
from manyeyes.steps.plan_balance import plan_balance
from tests.pinned_toys import pin
from tests.unit.data_samples import lay_out_remote, make_snapshot, write_remote

SIZES = {"clevr_700k.json": 40, "docvqa_39k": 20, "mine": 10}
DATASETS = ["toy-train", "toy-more"]


def make_records(prefix: str) -> list[Record]:
    return [
        Record(f"{prefix}/{name}/{number}", name, (), (Turn("human", f"{name} {number}?"), Turn("gpt", prefix)))
        for number in range(max(SIZES.values()))
        for name, size in SIZES.items()
        if number < size
    ]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    splits = {"train": make_records("train"), "more": make_records("more")}
    return make_snapshot(tmp_path_factory.mktemp("data") / "snapshot", splits, rows_per_shard=30)


def rows_of_draw(spec: DrawSpec, snapshot: Snapshot, *quarantine: str) -> set[tuple[str, int]]:
    cache = snapshot.path.parent / "cache"
    drawn = draw_of_stage(spec, DATASETS, snapshot, quarantine=frozenset(quarantine), cache_dir=cache)
    return {(name, int(row)) for name, rows in drawn_rows(drawn).items() for row in rows}


def by_source(rows: set[tuple[str, int]], snapshot: Snapshot) -> Counter[str]:
    readers = {name: RecordReader(snapshot.shards(name)) for name in DATASETS}
    return Counter(readers[name].read(row).source for name, row in rows)


def test_cap_holds_for_every_source_and_a_smaller_one_draws_a_part(snapshot: Snapshot) -> None:
    small, large = (rows_of_draw(DrawSpec(cap=cap), snapshot) for cap in (15, 30))
    assert by_source(small, snapshot) == {"clevr_700k.json": 15, "docvqa_39k": 15, "mine": 15}
    assert by_source(large, snapshot) == {"clevr_700k.json": 30, "docvqa_39k": 30, "mine": 20}
    assert small < large
    assert rows_of_draw(DrawSpec(cap=15, seed=1), snapshot) != small
    assert len(rows_of_draw(DrawSpec(), snapshot)) == 140


def test_what_is_in_quarantine_is_not_drawn_and_takes_no_place(snapshot: Snapshot) -> None:
    dataset, row = sorted(rows_of_draw(DrawSpec(cap=15), snapshot))[-1]
    without = rows_of_draw(DrawSpec(cap=15), snapshot, f"{dataset}#{row}")
    assert (dataset, row) not in without
    assert len(without) == 45


def test_ratio_is_among_categories(snapshot: Snapshot) -> None:
    spec = DrawSpec(
        ratio={"Counting": 1, "Mine": 3}, sources={"mine": {"category": "Mine"}, "clevr*": {"category": "Counting"}}
    )  # type: ignore[dict-item]
    drawn = draw_of_stage(spec, DATASETS, snapshot, quarantine=frozenset(), cache_dir=snapshot.path.parent / "cache")
    counts = count_drawn(drawn, spec)
    assert {name: count for name, count in counts.items() if count} == {"Mine": 20, "Counting": 7}


def test_wrong_draws_are_refused(snapshot: Snapshot) -> None:
    with pytest.raises(RecipeError, match="Colours"):
        rows_of_draw(DrawSpec(ratio={"Colours": 1}), snapshot)
    with pytest.raises(DataError, match="Science"):
        rows_of_draw(DrawSpec(ratio={"Science": 1}), snapshot)


def test_mixture_shows_what_is_drawn_and_nothing_else(snapshot: Snapshot) -> None:
    rows = {"toy-train": np.array([3, 5, 8, 60]), "toy-more": np.array([1])}
    parts = [MixturePart(dataset=name) for name in DATASETS]
    mixture = Mixture(parts, snapshot, seed=1, quarantine=frozenset({"toy-train#5"}), drawn=rows)
    shown = [mixture.sample(0, index) for index in range(len(mixture))]
    readers = {name: RecordReader(snapshot.shards(name)) for name in DATASETS}
    wanted = {readers["toy-train"].read(row).id for row in (3, 8, 60)} | {readers["toy-more"].read(1).id}
    assert {sample.record.id for sample in shown} == wanted
    again = pickle.loads(pickle.dumps(mixture))
    assert (len(again), again.digest) == (4, mixture.digest)
    whole = Mixture(parts, snapshot, seed=1, quarantine=frozenset({"toy-train#5"}))
    assert whole.digest != mixture.digest
    fewer = Mixture([MixturePart(dataset="toy-train", max_samples=2)], snapshot, seed=1, drawn=rows)
    assert len(fewer) == 2
    assert {fewer.sample(0, index).record.id for index in range(2)} < wanted | {readers["toy-train"].read(5).id}


def test_a_recipe_without_a_draw_has_the_digest_that_it_had() -> None:
    recipe = load_recipe("tiny")
    assert '"draw"' not in recipe.canonical_json()
    drawn = change_recipe(recipe, {"stages.sft.draw.cap": 9})
    assert drawn.digest != recipe.digest
    assert Recipe.model_validate_json(drawn.canonical_json()) == drawn


@pytest.fixture
def planned(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("MANYEYES_CACHE", str(snapshot.path.parent / "cache"))
    md5, objects = lay_out_remote(snapshot.path)
    pinned = pin(
        load_recipe("tiny", overrides={"stages.sft.mixture": [{"dataset": name} for name in DATASETS]}),
        "train_trial",
        data_md5=md5,
        data_remote=write_remote(tmp_path / "remote", objects),
    )

    def plan(draws: str, stage: str = "sft") -> StepResult:
        return plan_balance(
            Reporter("plan"), pinned=pinned, validation=tmp_path, balance_draws=draws, balance_stage=stage
        )

    return plan


def test_every_draw_of_a_balance_is_made_and_counted_before_anything_trains(planned: object) -> None:
    result = planned("cap=[as-is, 30, 15]")  # type: ignore[operator]
    assert result.headline == "3 draws, 45 to 140 samples"
    variants = [variant for batch in result.values["batches"] for variant in parse_batch(batch)]
    assert [variant.label for variant in variants] == ["as-is", "draw.cap=30", "draw.cap=15"]
    assert result.values["grid"] == "stages.sft.draw.cap=[as-is, 30, 15]"
    assert "15 (33.3%)" in result.markdown


@pytest.mark.parametrize(
    ("draws", "stage", "message"),
    [
        ("", "sft", "balance_draws makes 0 variants"),
        ("cap=5", "sft", "a list of the values"),
        ("cap=[5, 6]", "sfd", "Did you mean"),
        ("cup=[5, 6]", "sft", "cap"),
        ("cap=[0, 6]", "sft", "cap"),
        ("ratio=[{Colours: 1}, {Counting: 1}]", "sft", "Colours"),
    ],
)
def test_a_wrong_balance_is_refused_before_anything_trains(
    planned: object, draws: str, stage: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(draws, stage)  # type: ignore[operator]


def test_the_grid_of_a_balance_changes_the_draw_of_its_stage() -> None:
    text = "# Cambrian-1's\ncap=[150000, 250000]\n\nseed=[0, 1]"
    assert balance_grid(text, stage="pretrain") == (
        "stages.pretrain.draw.cap=[150000, 250000]\nstages.pretrain.draw.seed=[0, 1]"
    )
