"""The compiled pipeline validate: shards side by side, and the verdict of train's validate_data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.checkout import Checkout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_snapshot_is_judged_by_parts_and_again_from_the_cache(toy_checkout: Checkout) -> None:
    command = ("run", "validate", "--recipe", "toy.yaml")
    code, output = toy_checkout.run(*command)
    assert code == 0, output + toy_checkout.log()[-6000:]
    summary = toy_checkout.summary()
    steps = {step.name: step for step in summary.steps}
    parts = {name for name in steps if name.startswith("profile_shards")}
    assert parts == {f"profile_shards[easy-vqa-{split}]" for split in ("train", "val", "test")}
    assert "passed: 28 samples, 0 quarantined" in (steps["judge_snapshot"].figure or "")
    assert summary.report is not None
    page = Path(summary.report).read_text(encoding="utf-8")
    assert "easy-vqa-train" in page
    (folder,) = (toy_checkout.path / "runs" / "latest" / "steps").resolve().rglob("judge-snapshot/validation")
    names = {path.name for path in folder.iterdir()}
    assert {"profile.parquet", "validation.json", "quarantine.jsonl", "contamination.json"} <= names

    code, output = toy_checkout.run(*command)
    assert code == 0, output
    cached = {step.name for step in toy_checkout.summary().steps if step.cached}
    assert cached == parts
