from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.mixture import Mixture
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.recipe import MixturePart

PART = MixturePart(dataset="toy-train", turns="chained", image_dropout=0.3)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder: Path = tmp_path_factory.mktemp("resume")
    Image.new("RGB", (4, 4)).save(folder / "black.png")
    image = read_image_file((folder / "black.png").read_bytes(), path="black.png")
    (folder / "black.png").unlink()
    turns = tuple(
        Turn("gpt" if index % 2 else "human", "<image>\na?" if index == 0 else f"text {index}") for index in range(8)
    )
    records = [Record(id=str(number), source="toy", images=(image,), turns=turns) for number in range(220)]
    write_shards(records, folder / "toy", "train", rows_per_shard=150)
    write_snapshot_manifest(folder, provenance={"toy-train": Provenance("CC0-1.0", "made for a test")})
    return open_folder(folder)


def test_a_sample_depends_on_its_position_alone(snapshot: Snapshot) -> None:
    straight = Mixture([PART], snapshot, seed=5)
    wanted = [(epoch, index) for epoch in (0, 1, 2) for index in range(len(straight))]
    samples = {position: straight.sample(*position) for position in wanted}
    jumping = Mixture([PART], snapshot, seed=5)
    for position in wanted[::-1]:
        assert jumping.sample(*position) == samples[position]


def test_ranks_together_see_what_one_process_sees(snapshot: Snapshot) -> None:
    alone = Mixture([PART], snapshot, seed=5)
    ranks = [Mixture([PART], snapshot, seed=5) for _ in range(3)]
    for index in range(len(alone)):
        assert ranks[index % 3].sample(1, index) == alone.sample(1, index)


def test_one_data_set_twice_draws_its_dropouts_apart(snapshot: Snapshot) -> None:
    mixture = Mixture([PART, PART], snapshot, seed=5)
    dropped: dict[str, list[bool]] = {}
    for index in range(len(mixture)):
        sample = mixture.sample(0, index)
        dropped.setdefault(sample.record.id, []).append(sample.image_dropped)
    assert all(len(flags) == 2 for flags in dropped.values())
    assert any(flags[0] != flags[1] for flags in dropped.values())
