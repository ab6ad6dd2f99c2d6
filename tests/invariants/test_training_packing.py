"""Rows without padding learn what padded batches learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BloomConfig

from manyeyes.chat import IGNORE_INDEX
from manyeyes.converters.convert import convert
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.mixture import Mixture
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import RecipeError
from manyeyes.model import build_model, load_checkpoint
from manyeyes.training.batches import BatchBuilder
from manyeyes.training.loop import Progress, batch_loss
from manyeyes.training.packing import pack_row
from manyeyes.training.stage import StageReport, read_stage_report
from tests import published_toys as toys
from tests.invariants.test_layouts_training import MODELS, recipe_of, record
from tests.invariants.test_training_processes import run_as
from tests.model_toys import write_language_model
from tests.published_cambrian import CambrianToy
from tests.published_eagle import EagleToy
from tests.published_mini_gemini import MiniGeminiToy
from tests.training_ranks import run_two
from tests.training_toys import every_step_saved, run_toy_stage, toy_recipe, toy_snapshot

CPU = torch.device("cpu")


# --- the four systems ----------------------------------------------------------------------------------------------


def llava(folder: Path) -> Path:
    toy = toys.LlavaToy(folder / "llava")
    toys.make_clip(folder / "clip")
    convert(toy.write(), folder / "out", encoders=str(folder / "clip"))
    return folder / "out"


def eagle(folder: Path) -> Path:
    toy = EagleToy(folder / "eagle")
    convert(toy.write(), folder / "out", encoder_configs=toy.write_facts(folder / "facts.json"))
    return folder / "out"


def cambrian(folder: Path) -> Path:
    toy = CambrianToy(folder / "cambrian")
    towers, facts = toy.write_towers(folder / "towers"), toy.write_facts(folder / "facts.json")
    convert(toy.write(), folder / "out", encoders=str(towers), encoder_configs=facts)
    return folder / "out"


def mini_gemini_hd(folder: Path) -> Path:
    heads = folder / "encoders.json"
    heads.write_text(json.dumps([{"num_attention_heads": 3}, {}]), encoding="utf-8")
    convert(MiniGeminiToy(folder / "mgm", image_grid=2).write(), folder / "out", encoder_configs=heads)
    return folder / "out"


@torch.no_grad()
@pytest.mark.parametrize("system", [llava, eagle, cambrian, mini_gemini_hd])
def test_loss_of_each_sample_of_a_published_system_is_its_own(system: Callable[[Path], Path], tmp_path: Path) -> None:
    model, processor = load_checkpoint(system(tmp_path))
    questions = [
        ([toys.photograph(90, 61)], [("What colour is the shape?", "red"), ("Is there a circle? yes or no", "yes")]),
        ([], [("Is red a colour?", "yes it is")]),
        ([toys.photograph(50, 80, seed=1)], [("What?", "a red circle there is")]),
    ]
    conversation = [
        ("human", "<image>\nis there a red circle?"), ("gpt", "no"), ("human", "What colour?"), ("gpt", "yes red"),
    ]  # fmt: skip
    chain_image = toys.photograph(64, 64, seed=2)
    alone = []
    for images, pairs in questions:
        for asked, answer in pairs:
            turns = [("human", "<image>\n" * len(images) + asked), ("gpt", answer)]
            alone.append(model(**processor(images=[images] if images else None, conversations=[turns])).loss)
    alone.append(model(**processor(images=[[chain_image]], conversations=[conversation])).loss)

    pictures = [processor.cut_image(image) for images, _ in questions for image in images]
    pictures.append(processor.cut_image(chain_image))
    groups = [
        processor.encode_group(pairs, num_images=len(images), image_sizes=[processor.cut_image(i).size for i in images])
        for images, pairs in questions
    ]
    chain = processor.encode(conversation, num_images=1, image_sizes=[pictures[-1].size])
    row, segments = pack_row(groups, [chain])
    visual = model.encode_images(
        processor.normalize_images(pictures), **processor.size_inputs([picture.size for picture in pictures])
    )
    model.enable_packing(longest=processor.max_length)
    labels = row.pop("labels")
    logits = model(**row, visual_tokens=visual, segments=segments, use_cache=False).logits[0, :-1]
    each = cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="none")
    own, continued = (owner[1:] for owner in segments.owners())
    supervised = labels[0, 1:] != IGNORE_INDEX
    packed = [each[supervised & (own == number)].mean() for number in own[supervised].unique().tolist()]
    assert len(packed) == 5
    assert bool((continued <= own).all())
    torch.testing.assert_close(torch.stack(packed), torch.stack(alone), rtol=1e-5, atol=1e-6)


# --- every fusion and layout ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    write_shards([record(number) for number in range(8)], folder / "toy", "train", rows_per_shard=100)
    write_language_model(folder / "pretrained" / "lm")
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(folder, provenance={"toy-train": made, "lm": made})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_batch_in_one_row_has_loss_and_gradients_of_the_padded_one(name: str, snapshot: Path) -> None:
    """Independent and chained, with and without their image, several images, tiles, newlines, looks back."""
    recipe = recipe_of(name)
    assert recipe.stages.sft is not None
    model, processor = build_model(recipe.model, snapshot_path=snapshot, seed=2)
    mixture = Mixture(recipe.stages.sft.mixture, open_folder(snapshot), seed=4)
    positions = range(12)
    padded = BatchBuilder(mixture, processor).build(positions)
    builder = BatchBuilder(mixture, processor, packed=True)
    packed = builder.build(positions)
    assert padded.prefixes is not None
    assert padded.chains is not None
    assert packed.prefixes is packed.chains is None
    assert packed.num_supervised == padded.num_supervised == builder.count(positions)
    assert packed.num_tokens == packed.num_places == padded.num_tokens < padded.num_places
    sizes = [builder.measure(position) for position in positions]
    assert sum(size.tokens for size in sizes) == packed.num_tokens
    if name != "shared mini-gemini-hd":  # whose images come whole, to be cut inside
        assert sum(size.images for size in sizes) == max(each.shape[0] for each in packed.pixel_values.values())
    model.train()
    for encoder in model.encoders.values():
        encoder.eval()
    model.enable_packing(longest=processor.max_length)
    gradients, losses = [], []
    for batch in (padded, packed):
        model.zero_grad()
        loss = batch_loss(model, batch, device=CPU)
        loss.backward()
        losses.append(loss.item())
        gradients.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=key)


# --- stages --------------------------------------------------------------------------------------------------------

PACKING = {"tokens": 60, "images": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    toy_snapshot(folder / "data")
    return folder


def sft(folder: Path, out: Path, *, changes: dict[str, Any] | None = None, **more: Any) -> StageReport:
    return run_toy_stage(
        "sft",
        recipe=toy_recipe(epochs=2, **(changes or {})),
        snapshot=folder / "data",
        inputs=folder,
        out=out,
        work_dir=out.parent / f"work-{out.name}",
        **{"checkpoint": None, **more},
    )


def test_stage_learns_the_same_with_and_without_packing(folder: Path, tmp_path: Path) -> None:
    padded = sft(folder, tmp_path / "padded")
    packed = sft(folder, tmp_path / "packed", changes={"packing": PACKING})
    expected = [point.loss for point in padded.history]
    assert [point.loss for point in packed.history] == pytest.approx(expected, rel=1e-4)
    assert [point.grad_norm for point in packed.history] == pytest.approx(
        [point.grad_norm for point in padded.history], rel=1e-3
    )
    assert packed.steps == padded.steps == 6
    assert packed.tokens is not None
    assert padded.tokens is not None
    assert packed.tokens.real == padded.tokens.real
    assert packed.tokens.supervised == padded.tokens.supervised
    assert packed.tokens.padding == 0 < padded.tokens.padding
    assert all(point.padding == 0 and point.tokens_per_s for point in packed.history)


def test_packed_stage_that_was_killed_goes_on_to_the_very_weights(folder: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(_: Progress) -> None:
        raise KilledError

    changes = {"packing": PACKING, "checkpoint_every_s": 1e-6}
    whole = sft(folder, tmp_path / "whole", changes=changes)
    with every_step_saved(), pytest.raises(KilledError):
        sft(folder, tmp_path / "killed", changes=changes, on_progress=kill)
    resumed = sft(folder, tmp_path / "killed", changes=changes)
    assert resumed.resumed_from_step
    assert resumed.checkpoint_digest == whole.checkpoint_digest
    # Counted over all attempts.
    assert resumed.tokens == whole.tokens


def test_workers_build_the_same_rows(folder: Path, tmp_path: Path) -> None:
    here = sft(folder, tmp_path / "here", changes={"packing": PACKING})
    ahead = sft(folder, tmp_path / "ahead", changes={"packing": PACKING}, data_workers=2)
    assert ahead.checkpoint_digest == here.checkpoint_digest


def test_two_processes_share_packed_steps(tmp_path: Path) -> None:
    toy_snapshot(tmp_path / "data")
    recipe = toy_recipe(epochs=2, packing=PACKING, schedule={"kind": "constant", "warmup_ratio": 0})
    shared = {"recipe": recipe, "snapshot": tmp_path / "data", "inputs": tmp_path}
    run_toy_stage("prealign", out=tmp_path / "one", work_dir=tmp_path / "work-one", **shared)  # type: ignore[arg-type]
    run_two(run_as, {**shared, "out": tmp_path / "two", "work_dir": tmp_path / "work-two"})
    one, two = read_stage_report(tmp_path / "one"), read_stage_report(tmp_path / "two")
    assert [point.loss for point in two.history] == pytest.approx([point.loss for point in one.history], rel=1e-4)
    assert two.tokens == one.tokens


def test_language_model_that_cannot_be_packed_stops_the_stage_by_name(folder: Path, tmp_path: Path) -> None:
    source = write_language_model(tmp_path / "bloom", BloomConfig(hidden_size=32, n_layer=2, n_head=4, pad_token_id=0))
    recipe = toy_recipe(packing=PACKING)
    values = recipe.model_dump(mode="json")
    values["model"]["language_model"]["source"] = f"dir:{source}"
    with pytest.raises(RecipeError, match="packing with a BloomForCausalLM"):
        run_toy_stage(
            "sft",
            recipe=type(recipe).model_validate(values),
            snapshot=folder / "data",
            inputs=folder,
            out=tmp_path / "out",
            work_dir=tmp_path / "work",
            checkpoint=None,
        )


def test_progress_tells_tokens_padding_and_what_is_supervised(folder: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = sft(folder, tmp_path / "sft", on_progress=seen.append)
    assert report.tokens is not None
    assert seen[-1].padding == pytest.approx(report.tokens.padding)
    assert seen[-1].supervised == pytest.approx(report.tokens.supervised_share)
    assert seen[-1].tokens_per_s > 0
    assert report.tokens.places > report.tokens.real > report.tokens.supervised > 0
