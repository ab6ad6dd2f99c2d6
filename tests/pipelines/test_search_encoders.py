"""The compiled search_encoders pipeline, killed in the middle and run again: one optimizer step a trial."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from manyeyes.harness.events import Event, EventReader
from tests.pipelines.checkout import Checkout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENCODERS = "[{}]".format(
    ", ".join(
        f'{{name: {name}, encoder: vit-tiny-p16-64, source: "scratch:", image_size: {size}}}'
        for name, size in {"vit": 64, "small": 32, "large": 96}.items()
    )
)
COMMAND = (
    *("run", "search_encoders", "--recipe", "toy.yaml", "--set", f"model.encoders={ENCODERS}"),
    *("--set", "stages.pretrain=null", "--set", "stages.prealign.encoders=[vit]", "--param", "search_rounds=2"),
)


def events_of(run: Path) -> list[Event]:
    return EventReader(run).read_new()


def test_killed_search_repeats_no_finished_trial(toy_checkout: Checkout) -> None:
    latest = toy_checkout.path / "runs" / "latest"
    before = latest.resolve() if latest.exists() else None
    process = toy_checkout.start(*COMMAND)
    # Killed as soon as the start set is scored: the next round has begun or is about to.
    while not (
        latest.exists()
        and latest.resolve() != before
        and any(event.kind == "completed" and event.step == "advance_search[round 0]" for event in events_of(latest))
    ):
        assert process.poll() is None, process.communicate()[0] + toy_checkout.log()[-8000:]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    code, output = toy_checkout.run(*COMMAND)
    assert code == 0, output + toy_checkout.log()[-8000:]
    events = events_of(latest.resolve())
    trials = {event.step: event.kind for event in events if event.step.startswith("train_trial[")}
    assert set(trials) == {"train_trial[vit]", "train_trial[vit+small]", "train_trial[vit+large]"}
    cached = {event.step for event in events if event.kind == "cached"}
    assert {"train_trial[vit]", "prealign_encoder[vit]", "validate_data"} <= cached
    # Nothing was gained, so no round began after the first one.
    rounds = {"advance_search[round 0]", "advance_search[round 1]"}
    assert {event.step for event in events if event.step.startswith("advance_search")} == rounds
    summary = toy_checkout.summary()
    assert summary.report is not None
    page = Path(summary.report).read_text(encoding="utf-8")
    for text in ("Best set of encoders: vit", "vit + small", "vit + large", "Round 1: one encoder more"):
        assert text in page, text
    assert "ended: round 1 gained +0.00 points" in output


def test_impossible_search_is_refused_before_any_training(toy_checkout: Checkout) -> None:
    code, output = toy_checkout.run(*COMMAND, "--param", "search_start=vit, smal")
    assert code == 2, output
    assert 'Did you mean "small"' in output
    assert not [event for event in events_of(toy_checkout.path / "runs" / "latest") if "train" in event.step]
    code, output = toy_checkout.run(*COMMAND, "--param", "search_round=3")
    assert code == 2
    assert 'Did you mean "search_rounds"' in output
