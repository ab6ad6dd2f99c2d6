"""What validation keeps for a recipe trains, whatever the records hold; what it puts aside could not."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from PIL import Image

from bench.fuzz_records import check_recipe, fuzz_records, odd_recipes
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.mixture import Mixture
from manyeyes.data.profile import build_profile
from manyeyes.data.quarantine import row_name
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.errors import RecordError
from manyeyes.model import build_model, build_processor
from manyeyes.model.language_model import resolve_language_model
from manyeyes.recipe import Recipe
from manyeyes.training.batches import Admission, BatchBuilder, processor_of_stage, stage_seed
from tests.model_toys import toy_spec, write_language_model
from tests.training_toys import toy_recipe, toy_record


def picture(width: int, height: int, *, on_its_side: bool = False) -> bytes:
    exif = Image.Exif()
    if on_its_side:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def with_image(number: int, data: bytes) -> Record:
    return dataclasses.replace(toy_record(number), images=(read_image_file(data, path=f"{number}.jpg"),))


def make_snapshot(folder: Path, records: list[Record]) -> Snapshot:
    write_shards(records, folder / "toy", "train")
    write_language_model(folder / "pretrained" / "lm")
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(folder, provenance={"toy-train": made, "lm": made})
    return open_folder(folder)


def with_model(**changes: Any) -> Recipe:
    recipe = toy_recipe(mixture=[{"dataset": "toy-train", "turns": "chained"}]).model_dump(mode="json")
    recipe["model"] |= changes
    return Recipe.model_validate(recipe)


def problems(recipe: Recipe, snapshot: Snapshot) -> list[str]:
    admission = Admission(recipe, snapshot_path=snapshot.path)
    profile = build_profile(snapshot, ["toy-train"], eval_datasets=[], find_misfit=admission.find_problem)
    return list(profile["problem"])


def test_odd_records_are_kept_and_train_or_are_put_aside_and_could_not(tmp_path: Path) -> None:
    counts, faults = fuzz_records(100, language_model=write_language_model(tmp_path / "lm"))
    assert faults == []
    for name in odd_recipes():
        assert counts[f"{name}: kept"] > 5
        assert counts[f"{name}: refused by a stage"] > 0
        assert counts[f"{name}: bad in themselves"] > 20


def test_batches_would_refuse_what_validation_lets_through_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = with_image(1, picture(2, 200))
    snapshot = make_snapshot(tmp_path, [dataclasses.replace(toy_record(0), id="a"), thin])
    recipe = odd_recipes()["unpad"].model_dump(mode="json")
    for stage in ("prealign", "sft"):
        recipe["stages"][stage]["mixture"] = [{"dataset": "toy-train"}]
    recipe["model"]["language_model"]["max_length"] = 256
    monkeypatch.setattr("bench.fuzz_records.DATASET", "toy-train")
    monkeypatch.setattr(Admission, "find_problem", lambda *_, **__: None)
    _, faults = check_recipe(Recipe.model_validate(recipe), snapshot)
    assert any('record "toy/1" of toy-train: image is 2 x 200 pixels' in fault for fault in faults)


def test_an_image_of_which_unpadding_leaves_nothing_is_put_aside_as_it_is_seen(tmp_path: Path) -> None:
    # 200 x 2 stored on its side is 2 x 200 to the model.
    images = [picture(32, 32), picture(2, 200), picture(200, 2), picture(200, 2, on_its_side=True)]
    snapshot = make_snapshot(tmp_path, [with_image(number, data) for number, data in enumerate(images)])
    found = problems(with_model(layout={"unpad": True}), snapshot)
    assert found[0] == ""
    for problem, size in zip(found[1:], ("2 x 200", "200 x 2", "2 x 200"), strict=True):
        assert problem.startswith(f"stage pretrain refuses it: image is {size} pixels; needed: ")
    assert problems(with_model(), snapshot) == [""] * 4


def test_a_conversation_is_too_long_by_the_stage_that_shows_most_tokens_of_it(tmp_path: Path) -> None:
    long = dataclasses.replace(toy_record(0), turns=(Turn("human", "<image>\nwhat is it?"), Turn("gpt", "x" * 60)))
    snapshot = make_snapshot(tmp_path, [long, toy_record(1)])
    processor = build_processor(toy_recipe().model, snapshot_path=snapshot.path)
    turns = [(turn.speaker, turn.text) for turn in long.turns]
    length = len(processor.encode(turns, num_images=1).input_ids)
    source = {"source": "snapshot:pretrained/lm"}
    assert problems(with_model(language_model={**source, "max_length": length}), snapshot) == ["", ""]
    found = problems(with_model(language_model={**source, "max_length": length - 1}), snapshot)
    assert found[1] == ""
    assert found[0].endswith(f"refuses it: conversation has {length} tokens; needed: at most {length - 1}")
    # With a second grid's worth of tokens the same text no longer fits.
    wider = with_model(language_model={**source, "max_length": length}, fusion={"grid": 3})
    assert f"conversation has {length + 5} tokens" in problems(wider, snapshot)[0]


def test_each_draw_of_a_mixture_is_tried_and_no_other(tmp_path: Path) -> None:
    # Too long with its image and not without: refused where any epoch of any stage shows it.
    turns = (Turn("human", "<image>\nwhat is it?"), Turn("gpt", "red"))
    snapshot = make_snapshot(tmp_path, [dataclasses.replace(toy_record(number), turns=turns) for number in range(40)])
    part = {"dataset": "toy-train", "turns": "independent", "image_dropout": 0.9}
    recipe = toy_recipe(mixture=[part], epochs=2)
    whole = build_processor(recipe.model, snapshot_path=snapshot.path)
    length = len(whole.encode([(turn.speaker, turn.text) for turn in turns], num_images=1).input_ids)
    shorter = recipe.model.language_model.model_copy(update={"max_length": length - 1})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"language_model": shorter})})
    refused = [row for row, problem in enumerate(problems(recipe, snapshot)) if problem]
    assert 5 < len(refused) < 35
    spec = recipe.stages.sft
    assert spec is not None
    processor = processor_of_stage(build_model(recipe.model, snapshot_path=snapshot.path, seed=0)[1], spec)
    quarantine = frozenset(row_name("toy-train", row) for row in refused)

    def build_all(seed: int) -> None:
        mixture = Mixture(spec.mixture, snapshot, seed=seed, quarantine=quarantine)
        BatchBuilder(mixture, processor).build(range(2 * len(mixture)))

    build_all(stage_seed(recipe, "sft", None))
    with pytest.raises(RecordError, match=f"conversation has {length} tokens"):
        build_all(0)


@pytest.mark.parametrize("encoders", [None, ["left"]])
def test_the_processor_without_a_model_is_the_models_own(encoders: list[str] | None, tmp_path: Path) -> None:
    lm = write_language_model(tmp_path / "lm")
    changes: dict[str, Any] = {"layout": {"tiling": "anyres", "unpad": True}} if encoders is None else {}
    spec = toy_spec(
        lm, encoders=[{"name": name, "encoder": "vit-tiny-p16-64"} for name in ("left", "right")], **changes
    )
    _, processor = build_model(spec, snapshot_path=None, seed=0, encoders=encoders)
    alone = build_processor(spec, snapshot_path=None, encoders=encoders)
    assert alone.to_dict() == processor.to_dict()
    assert alone.image_token_id == processor.image_token_id


def test_weights_are_not_fetched_for_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    asked: list[list[str]] = []

    def download(_repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for fetch in (True, False):
        resolve_language_model("hub:a/b@" + "0" * 40, snapshot_path=None, fetch_weights=fetch)
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]
    assert {"*.json", "*.model", "*.txt", "*.jinja"} <= set(asked[1])
