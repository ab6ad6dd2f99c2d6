"""A record that cannot be used is named by its data set and id, wherever in a batch it turns up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.mixture import Mixture
from manyeyes.data.records import ImageFile, Record, Turn
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import RecordError
from manyeyes.model import build_model
from manyeyes.processor import ManyEyesProcessor
from manyeyes.recipe import MixturePart
from manyeyes.training.batches import BatchBuilder
from tests.model_toys import write_language_model
from tests.training_toys import toy_recipe, toy_record


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ManyEyesProcessor:
    folder = tmp_path_factory.mktemp("model")
    write_language_model(folder / "pretrained" / "lm")
    write_snapshot_manifest(folder, provenance={"lm": Provenance("CC0-1.0", "made for a test")})
    return build_model(toy_recipe().model, snapshot_path=folder, seed=0)[1]


def broken_image(record: Record) -> Record:
    (image,) = record.images
    return replace(record, images=(ImageFile(b"no image", image.path, "0" * 64, 32, 32),))


def long_text(record: Record) -> Record:
    return replace(record, turns=(record.turns[0], Turn("gpt", "red " * 500)))


def placeholder_behind(record: Record) -> Record:
    first, answer, second, other = record.turns
    return replace(record, turns=(replace(first, text="what?"), answer, replace(second, text="<image>\nwhat?"), other))


def no_text(record: Record) -> Record:
    return replace(record, turns=(record.turns[1], record.turns[0]))


@pytest.mark.parametrize(
    ("spoil", "part", "said"),
    [
        (broken_image, {"turns": "independent"}, 'record "toy/1" of toy-train: 8 bytes'),
        (broken_image, {"turns": "chained"}, 'record "toy/1" of toy-train: 8 bytes'),
        (long_text, {"turns": "chained"}, 'record "toy/1" of toy-train: '),
        (placeholder_behind, {"turns": "independent"}, 'record "toy/1" of toy-train has <image> elsewhere'),
        (no_text, {"turns": "independent"}, 'record "toy/1" of toy-train: turn 0 is by'),
        (lambda record: record, {"questions": "brief"}, r'record "toy/\d" of toy-train has 4 turns'),
    ],
)
def test_the_record_is_named(
    spoil: object, part: dict[str, str], said: str, processor: ManyEyesProcessor, tmp_path: Path
) -> None:
    records = [toy_record(number) for number in range(3)]
    records[1] = spoil(records[1])  # type: ignore[operator]
    write_shards(records, tmp_path / "toy", "train")
    write_snapshot_manifest(tmp_path, provenance={"toy-train": Provenance("CC0-1.0", "made for a test")})
    mixture = Mixture([MixturePart.model_validate({"dataset": "toy-train", **part})], open_folder(tmp_path), seed=0)
    with pytest.raises(RecordError, match=said) as caught:
        BatchBuilder(mixture, processor).build(range(3))
    assert caught.value.found.count("toy/") == 1
    assert caught.value.do
