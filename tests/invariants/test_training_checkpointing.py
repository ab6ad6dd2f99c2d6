"""Recomputing encoders' activations changes nothing that is learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyeyes.encoders import Encoder
from manyeyes.model import checkpoint_digest
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot


def test_checkpointed_encoders_learn_the_same_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_snapshot(tmp_path / "data")
    switched: list[bool] = []
    switch = Encoder.set_checkpointing

    def watched(self: Encoder, on: bool) -> None:
        switched.append(on)
        switch(self, on)

    monkeypatch.setattr(Encoder, "set_checkpointing", watched)
    reports = {}
    for on in (False, True):
        recipe = toy_recipe(checkpoint_encoders=on)
        reports[on] = run_toy_stage(
            "sft",
            recipe=recipe,
            snapshot=tmp_path / "data",
            inputs=tmp_path,
            out=tmp_path / str(on),
            work_dir=tmp_path / f"work-{on}",
            checkpoint=None,
        )
    assert switched == [False, False, True, True]
    assert checkpoint_digest(tmp_path / "True") == checkpoint_digest(tmp_path / "False")
    # A run that ends for lack of memory goes on where it was once the option is set.
    assert reports[True].stage_digest == reports[False].stage_digest
