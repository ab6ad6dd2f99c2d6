"""Features of frozen encoders, kept and read again: the result of a stage never depends on what was kept."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from manyeyes.errors import PipelineError
from manyeyes.model import ManyEyesProcessor, build_model
from manyeyes.recipe import Recipe, change_recipe
from manyeyes.training import features
from manyeyes.training.features import (
    FeatureCosts,
    FeatureFiles,
    FeatureWarning,
    features_key,
    features_limit,
    plan_features,
)
from manyeyes.training.stage import StageReport
from tests.training_ranks import run_two
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe, toy_snapshot

SIZE = 2 * 3 * 3 * 4
"""Bytes of ``make(...)``."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    toy_snapshot(path / "data")
    toy_recipe_ = toy_recipe()
    run_toy_stage(
        "prealign", recipe=toy_recipe_, snapshot=path / "data", inputs=path, out=path / "left", work_dir=path / "work"
    )
    return path


@pytest.fixture(autouse=True)
def as_if_keeping_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy encoders take less time than some disks."""
    monkeypatch.setattr(features, "_move_seconds", lambda folder: folder.mkdir(parents=True, exist_ok=True) or 0.0)


def make(seed: int) -> torch.Tensor:
    return torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def make_files(folder: Path, *, key: str = "k" * 64, most: int = 1 << 30) -> FeatureFiles:
    return FeatureFiles(folder, key, most_bytes=most)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def forget(work: Path) -> None:
    """Leave nothing but what features were kept."""
    for folder in work.glob("?" * 64):
        shutil.rmtree(folder)


def train(data: Path, work: Path, **more: Any) -> StageReport:
    """A stage of two epochs, from nothing but what features were kept in ``work``."""
    forget(work)
    return train_on(data, work, **more)


def train_on(
    data: Path, work: Path, *, stage: Any = "pretrain", changes: dict[str, Any] | None = None, **more: Any
) -> StageReport:
    spec = {f"stages.{stage}.{name}": value for name, value in (changes or {}).items() if "." not in name}
    whole = {name: value for name, value in (changes or {}).items() if "." in name}
    recipe = change_recipe(toy_recipe(epochs=2), {f"stages.{stage}.keep_features": True, **spec, **whole})
    return run_toy_stage(
        stage, recipe=recipe, snapshot=data / "data", inputs=data, out=work / "out", work_dir=work, **more
    )


def counts(report: StageReport) -> dict[str, tuple[bool, int, int]]:
    assert report.features is not None
    return {own.encoder: (own.kept, own.made, own.read) for own in report.features}


def losses(report: StageReport) -> list[float]:
    return [point.loss for point in report.history]


TILES = {
    "model.encoders.1.image_size": 64,
    "model.fusion": {"strategy": "patch-info-mining", "grid": 2, "options": {"image_grid": 2}},
    "model.layout": {"tiling": "grid", "image_grid": 2, "whole": ["right"]},
    "model.preprocess": "shared",
    "model.shared": {"image_size": 64, "base": "left"},
}
PINPOINTS = {"model.layout": {"tiling": "anyres", "pinpoints": [[2, 2], [2, 1]], "newline": True}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 3},
    "packed": {"packing": {"tokens": 200}, "precision": "bf16"},
    "shared pixels": {"model.preprocess": "shared", "model.shared": {"image_size": 48, "base": "left"}},
    "tiles of shared pixels": TILES,
    "tiles": PINPOINTS,
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_stage_learns_the_same_whatever_is_kept(
    changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MANYEYES_FEATURES_GB", "0")
        without = train(data, tmp_path, changes=changes)
    cold = train(data, tmp_path, changes=changes)
    with monkeypatch.context() as patch:
        cut = ManyEyesProcessor.cut_image
        seen: list[Any] = []
        patch.setattr(ManyEyesProcessor, "cut_image", lambda *a, **k: (seen.append(1), cut(*a, **k))[1])
        warm = train(data, tmp_path, changes=changes)
    assert not seen, "an image that is kept is neither decoded nor resized, and encoders were timed before"
    assert cold.checkpoint_digest == without.checkpoint_digest
    assert warm.checkpoint_digest == without.checkpoint_digest
    assert losses(cold) == losses(warm) == losses(without)
    shown = counts(without)["left"][1]
    assert counts(without) == dict.fromkeys(("left", "right"), (False, shown, 0))
    once = counts(cold)["left"][1]
    assert once <= 12 < shown, "images, and how often they are shown"
    assert counts(cold) == dict.fromkeys(("left", "right"), (True, once, shown - once))
    assert counts(warm) == dict.fromkeys(("left", "right"), (True, 0, shown))


def test_features_of_images_by_themselves_are_those_of_batches_to_rounding(data: Path, tmp_path: Path) -> None:
    kept, batched = train(data, tmp_path), train(data, tmp_path / "other", changes={"keep_features": False})
    assert losses(kept) == pytest.approx(losses(batched), rel=1e-5)
    assert batched.features is None
    assert not (tmp_path / "other" / "features").exists()


def test_encoders_that_train_run_beside_kept_ones(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"encoders.left": 1e-3, "projector": 1e-3}
    cold = train(data, tmp_path, changes={"train": rates})
    warm = train(data, tmp_path, changes={"train": rates})
    assert cold.checkpoint_digest == warm.checkpoint_digest
    assert list(counts(warm)) == ["right"]
    assert counts(warm)["right"][1] == 0
    monkeypatch.setenv("MANYEYES_FEATURES_GB", "0")
    assert train(data, tmp_path, changes={"train": rates}).checkpoint_digest == cold.checkpoint_digest
    both = train(data, tmp_path, changes={"train": {"encoders": 1e-3, "projector": 1e-3}})
    assert both.features is None


def test_data_workers_find_what_is_kept(data: Path, tmp_path: Path) -> None:
    alone = train(data, tmp_path)
    fed = train(data, tmp_path / "fed", data_workers=1)
    assert fed.checkpoint_digest == alone.checkpoint_digest
    again = train(data, tmp_path / "fed", data_workers=1)
    assert again.checkpoint_digest == alone.checkpoint_digest
    assert counts(again)["left"][1] == 0


def test_a_stage_that_was_stopped_goes_on_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    whole = train(data, tmp_path / "whole")

    def stop(progress: Any) -> None:
        if progress.step >= 4:
            raise KeyboardInterrupt

    changes = {"checkpoint_every_s": 1e-6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyeyes.training.loop.PROGRESS_EVERY_S", 0.0)
        with every_step_saved(), pytest.raises(KeyboardInterrupt):
            train(data, tmp_path, changes=changes, on_progress=stop)
    recipe = change_recipe(toy_recipe(epochs=2), {"stages.pretrain.keep_features": True})
    rest = run_toy_stage(
        "pretrain", recipe=recipe, snapshot=data / "data", inputs=data, out=tmp_path / "out", work_dir=tmp_path
    )
    assert rest.resumed_from_step == 3
    assert rest.checkpoint_digest == whole.checkpoint_digest


def run_as(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    features._move_seconds = lambda folder: folder.mkdir(parents=True, exist_ok=True) or 0.0  # type: ignore[assignment]
    train_on(**kwargs)


def test_two_processes_write_at_once_and_learn_what_they_learn_without(data: Path, tmp_path: Path) -> None:
    from manyeyes.training.stage import read_stage_report

    work = tmp_path / "work"
    run_two(run_as, {"data": data, "work": work})
    first = read_stage_report(work / "out")
    forget(work)
    run_two(run_as, {"data": data, "work": work})
    second = read_stage_report(work / "out")
    assert first.checkpoint_digest == second.checkpoint_digest
    assert counts(second)["left"][:2] == (True, 0)


# --- files ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back_bit_for_bit_in_any_process(tmp_path: Path) -> None:
    first, second = make_files(tmp_path), make_files(tmp_path)
    assert first.find("a") is None
    first.keep("a", make(1))
    first.keep("b", make(2).bfloat16())
    assert second.find("a") is None
    found = first.find("a")
    assert found is not None
    assert torch.equal(found, make(1)), "before it is written"
    first.write()
    second._looked = 0.0
    for files in (first, second, make_files(tmp_path)):
        for name, expected in (("a", make(1)), ("b", make(2).bfloat16())):
            found = files.find(name)
            assert found is not None
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert make_files(tmp_path, key="o" * 64).find("a") is None
    second.keep("a", make(1))
    second.write()
    assert len(files_in(tmp_path)) == 1, "what another process wrote meanwhile is not written again"


def test_features_are_written_as_they_grow_old_or_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files(tmp_path)
    files.keep("a", make(1))
    assert not files_in(tmp_path)
    monkeypatch.setattr(features, "_FILE_S", 0.0)
    files.keep("b", make(2))
    assert len(files_in(tmp_path)) == 1
    monkeypatch.setattr(features, "_FILE_S", 1e9)
    monkeypatch.setattr(features, "_FILE_BYTES", 2 * SIZE)
    files.keep("c", make(3))
    files.keep("d", make(4))
    assert len(files_in(tmp_path)) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "a cut file": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "an empty file": lambda path: path.write_bytes(b""),
    "no file of ours": lambda path: save_file({"a": make(9), "b": make(9)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_noticed_and_its_features_are_made_again(damage: Any, data: Path, tmp_path: Path) -> None:
    whole = train(data, tmp_path)
    for path in files_in(tmp_path / "features"):
        damage(path)
    with pytest.warns(FeatureWarning, match="is damaged"):
        again = train(data, tmp_path)
    assert again.checkpoint_digest == whole.checkpoint_digest
    assert counts(again)["left"][1] > 0
    # What was read before the damage was noticed went with the file, and is made once more.
    assert counts(train(data, tmp_path))["left"][1] < counts(again)["left"][1] + counts(again)["left"][2]
    assert counts(train(data, tmp_path))["left"][1] == 0


def test_the_bound_deletes_what_was_used_longest_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_FILE_S", 0.0)
    old = make_files(tmp_path, key="o" * 64)
    old.keep("a", make(1))
    (path,) = files_in(tmp_path)
    bound = 2 * path.stat().st_size + 8
    os.utime(path, (1, 1))
    new = make_files(tmp_path, key="n" * 64, most=bound)
    for number in range(3):
        new.keep(f"{number}", make(number))
        for own in set(files_in(tmp_path)) - {path}:
            os.utime(own, (2 + number, 2 + number))
    assert not path.exists()
    assert len(files_in(tmp_path)) == 2
    found = old.find("a")
    assert found is not None, "who has it open goes on reading it"
    assert torch.equal(found, make(1))
    assert make_files(tmp_path, key="o" * 64).find("a") is None


def test_without_room_training_goes_on_and_says_so_once(data: Path, tmp_path: Path) -> None:
    plan = train(data, tmp_path)
    shutil.rmtree(tmp_path / "features")
    with pytest.MonkeyPatch.context() as patch:
        free = iter([2**40])
        patch.setattr(features, "_free", lambda _: next(free, 0))
        with pytest.warns(FeatureWarning, match="no more features are kept") as told:
            full = train(data, tmp_path)
    assert len([one for one in told if one.category is FeatureWarning]) == 2, "once an encoder"
    assert full.checkpoint_digest == plan.checkpoint_digest
    assert not files_in(tmp_path / "features")


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    folder = tmp_path / ("k" * 32)
    folder.mkdir()
    dead, young = folder / ".dead-x", folder / ".young-x"
    dead.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(dead, (1, time.time() - 7200))
    files = make_files(tmp_path)
    assert files.find("a") is None
    files.keep("a", make(1))
    files.write()
    assert not dead.exists()
    assert young.exists(), "somebody may be writing it"


# --- keys ----------------------------------------------------------------------------------------------------------


def keys_of(recipe: Recipe, data: Path, *, seed: int = 0, **more: Any) -> dict[str, str]:
    model, processor = build_model(recipe.model, snapshot_path=data / "data", seed=seed)
    given = {"precision": "fp32", "device": torch.device("cpu"), "code_digest": "c", **more}
    return {name: features_key(model, processor, name, **given) for name in model.encoders}


def test_a_key_stands_for_all_that_features_depend_on(data: Path) -> None:
    torch.set_num_threads(1)
    recipe = toy_recipe()
    same = keys_of(recipe, data)
    assert keys_of(recipe, data) == same
    assert len(set(same.values())) == 2, "other weights"
    renamed = {"model.encoders.0.name": "eye", "stages.prealign.encoders": ["right"]}
    assert keys_of(change_recipe(recipe, renamed), data)["eye"] == same["left"], "names say nothing"
    unlike = [
        keys_of(recipe, data, seed=1),
        keys_of(recipe, data, precision="bf16"),
        keys_of(recipe, data, code_digest="other"),
        keys_of(recipe, data, device=torch.device("cuda")),
        *(
            keys_of(change_recipe(recipe, changes), data)
            for changes in (
                {"model.encoders.0.fit": "crop"},
                {"model.encoders.0.image_size": 64},
                {"model.encoders.0.fill": [1, 2, 3]},
                {"model.preprocess": "shared", "model.shared": {"image_size": 48, "base": "left"}},
                PINPOINTS,
                TILES,
            )
        ),
    ]
    torch.set_num_threads(2)
    unlike.append(keys_of(recipe, data))
    torch.set_num_threads(1)
    lefts = [same["left"], *(own["left"] for own in unlike)]
    assert len(set(lefts)) == len(lefts)


# --- what pays -----------------------------------------------------------------------------------------------------


def costs(**changes: Any) -> FeatureCosts:
    given = {"images": 1000, "kept": 0, "uses": 4.0, "bytes": 10_000, "make_s": 0.01, "move_s": 0.002, **changes}
    return FeatureCosts(**given)


@pytest.mark.parametrize(
    ("changes", "room", "kept", "why"),
    [
        ({}, 10**7, True, "keeping pays: 1,000 images of 10.0 kB, each seen 4 times, 0 kept already; 10.00 ms"),
        ({}, 10**7 - 1, False, r"0.01 GB are needed, there is room for 0.01 \(MANYEYES_FEATURES_GB\)"),
        ({"kept": 999}, 10_000, True, "999 kept already"),
        ({"uses": 1.0}, 10**9, False, "keeping does not pay"),
        ({"uses": 1.0, "kept": 1000}, 0, True, "keeping pays"),
        ({"uses": 1.0, "move_s": 0.001}, 10**9, True, "keeping pays"),
        ({"uses": 2.0, "move_s": 0.004}, 10**9, False, "keeping does not pay"),
        ({"uses": 100.0, "make_s": 0.001}, 10**9, False, "keeping does not pay"),
    ],
)
def test_features_are_kept_where_that_saves_time_and_all_of_them_fit(
    changes: dict[str, Any], room: int, kept: bool, why: str
) -> None:
    (plan,) = plan_features({"vit": costs(**changes)}, room=room)
    assert plan.kept is kept
    assert re.search(why, plan.why)


def test_where_one_fits_it_is_the_one_that_saves_most_for_a_byte() -> None:
    plans = plan_features({"cheap": costs(), "dear": costs(make_s=0.1), "late": costs()}, room=2 * 10**7)
    assert [(plan.encoder, plan.kept) for plan in plans] == [("cheap", True), ("dear", True), ("late", False)]


@pytest.mark.parametrize(
    ("environment", "gigabytes"),
    [
        ({}, 20.0),
        ({"MANYEYES_FEATURES_GB": "0.5"}, 0.5),
        ({"MANYEYES_FEATURES_GB": "0"}, 0.0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 0.0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MANYEYES_WORKDIR": "/work/work"}, 20.0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MANYEYES_FEATURES_GB": "3"}, 3.0),
    ],
)
def test_a_pod_keeps_features_on_its_volume_alone(
    environment: dict[str, str], gigabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MANYEYES_FEATURES_GB", "KUBERNETES_SERVICE_HOST", "MANYEYES_WORKDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert features_limit() == int(gigabytes * 2**30)


@pytest.mark.parametrize("given", ["many", "-1", "inf", "nan"])
def test_a_bound_that_is_no_number_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_FEATURES_GB", given)
    with pytest.raises(PipelineError, match="MANYEYES_FEATURES_GB is"):
        features_limit()
