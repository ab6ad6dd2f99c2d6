"""Whatever comes from a cache, answers are those of one ``generate`` a question: in fp32, torch and bundle."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.answering.answerers import Answerer, AnswererSpec, TorchAnswerer
from manyeyes.evaluation.answering.encoder_cache import EncoderCacheSettings, FeatureSettings, ImageCounts
from manyeyes.evaluation.answering.torch_answerer import from_arrays, join_images, split_images, to_arrays
from manyeyes.evaluation.evaluate import EvaluationProgress, evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.evaluation.reliance import zero_encoder
from manyeyes.evaluation.scorecard import ModelKind, Scorecard
from manyeyes.model import ManyEyesProcessor, load_checkpoint, save_checkpoint
from manyeyes.model.connection import VisualTokens
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.training import features
from tests.evaluation_fakes import make_recipe, make_record, make_snapshot
from tests.export_toys import Toy, make_groups, make_model

TOKENS = 5
IMAGES = 6
SHOWN = 8
"""Different images that ``make_groups`` asks about."""

TWO_VITS = {
    "encoders": {"coarse": "vit-tiny-p16-64", "fine": "vit-tiny-p16-64"},
    "sides": {"coarse": 64, "fine": 128},
    "max_length": 192,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "looks back": {
        **TWO_VITS,
        "fusion": {
            "strategy": "spatial-vision-aggregator",
            "grid": 4,
            "options": {"channels": 16, "num_heads": 4, "depth": 1, "mask_padding": True},
        },
        "layout": TokenLayout(newline=True, unpad=True),
        "reinjection": {"start": 0, "stride": 1, "count": None},
    },
    "tiles": {
        **TWO_VITS,
        "fusion": {"strategy": "mixture-of-resolutions", "grid": 4, "options": {"num_groups": 2}},
        "layout": TokenLayout(tiling="anyres", newline=True, unpad=True, tile_size=64),
        "max_length": 512,
    },
}


def one_by_one(checkpoint: Path, groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    """What ``generate`` writes when it is given one question at a time."""
    model, processor = load_checkpoint(checkpoint)
    answers = []
    for group in groups:
        answers.append([])
        for question in group.questions:
            batch = processor(images=[list(group.images)] if group.images else None, text=[question])
            with torch.inference_mode():
                ids = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)[0, batch["input_ids"].shape[1] :]
            answers[-1].append(tuple(token for token in ids.tolist() if token not in processor.stop_token_ids))
    # Else equality would say little.
    assert len({answer for group in answers for answer in group}) > 3
    return answers


def written(answers: Sequence[Sequence[GeneratedAnswer]]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in group] for group in answers]


def build(toy: Toy, kind: ModelKind, folder: Path | None, **bounds: int) -> Answerer:
    model = toy.checkpoint if kind == "torch" else toy.bundle
    cache = None if folder is None else EncoderCacheSettings(key=kind, folder=folder, **bounds)
    return pickle.loads(pickle.dumps(AnswererSpec(kind, model, threads=1, encoder_cache=cache))).build()


@pytest.fixture(scope="module")
def expected(toy_bundle: Toy) -> list[list[tuple[int, ...]]]:
    return one_by_one(toy_bundle.checkpoint, make_groups())


@pytest.mark.parametrize("kind", ["torch", "bundle"])
def test_cold_warm_and_shared_caches_change_no_answer(
    toy_bundle: Toy, kind: ModelKind, expected: list[list[tuple[int, ...]]], tmp_path: Path
) -> None:
    groups = make_groups()

    def asked(answerer: Answerer, those: Sequence[Group] = groups) -> list[list[tuple[int, ...]]]:
        return written(answerer.answer_groups(those, max_new_tokens=TOKENS))

    without = build(toy_bundle, kind, None)
    assert asked(without) == expected
    assert without.image_counts == ImageCounts()
    first = build(toy_bundle, kind, tmp_path)
    # Half of the images are known when all are asked for.
    assert asked(first, groups[:3]) == expected[:3]
    assert asked(first) == expected
    assert first.image_counts == ImageCounts(encoded=SHOWN, from_memory=3)
    assert asked(first) == expected
    assert first.image_counts == ImageCounts(encoded=SHOWN, from_memory=3 + SHOWN)
    second = build(toy_bundle, kind, tmp_path, memory_bytes=0)
    assert [asked(second, [group])[0] for group in groups] == expected
    assert second.image_counts.encoded == 0
    assert second.image_counts.from_disk >= SHOWN


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_model_looks_back_at_and_how_many_tokens_an_image_has_is_kept(layout: str, tmp_path: Path) -> None:
    model, processor = make_model(**LAYOUTS[layout])
    save_checkpoint(model, processor, tmp_path / "checkpoint")
    groups = make_groups()
    expected = one_by_one(tmp_path / "checkpoint", groups)
    settings = EncoderCacheSettings(key="torch", folder=tmp_path / "cache")
    for counts in (ImageCounts(encoded=SHOWN), ImageCounts(from_disk=SHOWN)):
        answerer = TorchAnswerer(tmp_path / "checkpoint", threads=1, encoder_cache=settings)
        for _ in range(2):
            assert written(answerer.answer_groups(groups, max_new_tokens=TOKENS)) == expected
        assert answerer.image_counts - ImageCounts(from_memory=SHOWN) == counts


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_features_that_one_model_keeps_are_read_by_another_bit_for_bit(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_move_seconds", lambda folder: folder.mkdir(parents=True, exist_ok=True) or 0.0)
    # A fusion that reaches into encoders leaves nothing to keep.
    reaching = {"fusion": {"strategy": "channel-concat", "grid": 4}} if layout == "tiles" else {}
    model, processor = make_model(**{**LAYOUTS.get(layout, {}), **reaching})
    groups = make_groups()
    images = list(dict.fromkeys(image for group in groups if group.questions for image in group.images))
    names = tuple(model.encoders)
    save_checkpoint(model, processor, tmp_path / "first")
    with torch.no_grad():
        next(model.projector.parameters()).mul_(1.1)
    save_checkpoint(model, processor, tmp_path / "second")

    def build(checkpoint: str, encoders: tuple[str, ...] = names) -> TorchAnswerer:
        settings = FeatureSettings(tmp_path / "features", encoders, len(images), "c")
        answerer = AnswererSpec("torch", tmp_path / checkpoint, threads=1, features=settings).build()
        assert isinstance(answerer, TorchAnswerer)
        return answerer

    build("first").answer_groups(groups, max_new_tokens=TOKENS)
    expected = one_by_one(tmp_path / "second", groups)
    assert written(build("second", names[:1]).answer_groups(groups, max_new_tokens=TOKENS)) == expected
    second = build("second")
    with monkeypatch.context() as patch:
        patch.setattr(ManyEyesProcessor, "cut_image", lambda *_, **__: pytest.fail("an image was decoded"))
        assert written(second.answer_groups(groups, max_new_tokens=TOKENS)) == expected
        with torch.inference_mode():
            shown = second._show(images)
    monkeypatch.setenv(features.LIMIT, "0")
    with torch.inference_mode():
        without = build("second")._show(images)
    for image in images:
        ours, theirs = to_arrays(shown[image]), to_arrays(without[image])
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert all(np.array_equal(ours.windows[name], theirs.windows[name]) for name in ours.windows)


def test_a_batch_is_taken_apart_and_put_together_bit_for_bit() -> None:
    model, processor = make_model(**LAYOUTS["looks back"])
    images = [image for group in make_groups()[:7] for image in group.images]
    cut = [processor.cut_image(image) for image in images]
    sizes = [image.size for image in cut]
    with torch.inference_mode():
        whole = model.encode_images(processor.pixel_values(images), **processor.size_inputs(sizes))
        lengths = processor.count_tokens(len(images), sizes)
        assert isinstance(whole, VisualTokens)
        assert len(set(lengths)) > 1
        apart = [from_arrays(to_arrays(image), torch.device("cpu")) for image in split_images(whole, lengths)]
        joined = join_images(apart)
    assert isinstance(joined, VisualTokens)
    for place, length in enumerate(lengths):
        assert torch.equal(joined.tokens[place, :length], whole.tokens[place, :length])
        looks = whole.cells[place, :length] >= 0
        assert torch.equal(joined.cells[place, :length] >= 0, looks)
        assert not bool((joined.cells[place, length:] >= 0).any())
        ours = joined.windows.select(joined.cells[place, :length][looks])
        theirs = whole.windows.select(whole.cells[place, :length][looks])
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.overall, theirs.overall)


def test_disturbed_features_are_neither_kept_nor_taken_from_the_cache(toy_bundle: Toy, tmp_path: Path) -> None:
    groups = make_groups()
    plain = TorchAnswerer(toy_bundle.checkpoint, threads=1)
    encoder = next(iter(plain.model.encoder_sizes))
    plain.disturb = zero_encoder(encoder)
    expected = plain.answer_groups(groups, max_new_tokens=TOKENS)
    answerer = build(toy_bundle, "torch", tmp_path)
    assert isinstance(answerer, TorchAnswerer)
    own = answerer.answer_groups(groups, max_new_tokens=TOKENS)
    assert own != expected
    counts = answerer.image_counts
    answerer.disturb = zero_encoder(encoder)
    assert answerer.answer_groups(groups, max_new_tokens=TOKENS) == expected
    assert answerer.image_counts == counts
    answerer.disturb = None
    assert answerer.answer_groups(groups, max_new_tokens=TOKENS) == own


class StoppedError(Exception):
    pass


def score(
    answerer: Answerer, snapshot: Snapshot, folder: Path, *, work: str = "work", stop_after: int | None = None
) -> Scorecard:
    def stop(progress: EvaluationProgress) -> None:
        if stop_after is not None and progress.done >= stop_after:
            raise StoppedError

    recipe = make_recipe(
        evaluation__batch_size=2, evaluation__max_new_tokens=TOKENS, evaluation__conditions=["other-image", "grey"]
    )
    facts = {"code_digest": "c", "model_digest": answerer.name, "work_dir": folder / work, "on_progress": stop}
    return evaluate(answerer, recipe, snapshot=snapshot, out_dir=folder / "out", **facts)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


@pytest.mark.parametrize("kind", ["torch", "bundle"])
def test_an_evaluation_that_was_stopped_and_one_with_every_cache_have_the_answers_of_generate(
    toy_bundle: Toy, kind: ModelKind, snapshot: Snapshot, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    with pytest.raises(StoppedError):
        score(build(toy_bundle, kind, tokens), snapshot, tmp_path, stop_after=8)
    # Two of six images are answered; the others are put into other batches than they would have been.
    resumed = score(build(toy_bundle, kind, tokens), snapshot, tmp_path).benchmarks["easy-vqa"]
    outcomes = read_outcomes(tmp_path / "out" / "items.parquet").outcomes
    # Every image has the same four questions, so other images' are known; four without images and four on grey.
    assert resumed.from_cache == 8 + 4 * IMAGES
    assert resumed.image_cache is not None
    assert (resumed.image_cache.encoded, resumed.image_cache.from_disk) == (IMAGES - 2 + 1, 0)

    records = [make_record(number) for number in range(IMAGES)]
    questions = tuple(turn.text.removeprefix("<image>\n") for turn in records[0].turns[::2])
    groups = [Group((record.images[0].data,), questions) for record in records] + [Group((), questions)]
    _, processor = load_checkpoint(toy_bundle.checkpoint)
    *with_image, without = [
        [processor.decode_answer(answer) for answer in group] for group in one_by_one(toy_bundle.checkpoint, groups)
    ]
    assert [outcome.prediction for outcome in outcomes] == [answer for group in with_image for answer in group]
    assert [outcome.prediction_image_off for outcome in outcomes] == without * IMAGES
    assert len({outcome.prediction for outcome in outcomes}) > 1

    # Another task of a pipeline: no answers of this one, and all visual tokens.
    again = score(build(toy_bundle, kind, tokens), snapshot, tmp_path, work="another").benchmarks["easy-vqa"]
    assert again.image_cache is not None
    assert (again.image_cache.encoded, again.image_cache.from_disk) == (0, IMAGES + 1)
    figures = {"seconds": 0, "questions_per_s": None, "from_cache": 0, "image_cache": None}
    assert again.model_copy(update=figures) == resumed.model_copy(update=figures)
    assert read_outcomes(tmp_path / "out" / "items.parquet").outcomes == outcomes


def test_tokens_of_a_bundle_are_those_of_a_batch_of_one(toy_bundle: Toy, tmp_path: Path) -> None:
    answerer = build(toy_bundle, "bundle", tmp_path)
    images = [group.images[0] for group in make_groups()[:6]]
    together = answerer.bundle.encode_images(images)
    alone = [build(toy_bundle, "bundle", None).bundle.encode_images([image])[0] for image in images]
    kept = build(toy_bundle, "bundle", tmp_path).bundle.encode_images(images[::-1])[::-1]
    for one, other, found in zip(together, alone, kept, strict=True):
        np.testing.assert_allclose(one.tokens, other.tokens, atol=1e-5)
        np.testing.assert_array_equal(one.tokens, found.tokens)
