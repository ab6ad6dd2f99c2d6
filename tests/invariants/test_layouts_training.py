"""Tiles, newlines, padding masks and shared pixels in our own loops: training, resuming and answering."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.mixture import Mixture
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import open_folder
from manyeyes.evaluation.answering.encoder_cache import EncoderCacheSettings
from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer
from manyeyes.evaluation.reliance import ShuffleEncoder, zero_encoder
from manyeyes.model import build_model, load_checkpoint, save_checkpoint
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Group
from manyeyes.training import batches
from manyeyes.training.batches import BatchBuilder
from manyeyes.training.loop import Progress, batch_loss
from tests.model_toys import write_language_model
from tests.pretended_cuda import pretended_cuda
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe

SIZES = ((48, 20), (20, 48), (32, 32))
TOKENS = 4
ENCODERS = [
    {"name": "left", "encoder": "vit-tiny-p16-64", "image_size": 32},
    {"name": "right", "encoder": "vit-tiny-p16-64", "image_size": 64},
]
MINING = {"strategy": "patch-info-mining", "grid": 2, "options": {"image_grid": 2}}
AGGREGATOR = {
    "strategy": "spatial-vision-aggregator",
    "grid": 4,
    "options": {"channels": 16, "num_heads": 4, "depth": 1, "mask_padding": True},
}
MODELS: dict[str, dict[str, Any]] = {
    "anyres": {"layout": {"tiling": "anyres", "newline": True, "unpad": True}},
    "one newline": {"layout": {"newline": True, "newline_at": "end"}},
    "mini-gemini-hd": {"fusion": MINING, "layout": {"tiling": "grid", "whole": ["right"]}},
    "cambrian": {
        "fusion": AGGREGATOR,
        "layout": {"newline": True, "unpad": True},
        "reinjection": {"stride": 1},
    },
    "shared anyres": {
        "preprocess": "shared",
        "shared": {"image_size": 32},
        "layout": {"tiling": "anyres", "newline": True, "unpad": True},
    },
    "shared mini-gemini-hd": {
        "preprocess": "shared",
        "shared": {"align_corners": False},
        "fusion": MINING,
        "layout": {"tiling": "grid", "whole": ["right"]},
    },
}


def picture(number: int, *, rotated: bool = False) -> bytes:
    """Noise, wide, high or square; a rotated one is stored on its side, and says so."""
    width, height = SIZES[number % 3]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if rotated:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def record(number: int) -> Record:
    numbers = [number, number + 1] if number % 4 == 3 else [number]
    images = [read_image_file(picture(each, rotated=each % 5 == 0), path=f"{each}.png") for each in numbers]
    turns = (
        Turn("human", "<image>\n" * len(images) + "what colour is it?"),
        Turn("gpt", "red" if number % 2 else "no"),
        Turn("human", "is there a circle?"),
        Turn("gpt", "yes"),
    )
    return Record(f"toy/{number}", "toy", tuple(images), turns)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    write_shards([record(number) for number in range(8)], folder / "toy", "train", rows_per_shard=100)
    write_language_model(folder / "pretrained" / "lm")
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(folder, provenance={"toy-train": made, "lm": made})
    return folder


def recipe_of(name: str) -> Recipe:
    parts = [{"dataset": "toy-train", "turns": turns, "image_dropout": 0.2} for turns in ("independent", "chained")]
    # Encoders stay frozen, which keeps running checkpoints small.
    train = {"projector": 1e-3, "language_model": 1e-3, **({"fusion": 1e-3} if "fusion" in MODELS[name] else {})}
    base = toy_recipe(mixture=parts, checkpoint_every_s=1e-6, batch_size=6, train=train).model_dump(mode="json")
    base["model"] |= {"encoders": ENCODERS, **MODELS[name]}
    base["model"]["language_model"]["max_length"] = 256
    return Recipe.model_validate(base)


@dataclass(frozen=True)
class Parts:
    """One toy of MODELS and what its own loops are compared with."""

    recipe: Recipe
    checkpoint: Path


@pytest.fixture(scope="module", params=list(MODELS))
def parts(request: pytest.FixtureRequest, snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    recipe = recipe_of(request.param)
    model, processor = build_model(recipe.model, snapshot_path=snapshot, seed=2)
    with torch.no_grad():
        for parameter in (*model.projector.parameters(), *([] if model.newline is None else [model.newline])):
            # As drawn, images would hardly change an answer.
            parameter.mul_(4)
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    save_checkpoint(model, processor, checkpoint)
    return Parts(recipe, checkpoint)


def builder_of(parts: Parts, snapshot: Path, processor: Any) -> BatchBuilder:
    assert parts.recipe.stages.sft is not None
    return BatchBuilder(Mixture(parts.recipe.stages.sft.mixture, open_folder(snapshot), seed=4), processor)


@torch.no_grad()
def test_loss_of_a_batch_is_the_sum_over_its_conversations_one_by_one(parts: Parts, snapshot: Path) -> None:
    model, processor = load_checkpoint(parts.checkpoint)
    assert parts.recipe.stages.sft is not None
    mixture = Mixture(parts.recipe.stages.sft.mixture, open_folder(snapshot), seed=4)
    builder = BatchBuilder(mixture, processor)
    batch = builder.build(range(12))
    assert batch.prefixes is not None
    assert batch.chains is not None
    lengths = {int(length) for part in (batch.prefixes, batch.chains) for length in part["image_spans"][:, 2]}
    together = batch_loss(model, batch, device=torch.device("cpu")).item()
    alone, counted = 0.0, 0
    for position in range(12):
        sample = mixture.sample(0, position)
        images = [] if sample.image_dropped else [image.data for image in sample.record.images]
        for turns in sample.conversations():
            one = processor(images=[images], conversations=[[(turn.speaker, turn.text) for turn in turns]])
            alone += model(**one, num_items_in_batch=1).loss.item()
            counted += int((one["labels"] != -100).sum())
    assert counted == batch.num_supervised
    assert together == pytest.approx(alone, rel=1e-5)
    # Images of several sizes: where the layout follows them, their tokens differ in number.
    varies = parts.recipe.model.layout is not None and parts.recipe.model.layout.unpad
    assert (len(lengths) > 1) == varies


def test_tiles_kept_in_memory_give_the_same_batch(
    parts: Parts, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = load_checkpoint(parts.checkpoint)
    builder = builder_of(parts, snapshot, processor)
    first, again = builder.build(range(12)), builder.build(range(12))
    monkeypatch.setattr(batches, "PIXELS_IN_MEMORY_BYTES", 0)
    fresh = builder_of(parts, snapshot, processor).build(range(12))
    for other in (again, fresh):
        assert other.pixel_values.keys() == first.pixel_values.keys()
        assert all(torch.equal(other.pixel_values[name], first.pixel_values[name]) for name in first.pixel_values)
        assert all(torch.equal(other.size_inputs[name], first.size_inputs[name]) for name in first.size_inputs)


def test_images_in_memory_are_decoded_once(parts: Parts, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = load_checkpoint(parts.checkpoint)
    builder = builder_of(parts, snapshot, processor)
    builder.build(range(12))
    monkeypatch.setattr(processor, "cut_image", None)
    builder.build(range(12))


def test_killed_stage_goes_on_to_the_very_weights(parts: Parts, snapshot: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(_: Progress) -> None:
        raise KilledError

    def run(name: str, **more: Any) -> Any:
        return run_toy_stage(
            "sft",
            recipe=parts.recipe,
            snapshot=snapshot,
            inputs=tmp_path,
            out=tmp_path / name,
            work_dir=tmp_path / f"work-{name}",
            checkpoint=parts.checkpoint,
            **more,
        )

    whole = run("whole")
    assert whole.steps == 3
    with every_step_saved(), pytest.raises(KilledError):
        # Progress comes after the last step, when running checkpoints lie there.
        run("killed", on_progress=kill)
    resumed = run("killed")
    assert resumed.resumed_from_step in (1, 2)
    assert resumed.checkpoint_digest == whole.checkpoint_digest
    before, after = (load_checkpoint(path)[0] for path in (parts.checkpoint, tmp_path / "whole"))
    if before.newline is not None:
        assert not torch.equal(before.newline, after.newline)


def test_answers_are_those_of_generate_one_question_at_a_time(parts: Parts) -> None:
    model, processor = load_checkpoint(parts.checkpoint)
    images = [picture(number, rotated=number == 1) for number in range(3)]
    groups = [
        Group((images[0],), ("what colour is it?", "is there a red circle? yes or no", "a?")),
        Group((images[1],), ("is there a circle?",)),
        # The first image again, two images in one question, and none at all.
        Group((images[2], images[0]), ("what differs?", "which is red?")),
        Group((), ("is there a red circle?",)),
    ]
    answerer = TorchAnswerer(parts.checkpoint, threads=1)
    found = answerer.answer_groups(groups, max_new_tokens=TOKENS)
    assert [answerer.answer_groups([group], max_new_tokens=TOKENS)[0] for group in groups] == found
    for group, answers in zip(groups, found, strict=True):
        for question, answer in zip(group.questions, answers, strict=True):
            batch = processor(images=[list(group.images)] if group.images else None, text=[question])
            with torch.inference_mode():
                ids = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)[0, batch["input_ids"].shape[1] :]
            assert list(answer.token_ids) == [
                token for token in ids.tolist() if token not in processor.stop_token_ids
            ], question
    # Else equality would say little.
    assert len({answer.token_ids for answers in found for answer in answers}) > 2


def test_answers_on_a_gpu_are_those_of_the_cpu(parts: Parts, tmp_path: Path) -> None:
    groups = [
        Group((picture(0),), ("what colour is it?", "is there a red circle? yes or no", "a?")),
        Group((picture(1), picture(2)), ("which is red?", "which one?"), ((), ("yes", "yes please", "no"))),
        Group((), ("is there a red circle?",)),
    ]
    expected = TorchAnswerer(parts.checkpoint, threads=1, device="cpu").answer_groups(groups, max_new_tokens=TOKENS)
    cache = EncoderCacheSettings("model", folder=tmp_path)
    with pretended_cuda():
        answerer = TorchAnswerer(parts.checkpoint, threads=1, device="cuda", encoder_cache=cache)
        # Encoded, then from the cache, then with an encoder disturbed.
        assert answerer.answer_groups(groups, max_new_tokens=TOKENS) == expected
        assert answerer.answer_groups(groups, max_new_tokens=TOKENS) == expected
        for answerer.disturb in (zero_encoder("left"), ShuffleEncoder("left")):
            answerer.answer_groups(groups, max_new_tokens=TOKENS)


def test_layout_follows_the_decoded_image_and_not_the_stored_one(snapshot: Path) -> None:
    """A wide picture that is stored upright loses rows, not columns."""
    _, processor = build_model(recipe_of("cambrian").model, snapshot_path=snapshot, seed=2)
    assert processor.cut_image(picture(0)).size == (48, 20)
    shown = processor.cut_image(picture(0, rotated=True))
    assert shown.size == (20, 48)
    stored = read_image_file(picture(0, rotated=True), path="a.png")
    assert (stored.width, stored.height) == (48, 20)
    # int(20 * 4 / 48) = 1 column, (4 - 1) // 2 = 1 of padding on either side: 4 rows of 2 and a newline.
    inputs = processor.size_inputs([shown.size])
    assert inputs["layout"].tolist() == [[1, 2, -1, 5, 6, -1, 9, 10, -1, 13, 14, -1]]
    assert inputs["image_sizes"].tolist() == [[20, 48]]
