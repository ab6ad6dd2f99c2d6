"""A bundle whose language model looks back at the image: one copy of its weights, which looks at prefill only.

The toy is built as Cambrian-1 is: spatial vision aggregator with padding masked, newlines, unpadding, re-injection.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from manyeyes.export.parity import measure_parity
from manyeyes.model import load_checkpoint
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Bundle, Group, load_bundle
from manyeyes.runtime.bundle_contents import DECODER, VISION
from manyeyes.runtime.tiling import TokenLayout
from tests.export_toys import VOCABULARY, Toy, count_written, make_groups, make_toy, picture

CHANNELS, CELLS = 16, 1 + 4
AGGREGATOR = {
    "strategy": "spatial-vision-aggregator",
    "grid": 4,
    "options": {"channels": CHANNELS, "num_heads": 4, "depth": 1, "mask_padding": True},
}


@pytest.fixture(scope="module")
def cambrian(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Toy:
    return make_toy(
        tmp_path_factory.mktemp("cambrian"),
        tiny_recipe,
        encoders={"coarse": "vit-tiny-p16-64", "fine": "vit-tiny-p16-64"},
        sides={"coarse": 64, "fine": 128},
        fusion=AGGREGATOR,
        layout=TokenLayout(newline=True, unpad=True),
        reinjection={"start": 0, "stride": 1, "count": None},
        max_length=192,
    )


@pytest.fixture(scope="module")
def loaded(cambrian: Toy) -> Bundle:
    return load_bundle(cambrian.bundle, threads=1)


def _record_runs(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many tokens each run of the decoder is given, and how many of them look."""
    seen: list[tuple[int, int]] = []
    decoder = loaded.decoder._decoder
    run = decoder.run

    def count(inputs: Any, **options: Any) -> Any:
        seen.append((inputs["inputs_embeds"].shape[1], len(inputs["window_places"])))
        return run(inputs, **options)

    monkeypatch.setattr(decoder, "run", count)
    return seen


def test_bundle_that_looks_back_answers_as_torch_token_for_token(cambrian: Toy) -> None:
    """Several questions an image, several images a prompt, text alone, all of it in one batch."""
    report = measure_parity(cambrian.checkpoint, cambrian.bundle, make_groups(), items=1000, max_new_tokens=8)
    assert report.items == sum(len(group.questions) for group in make_groups())
    assert report.token_match == 1.0, report.mismatches
    assert report.max_abs_logit < 1e-4


def test_only_images_that_are_read_are_looked_at(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _record_runs(loaded, monkeypatch)
    # 4 x 4 tokens of a square image; of one twice as wide the two rows that show it. Newlines do not look.
    loaded.answer_groups(
        [Group((picture(0),), ("red?", "what?")), Group((picture(1, 64, 32), picture(0)), ("both?",))],
        max_new_tokens=3,
    )
    assert seen[0][1] == 16 + 8 + 16
    assert len(seen) > 2, "prefixes, questions and at least one more step"
    assert all(looks == 0 for _, looks in seen[1:])
    assert all(length == 1 for length, _ in seen[2:])


def test_text_alone_looks_at_nothing(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _record_runs(loaded, monkeypatch)
    assert loaded.answer_groups([Group((), ("red?",))], max_new_tokens=2)[0][0].token_ids
    assert all(looks == 0 for _, looks in seen)


def test_what_is_looked_at_changes_the_answer(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else equality with torch would say little."""
    group = [Group((picture(0),), ("red?",))]
    looked = loaded.answer_groups(group, first_logits=True, max_new_tokens=1)[0][0].first_logits
    monkeypatch.setattr(loaded.decoder, "_gather_looks", lambda _places, _images: loaded.decoder._no_looks)
    blind = loaded.answer_groups(group, first_logits=True, max_new_tokens=1)[0][0].first_logits
    assert looked is not None
    assert blind is not None
    assert float(np.abs(looked - blind).max()) > 1e-2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_order_change_nothing(loaded: Bundle, batch_size: int) -> None:
    groups = make_groups()
    whole = loaded.answer_groups(groups, max_new_tokens=6)
    parts = loaded.answer_groups(groups[::-1], max_new_tokens=6, batch_size=batch_size)[::-1]
    assert parts == whole


def test_prompts_that_are_read_piece_by_piece_get_the_same_answers(
    loaded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups()
    seen = _record_runs(loaded, monkeypatch)
    whole = loaded.answer_groups(groups, max_new_tokens=8, first_logits=True)
    looked = sum(looks for _, looks in seen)
    for piece in (1, 5, 7):
        seen.clear()
        monkeypatch.setattr(loaded.decoder, "_piece", piece)
        found = loaded.answer_groups(groups, max_new_tokens=8, first_logits=True)
        assert max(length for length, _ in seen) == piece
        assert sum(looks for _, looks in seen) == looked
        for answers, expected in zip(found, whole, strict=True):
            assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
            for answer, other in zip(answers, expected, strict=True):
                np.testing.assert_allclose(answer.first_logits, other.first_logits, rtol=0, atol=2e-5)


def test_every_weight_is_written_once(cambrian: Toy) -> None:
    """Steps with and without images share one graph; the blocks between its layers are in it and nowhere else."""
    model, _ = load_checkpoint(cambrian.checkpoint)
    assert model.reinjection is not None
    blocks = sum(parameter.numel() for parameter in model.reinjection.parameters())
    table = model.get_input_embeddings().weight.numel()
    language_model = model.language_model.num_parameters()
    expected = {
        VISION: model.num_parameters() - language_model - blocks,
        DECODER: language_model - table + blocks,
    }
    for name, count in expected.items():
        # Beside its weights a graph holds shapes, scales and rotary frequencies.
        assert abs(count_written(cambrian.bundle / name) - count) <= 1000, name


def test_manifest_names_what_is_looked_at(cambrian: Toy) -> None:
    vision, decoder = (cambrian.manifest.graphs[name] for name in (VISION, DECODER))
    assert {value.name: (value.dtype, value.shape) for value in vision.inputs} == {
        "coarse": ("float32", ["images", 3, 64, 64]),
        "fine": ("float32", ["images", 3, 128, 128]),
        "layout": ("int64", ["images", "places"]),
        "image_sizes": ("int64", ["images", 2]),
    }
    assert [(value.name, value.dtype, value.shape[1:]) for value in vision.outputs] == [
        ("image_features", "float32", ["places", 32]),
        ("window_keys", "float32", [CELLS, CHANNELS]),
        ("window_mask", "bool", [CELLS]),
        ("window_overall", "float32", [CHANNELS]),
    ]
    inputs = {value.name: (value.dtype, value.shape) for value in decoder.inputs}
    assert inputs["window_places"] == ("int64", ["looks"])
    assert inputs["window_keys"] == ("float32", ["looks", CELLS, CHANNELS])
    assert inputs["window_mask"] == ("bool", ["looks", CELLS])
    assert inputs["window_overall"] == ("float32", ["looks", CHANNELS])
    assert decoder.outputs[0].shape == ["batch_size", "kept", VOCABULARY]
