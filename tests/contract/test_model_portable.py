"""A checkpoint does not depend on the folder that it was made in."""

from __future__ import annotations

from pathlib import Path

from manyeyes.model import build_model, save_checkpoint
from tests.training_toys import toy_recipe, toy_snapshot


def test_checkpoint_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "another-place"):
        toy_snapshot(tmp_path / name / "data")
        model, processor = build_model(toy_recipe().model, snapshot_path=tmp_path / name / "data", seed=1)
        digests.append(save_checkpoint(model, processor, tmp_path / name / "checkpoint"))
        for file in (tmp_path / name / "checkpoint").iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert digests[0] == digests[1]
